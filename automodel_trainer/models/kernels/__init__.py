"""What a model computes with: one file for each part of a model, one file for each library.

Start with `choose.py`: the `kernels:` section, and how each choice is applied. Each library is in `libraries/`.
"""

from automodel_trainer.models.kernels.choose import KernelsConfig, apply_kernels

__all__ = ["KernelsConfig", "apply_kernels"]
