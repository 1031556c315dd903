"""Kernel libraries, one file each: the file has all calls into the library, and a tuple `LIBRARIES` of its objects.

The registry reads this folder, so a new file is all that a new library needs. No file imports its library before
somebody chooses it.
"""
