"""The kernels that a model computes with: one file for each part of a model, one file for each library.

Start with `config.py` (the `kernels:` section) and `choose.py` (how each choice is applied). `library.py` is the
contract of a kernel library; `registry.py` finds libraries, in `libraries/` and in other packages.
"""

from automodel_trainer.models.kernels.choose import KernelsInUse, apply_kernels, check_compiled, kernels_in_use
from automodel_trainer.models.kernels.config import KernelsConfig
from automodel_trainer.models.kernels.library import Fp8Recipe, KernelLibrary, Offer
from automodel_trainer.models.kernels.registry import register

__all__ = [
    "Fp8Recipe",
    "KernelLibrary",
    "KernelsConfig",
    "KernelsInUse",
    "Offer",
    "apply_kernels",
    "check_compiled",
    "kernels_in_use",
    "register",
]
