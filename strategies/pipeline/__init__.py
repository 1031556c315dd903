"""Pipeline parallel: the layers of a model are split over ranks, and micro-batches run through them one after another.

Start with `parallel_3d.py` (the strategy), then read `split.py` (which rank gets which layers) and `pipeline.py` (one
step).
"""
