"""The command-line tools behind `amt`. Each file has a `main` that `cli.py` calls."""
