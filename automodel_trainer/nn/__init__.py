"""Building blocks of torch that know nothing of this project: no config, no strategy, no LightningModule.

Start with `blocks.py` (which modules are a model's blocks) and `wrap.py` (put something around a module's forward).
"""
