"""Shared by all strategies: the contract, the processes and their mesh, and how one optimizer step runs.

Start with `mesh_strategy.py`. Each other file does one job, such as clipping, compiling or checkpointing activations.
"""
