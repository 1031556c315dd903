"""A fault of a data file that says where it is."""


class Fault(ValueError):
    """A message that names the file already."""
