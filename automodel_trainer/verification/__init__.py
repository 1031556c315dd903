"""Checks that a layout computes the same as one device, for a given model and data.

Start with `verify.py`: it makes the model small, trains it on both, and compares. `amt verify` is its command line.
"""
