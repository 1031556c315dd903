"""Does a layout compute for this model and this data what one device computes?

Start with `verify.py`: it makes the model small, runs both, and compares. `amt verify` is its command line.
"""
