"""Kernel libraries, one file each. Every call into a library is in its file."""
