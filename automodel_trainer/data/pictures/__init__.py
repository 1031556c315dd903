"""Conversations with pictures: from rows to the inputs of a vision-language model.

`rows.py` finds the pictures of a row, `files.py` reads them, `encode.py` plans the tokens of a sample from the sizes of
its pictures alone, `store.py` keeps the plan, and `collate.py` makes tensors of real pictures in the loader's workers.
"""
