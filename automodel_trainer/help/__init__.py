"""What `amt fit --help` and its like print. `docs/help_texts.py` writes the files."""
