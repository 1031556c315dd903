"""Numbers that mean the same in every package."""

IGNORE_INDEX = -100  # the label of a token that is not trained; Hugging Face's and torch's
