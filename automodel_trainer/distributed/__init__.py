"""Processes and the mesh they form. Nothing here knows what a model is trained for.

Start with `mesh.py` (sizes of the parallel axes, and the DeviceMesh), then read `agreement.py` (ranks decide together).
"""
