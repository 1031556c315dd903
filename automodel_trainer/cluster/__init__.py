"""Runs on the workers of a Ray cluster. The driver's side is `ray_train.py`, the workers' `worker.py`."""
