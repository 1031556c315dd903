"""Tensor and sequence parallel: a layer's matrices are split over ranks, by the plan that the model declares.

Start with `parallelize.py`, then read `plan.py` (a model's rules) and `layers.py` (what a rule does to a layer).
Sources: Megatron-LM, arXiv 1909.08053; sequence parallel, arXiv 2205.05198.
"""
