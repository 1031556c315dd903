"""What all strategies share: the contract, processes and mesh, and how one optimizer step runs.

Start with `mesh_strategy.py`. The other files are one job each: clipping, compiling, checkpointing activations, saving.
"""
