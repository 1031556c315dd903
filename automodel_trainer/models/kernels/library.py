"""The contract of a kernel library: which parts it offers, where they run, and what they cost.

A library is one object of a subclass of `KernelLibrary`. Those of this project are in `libraries/`, one file each;
`registry.py` finds them. Another package hands its object to `register`, or names it as an entry point of the group
`automodel_trainer.kernels`. Nothing else has to change: the choices of the `kernels:` section, their error messages and
the ledger all ask the registry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from automodel_trainer.models.kernels.dispatch import Dispatcher
from automodel_trainer.models.kernels.mlp import GatedMLP, GateKernel
from automodel_trainer.models.kernels.norm import Norm, NormKernel
from automodel_trainer.models.kernels.rope import RopeKernel

# The parts of a model that libraries have kernels for: fields of `KernelsConfig`, methods of `KernelLibrary`.
PARTS = ("attention", "loss", "norm", "activation", "rope", "linear", "dispatch")  # "experts": no library offers it yet

LinearKernel = Callable[[Tensor, Tensor], Tensor]
LossFunction = Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]
AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]

_DEVICES = {"cuda": "a GPU", "cpu": "a CPU"}


@dataclass(frozen=True)
class Offer:
    """What a library offers for one part of a model.

    Args:
        dtypes: of the inputs that the kernels take; empty: any.
        cuts_graph: the compiler cannot look into the kernel, so a compiled block becomes several graphs around it.
        cost: what else it costs, in a few words for the ledger; empty: nothing.
    """

    dtypes: tuple[torch.dtype, ...] = ()
    cuts_graph: bool = False
    cost: str = ""


@dataclass(frozen=True)
class Fp8Recipe:
    """A way of the `linear` part to multiply in fp8.

    Args:
        multiple: both sides of a weight must be a multiple of it.
        has_history: scales come from earlier forwards, so no forward may run twice in a step.
    """

    multiple: int
    has_history: bool = False


@dataclass(frozen=True)
class LossKernel:
    """A library's loss.

    Args:
        name: of the library, as in YAML.
        function: of hidden `[n, h]`, the head's weight `[v, h]`, its bias `[v]` or None, and targets int64 `[n]`;
            returns the cross-entropy summed over the targets that are not `IGNORE_INDEX`, 0-dim.
    """

    name: str
    function: LossFunction


class KernelLibrary:
    """One library. Subclasses set the attributes, and implement `load` and a method for each part that they offer.

    A method returns a kernel, or a text: the reason why there is no kernel for this layer. The layer then stays as it
    is, and the ledger lists it with the reason. The library is loaded, and this device looked at, before any of these
    methods is called.

    Attributes:
        name: the choice in YAML.
        title: the name in the ledger.
        offers: the parts that it has kernels for (`PARTS`).
        devices: kinds of devices that it runs on.
        requirement: what a user must install, as in "Liger Kernel: pip install liger-kernel".
        recipes: the values of `fp8` that its linear layers take.
    """

    name: str
    title: str
    offers: Mapping[str, Offer]
    devices: tuple[str, ...] = ("cuda",)
    requirement: str = ""
    recipes: Mapping[str, Fp8Recipe] = {}

    def load(self) -> Any:
        """Import the library. Nothing is imported before somebody chooses it.

        Raises:
            ImportError, OSError, RuntimeError: it cannot be imported on this machine.
        """

    def obstacle(self, device: torch.device) -> str | None:
        """Why the library cannot run on this device, as the end of a sentence that begins with its name."""
        if device.type not in self.devices:
            wanted = " or ".join(_DEVICES.get(kind, kind) for kind in self.devices)
            return f"needs {wanted}, and this run is on {device.type}"
        try:
            self.load()
        except (ImportError, OSError, RuntimeError) as error:
            return f"needs {self.requirement or self.title} ({error})"
        return None

    def recipe_obstacle(self, recipe: str) -> str | None:
        """Why this machine cannot multiply by one of `recipes`."""
        return None

    def attention(self) -> AttentionFunction:
        """Causal attention over rows of one document each.

        The function takes what transformers gives an attention function: the module, query `[b, h, s, d]`, key and
        value `[b, h_kv, s, d]`, no mask, and keyword arguments. It returns `[b, s, h, d]`, and attention weights or
        None.
        """
        raise NotImplementedError

    def loss(self) -> LossFunction:
        """The loss of a linear head without all of its logits at once; see `LossKernel`."""
        raise NotImplementedError

    def norm(self, norm: Norm) -> NormKernel | str:
        """A kernel of x `[..., n]`, weight `[n]` and bias `[n]` or None that computes `[..., n]`."""
        raise NotImplementedError

    def activation(self, mlp: GatedMLP) -> GateKernel | str:
        """A kernel of gate and up `[..., n]` that computes act(gate) · up."""
        raise NotImplementedError

    def rope(self) -> RopeKernel:
        """A kernel that rotates q `[b, h, s, d]` and k `[b, h_kv, s, d]` by cos and sin `[b, s, d]`."""
        raise NotImplementedError

    def linear(self, layer: nn.Linear, recipe: str | None) -> LinearKernel | str:
        """A kernel of x `[..., in]` and weight `[out, in]` that computes `[..., out]`, for this layer alone.

        Args:
            recipe: one of `recipes`; None multiplies in the dtype of x.
        """
        raise NotImplementedError

    def dispatch(self, group: ProcessGroup, local: int) -> Dispatcher | str:
        """What carries tokens to experts and back over the ep ranks, or why these ranks cannot have it. Collective.

        Args:
            group: the ep ranks.
            local: the number of experts that each of them holds.
        """
        raise NotImplementedError

    def around_forward(self, recipe: str) -> Callable[[], AbstractContextManager[Any]] | None:
        """A function that makes the context in which the whole model's forward must run, if the recipe needs one."""
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> KernelLibrary:
        return self  # a library is one object, also for a copied model


def within_dtypes(kernel: Callable[..., Any], library: KernelLibrary, part: str) -> Callable[..., Any]:
    """The kernel, wrapped to raise ValueError for dtypes that the library does not offer for this part."""
    allowed = library.offers[part].dtypes
    if not allowed:
        return kernel

    def checked(x: Tensor, *rest: Any) -> Any:
        if x.dtype not in allowed:
            raise ValueError(wrong_dtype(x.dtype, library, part))
        return kernel(x, *rest)

    return checked


def wrong_dtype(dtype: torch.dtype, library: KernelLibrary, part: str) -> str:
    """The message for a dtype that the library does not offer for this part."""
    names = " or ".join(_SHORT.get(one, str(one)) for one in library.offers[part].dtypes)
    return (
        f"kernels {part}={library.name!r}: this kernel computes in {names}, and the run in {dtype}. Set precision to "
        f"{names}, or leave {part} at 'auto'."
    )


_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
