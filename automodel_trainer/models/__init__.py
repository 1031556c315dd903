"""Models: one builder for all of them, reading weights, adapters, kernels. Start with `build.py`."""
