"""`amt launch`: complete files for schedulers. Start with `command.py`; `job.py` holds what all files share."""
