"""`amt watch` and `amt diff`: look at what runs have written. Both only read, and nothing that a run contains is run.

Start with `run.py` (what a run's folder says); `page.py` draws it, `server.py` serves it, `diff.py` compares two.
"""
