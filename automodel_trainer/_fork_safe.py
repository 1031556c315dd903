"""Import torchao without initializing CUDA (torchao 0.18, torch 2.11-2.13).

Where CUDA is initialized, forked workers cannot use it, and the ranks of a notebook are forked. transformers imports
torchao if it is installed, and while torchao is imported it asks for the GPU's capability. NVML, a library of the
driver, answers that and initializes nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import Any

PACKAGE = "torchao"


def leave_cuda_alone() -> None:
    """Let imports of torchao ask NVML, and torch too when it is asked whether there is a GPU."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # importing Lightning sets it as well
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """On `sys.meta_path`: finds modules of the package, and has them run with answers from NVML."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.partition(".")[0] != PACKAGE:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module
            spec.loader.exec_module = partial(_run, run)  # type: ignore[method-assign]
        return spec


def _run(run: Callable[[ModuleType], None], module: ModuleType) -> None:
    with _answers():
        run(module)


@contextmanager
def _answers() -> Iterator[None]:
    """A context in which the GPU's capability is known without CUDA.

    Modules that are imported here may keep the two functions, which ask torch again afterwards.
    """
    import torch
    from torch.utils import _triton

    asked, has_triton = torch.cuda.get_device_capability, _triton.has_triton
    known = None if getattr(asked, "_by_nvml", False) else _capability()
    if known is None:
        yield
        return
    inside = True

    def get_device_capability(device: Any = None) -> tuple[int, int]:
        return known if inside and not torch.cuda.is_initialized() else asked(device)

    def has_triton_here() -> bool:
        if not inside or torch.cuda.is_initialized():
            return has_triton()  # type: ignore[no-any-return]
        return known >= (7, 0) and find_spec("triton") is not None

    get_device_capability._by_nvml = True  # type: ignore[attr-defined]
    torch.cuda.get_device_capability, _triton.has_triton = get_device_capability, has_triton_here  # type: ignore[assignment]
    try:
        yield
    finally:
        inside = False
        torch.cuda.get_device_capability, _triton.has_triton = asked, has_triton


def _capability() -> tuple[int, int] | None:
    """What NVML says of the first visible GPU; None: there is none, CUDA is initialized, or NVML does not say."""
    from ctypes import CDLL, byref, c_int, c_void_p

    import torch

    if torch.version.cuda is None or torch.cuda.is_initialized() or not torch.cuda.is_available():
        return None
    try:
        nvml, index = CDLL("libnvidia-ml.so.1"), torch.cuda._get_nvml_device_index(0)
    except (OSError, RuntimeError, IndexError):
        return None
    device, major, minor = c_void_p(), c_int(), c_int()
    failed = (
        nvml.nvmlInit_v2()
        or nvml.nvmlDeviceGetHandleByIndex_v2(index, byref(device))
        or nvml.nvmlDeviceGetCudaComputeCapability(device, byref(major), byref(minor))
    )
    return None if failed else (major.value, minor.value)
