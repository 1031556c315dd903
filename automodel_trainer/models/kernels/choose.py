"""Applies the `kernels:` section to a model. Every choice is resolved once and noted in the model's record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from automodel_trainer.models.kernels.attention import flex_obstacle, install_attention_kernel
from automodel_trainer.models.kernels.config import FASTEST, PLAIN, KernelsConfig
from automodel_trainer.models.kernels.experts import experts_to_fp8, swap_experts
from automodel_trainer.models.kernels.fp8 import RECIPES, convert_to_fp8
from automodel_trainer.models.kernels.library import PARTS, KernelLibrary, LossKernel, within_dtypes
from automodel_trainer.models.kernels.linear import swap_linear_layers
from automodel_trainer.models.kernels.linear_layers import block_linear_layers
from automodel_trainer.models.kernels.mlp import swap_gated_mlps
from automodel_trainer.models.kernels.norm import swap_norms
from automodel_trainer.models.kernels.registry import find, libraries
from automodel_trainer.models.kernels.rope import restore_rope, rope_obstacle, swap_rope
from automodel_trainer.models.kernels.tower_attention import TITLE, install_tower_attention
from automodel_trainer.models.lora.fuse import Fusion
from automodel_trainer.models.lora.layers import adapters
from automodel_trainer.models.record import record_of, recorded
from automodel_trainer.nn.shared_input import layers_with_one_input

_COMPILED = ("norm", "activation", "rope")  # parts that the compiler fuses, unless a library computes them


@dataclass(frozen=True)
class KernelsInUse:
    """The kernels that a model computes with. `apply_kernels` keeps them in the model's record.

    Args:
        chosen: part -> the choice, as in YAML. Attention can be "auto": transformers then chooses. So can dispatch: the
            layout then chooses.
        texts: part -> what computes it, for the ledger. Attention and fp8 have lines of their own there.
        loss: a library's loss; None means the one in `modules/loss.py`.
    """

    chosen: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    loss: LossKernel | None = None

    def costs(self, compiled: bool) -> dict[str, str]:
        """Part -> what its library costs, in words. Parts without a cost are left out.

        Args:
            compiled: whether the run compiles its blocks.
        """
        costs: dict[str, str] = {}
        for part, name in self.chosen.items():
            if (library := find(part, name)) is not None:
                offer = library.offers[part]
                cuts = "compiled blocks are cut there" if compiled and offer.cuts_graph else ""
                costs |= {part: text} if (text := "; ".join(filter(None, (cuts, offer.cost)))) else {}
        return costs


@dataclass(frozen=True)
class Choice:
    """The resolved choice for one part.

    Args:
        library: the kernel library; None for a built-in choice and for transformers' names for attention.
        is_auto: the user left it at "auto", so another choice may replace it if it does not fit.
    """

    part: str
    name: str
    library: KernelLibrary | None
    is_auto: bool

    def __str__(self) -> str:
        return f"{self.part}={self.name!r}"


def apply_kernels(model: PreTrainedModel, kernels: KernelsConfig, device: torch.device) -> KernelsInUse:
    """Make `model`, not laid out yet, compute with these kernels on `device`.

    Returns:
        what was chosen, which is also kept in the model's record.

    Raises:
        ValueError: a kernel that this device or model does not have.
    """
    choices = _choices(kernels, device)
    _choose_attention(model, choices["attention"], device)
    choices["experts"], experts, swapped = _choose_experts(model, kernels, device)
    together = _layers_with_one_input(model, kernels, device)  # before kernels of libraries, which it cannot run
    loss = choices["loss"]
    texts = {"loss": _LOSSES.get(loss.name) or _title(loss)}
    chosen_here = choices["attention"].is_auto or choices["attention"].library is not None
    if chosen_here and install_tower_attention(model, device):
        texts["attention of the tower"] = TITLE
    for part in _COMPILED:
        choices[part], texts[part] = _swap_or_leave(model, choices[part], device)
    texts["linear"] = _choose_linear(model, choices["linear"], kernels, device, together)
    if swapped and kernels.fp8 in RECIPES:
        experts += _experts_in_fp8(model, swapped, device)
    texts |= {"experts": experts} if experts else {}
    in_use = KernelsInUse({part: choice.name for part, choice in choices.items()}, texts, _loss_kernel(loss))
    record_of(model).keep(in_use)
    record_of(model).keep(Fusion(kernels.lora, together if _fuses_lora(kernels, device) else None))
    return in_use


def kernels_in_use(model: nn.Module) -> KernelsInUse:
    """The kernels that `model` computes with. The answer is empty if `apply_kernels` was not called on it."""
    return recorded(model, KernelsInUse) or KernelsInUse()


def check_compiled(kernels: KernelsConfig, compiles: bool) -> None:
    """Check that a run which does not compile its blocks chooses nothing that needs compiled blocks.

    Args:
        kernels: the `kernels:` section.
        compiles: whether the run compiles blocks.

    Raises:
        ValueError: a choice needs compiled blocks.
    """
    asked = [part for part in _COMPILED if getattr(kernels, part) == "compile"]
    asked += ["lora"] if kernels.lora == "fused" else []
    if asked and not compiles:
        raise ValueError(
            f"kernels {asked[0]}={getattr(kernels, asked[0])!r} needs compiled blocks, and this run does not compile "
            "them (compile=False, or no GPU). Leave it at 'auto'."
        )


def _choices(kernels: KernelsConfig, device: torch.device) -> dict[str, Choice]:
    """Resolve every part's choice before the model is changed, and check that the libraries can run here."""
    on_device = kernels.on(device)
    found = {}
    for part in PARTS:
        name, is_auto = getattr(on_device, part), getattr(kernels, part) == "auto"
        choice = Choice(part, name, find(part, name), is_auto)
        if choice.library is not None and (obstacle := choice.library.obstacle(device)) is not None:
            if not is_auto:
                raise ValueError(f"{choice} {obstacle}. Leave it at 'auto'.")
            choice = Choice(part, PLAIN[part], None, is_auto)
        found[part] = choice
    return found


def _choose_attention(model: PreTrainedModel, choice: Choice, device: torch.device) -> None:
    if choice.library is not None:
        install_attention_kernel(model, choice.name)
    elif not choice.is_auto:
        model.set_attn_implementation(choice.name)
    elif device.type == "cuda" and flex_obstacle(model) is None:
        install_attention_kernel(model, FASTEST["attention"])


_LOSSES = {"chunked": "a chunk of logits at a time", "whole": "all logits at once"}


def _loss_kernel(choice: Choice) -> LossKernel | None:
    return None if choice.library is None else LossKernel(choice.name, choice.library.loss())


def _swap_or_leave(model: PreTrainedModel, choice: Choice, device: torch.device) -> tuple[Choice, str]:
    """The choice that the model ends up with, and the ledger's text."""
    if choice.library is not None:
        try:
            return choice, _SWAPS[choice.part](model, choice, choice.library, device)
        except ValueError:
            if not choice.is_auto:
                raise
            choice = Choice(choice.part, PLAIN[choice.part], None, is_auto=True)
    if choice.part == "rope":
        restore_rope(model)
    return choice, "the model's own"


def _swap_norms(model: PreTrainedModel, choice: Choice, library: KernelLibrary, device: torch.device) -> str:
    return _described(model, choice, "norms", *swap_norms(model, _checked(library, "norm")))


def _swap_activations(model: PreTrainedModel, choice: Choice, library: KernelLibrary, device: torch.device) -> str:
    return _described(model, choice, "gated MLPs", *swap_gated_mlps(model, _checked(library, "activation")))


def _swap_rope(model: PreTrainedModel, choice: Choice, library: KernelLibrary, device: torch.device) -> str:
    if (obstacle := rope_obstacle(model)) is not None:
        raise ValueError(f"{choice} does not fit: {obstacle}. Leave it at 'auto'.")
    kernel = within_dtypes(library.rope(), library, "rope")
    return f"{library.title} ({', '.join(swap_rope(model, kernel, device))})"


_SWAPS: dict[str, Callable[[PreTrainedModel, Choice, KernelLibrary, torch.device], str]] = {
    "norm": _swap_norms,
    "activation": _swap_activations,
    "rope": _swap_rope,
}


def _checked(library: KernelLibrary, part: str) -> Callable[[Any], Any]:
    """The library's method for a part, whose kernels then refuse dtypes that the library does not take."""
    return partial(_make, getattr(library, part), library, part)


def _make(factory: Callable[[Any], Any], library: KernelLibrary, part: str, layer: Any) -> Any:
    kernel = factory(layer)
    return kernel if isinstance(kernel, str) else within_dtypes(kernel, library, part)


def _choose_linear(
    model: PreTrainedModel, choice: Choice, kernels: KernelsConfig, device: torch.device, together: list[list[str]]
) -> str:
    if choice.library is not None:
        return _described(model, choice, "layers", *swap_linear_layers(model, choice.library, kernels.fp8))
    if kernels.fp8 is None:
        return choice.name
    for library in [] if kernels.fp8 in RECIPES else libraries():
        if kernels.fp8 in library.recipes:
            raise ValueError(
                f"fp8={kernels.fp8!r} is a recipe of {library.title}: set linear={library.name!r}. With "
                f"linear={choice.name!r}: {', '.join(RECIPES)}."
            )
    convert_to_fp8(model, kernels.fp8, device, all_gather=kernels.fp8_all_gather, together=together)
    return choice.name


def _choose_experts(
    model: PreTrainedModel, kernels: KernelsConfig, device: torch.device
) -> tuple[Choice, str, list[str]]:
    """The choice that the model ends up with, the ledger's text (empty if there are no experts), and their names."""
    is_auto = kernels.experts == "auto"
    choice = Choice("experts", kernels.on(device).experts, None, is_auto)
    if choice.name == "transformers":
        return choice, "", []
    swapped, left = swap_experts(model)
    if not swapped and is_auto:
        return Choice("experts", PLAIN["experts"], None, is_auto), "", []
    return choice, _described(model, choice, "modules of experts", swapped, left), swapped


def _experts_in_fp8(model: PreTrainedModel, names: list[str], device: torch.device) -> str:
    """Make experts multiply in fp8; what the ledger adds about it."""
    if torch.cuda.get_device_capability(device) < (9, 0):
        return "; not in fp8: grouped matmuls in fp8 need a GPU of the Hopper kind or later"
    left = experts_to_fp8(model, names)
    kept = "".join(f", not {name} ({why})" for name, why in list(left.items())[:3])
    return (f"; {len(names) - len(left)} in fp8 by rows" if len(left) < len(names) else "; none in fp8") + kept


def _described(model: PreTrainedModel, choice: Choice, kind: str, swapped: list[str], left: dict[str, str]) -> str:
    """The ledger's text for a swapped part; raises ValueError if nothing was swapped and the user asked for it."""
    shown = ", ".join(f"{name} ({why})" for name, why in list(left.items())[:3])
    shown += f" and {len(left) - 3} more" if len(left) > 3 else ""
    if not swapped:
        found = f": {shown}" if left else ""
        what = f"{type(model).__name__} has no {kind} that it can compute"
        raise ValueError(f"{choice} would change nothing: {what}{found}. Leave it at 'auto'.")
    return f"{_title(choice)} ({len(swapped)} {kind})" + (f"; not {shown}" if left else "")


def _title(choice: Choice) -> str:
    return choice.name if choice.library is None else choice.library.title


def _fuses_lora(kernels: KernelsConfig, device: torch.device) -> bool:
    return kernels.lora == "fused" or (kernels.lora == "auto" and device.type == "cuda")


def _layers_with_one_input(model: PreTrainedModel, kernels: KernelsConfig, device: torch.device) -> list[list[str]]:
    """Names of the linear layers that may be computed together, grouped by their input."""
    names = {adapter.target for adapter in adapters(model) if adapter.is_linear and _fuses_lora(kernels, device)}
    if kernels.fp8 in RECIPES:
        names.update(block_linear_layers(model))
    return layers_with_one_input(model, [name for name, _ in model.named_modules() if name in names])
