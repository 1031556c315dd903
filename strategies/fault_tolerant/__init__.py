"""Replica groups that may drop out and come back while the others train (torchft). Open `strategy.py` first."""
