"""Conversations with pictures: from rows to the inputs of a vision-language model.

`given.py` takes rows as people give them, `rows.py` finds the pictures and videos of a row, `files.py` and `videos.py`
read them, `encode.py` plans the tokens of a sample from their sizes alone, `store.py` keeps the plan, and `collate.py`
makes tensors of real pictures in the loader's workers.
"""
