"""Building blocks on top of torch. They know nothing of this project: no config, no strategy, no LightningModule.

Start with `blocks.py` (find a model's repeated blocks) and `wrap.py` (run code around a module's forward).
"""
