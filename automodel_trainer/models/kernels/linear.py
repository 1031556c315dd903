"""Linear layers that multiply with a library's kernel, in the dtype of their input or in fp8. Parameters stay."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from automodel_trainer.models.kernels.library import Fp8Recipe, KernelLibrary, LinearKernel, within_dtypes
from automodel_trainer.models.kernels.linear_layers import block_linear_layers
from automodel_trainer.models.lora.layers import LoRALinear
from automodel_trainer.models.quantization.fp8_layers import Fp8Layers
from automodel_trainer.models.quantization.quantize import QuantizedWeights
from automodel_trainer.models.record import record_of
from automodel_trainer.nn.mixing import mixed
from automodel_trainer.nn.wrap import Forward, wrap


class SwappedLinear(nn.Linear):
    """A linear layer that multiplies with `linear_kernel`. Mixed in by `swap_linear_layers`."""

    linear_kernel: LinearKernel
    quantizable = False  # see models/quantization/quantize.py

    def forward(self, x: Tensor) -> Tensor:
        # The bias is added here: layers that are cut by rows remove it, because one rank alone may add it.
        y = self.linear_kernel(x, self.weight)
        return y if self.bias is None else y + self.bias


def swap_linear_layers(
    model: PreTrainedModel, library: KernelLibrary, fp8: str | None
) -> tuple[list[str], dict[str, str]]:
    """Make the linear layers in the blocks of `model` multiply with a library's kernels, in place.

    Head and embeddings are left alone.

    Args:
        model: on meta or real, not laid out yet.
        fp8: one of the library's recipes; None multiplies in the dtype of the input.

    Returns:
        names of the swapped layers; and of every other linear layer of the blocks, with the reason.

    Raises:
        ValueError: an unknown recipe, one that this machine does not have, or no layer that suits.
    """
    recipe = _recipe(library, fp8)
    linear = block_linear_layers(model)
    swapped: list[str] = []
    left: dict[str, str] = {}
    for name, layer in linear.items():
        kernel = _unsuitable(layer, recipe) or library.linear(layer, fp8)
        if isinstance(kernel, str):
            left[name] = kernel
            continue
        layer.__class__ = SwappedLinear if type(layer) is nn.Linear else mixed(LoRALinear, SwappedLinear)  # type: ignore[assignment]
        layer.linear_kernel = within_dtypes(kernel, library, "linear")  # type: ignore[assignment]
        swapped.append(name)
    if not swapped:
        raise ValueError(_nothing_suits(model, library, recipe, left))
    if fp8 is not None and recipe is not None:
        record_of(model).keep(Fp8Layers(f"{library.title}, {fp8}", swapped, left, recipe.has_history))
        if (context := library.around_forward(fp8)) is not None:
            wrap(model, partial(_inside, context))
    return swapped, left


def _recipe(library: KernelLibrary, fp8: str | None) -> Fp8Recipe | None:
    if fp8 is None:
        return None
    choice = f"linear={library.name!r}"
    if fp8 not in library.recipes:
        allowed = ", ".join([*library.recipes, "null"]) if library.recipes else "null"
        raise ValueError(
            f"fp8={fp8!r} is not for {choice}. Allowed: {allowed} (torchao's recipes are for linear='torch')."
        )
    if (obstacle := library.recipe_obstacle(fp8)) is not None:
        raise ValueError(f"fp8={fp8!r} with {choice}: {obstacle}. Set fp8 to null.")
    return library.recipes[fp8]


def _unsuitable(layer: nn.Linear, recipe: Fp8Recipe | None) -> str | None:
    if recipe and (layer.in_features % recipe.multiple or layer.out_features % recipe.multiple):
        return f"{layer.out_features} × {layer.in_features}"
    if isinstance(layer, QuantizedWeights):
        return "its weight is held quantized (lora quantize)"
    return None if type(layer) in (nn.Linear, LoRALinear) else f"a {type(layer).__name__}"


def _nothing_suits(
    model: PreTrainedModel, library: KernelLibrary, recipe: Fp8Recipe | None, left: dict[str, str]
) -> str:
    found = "; ".join(f"{name}: {why}" for name, why in list(left.items())[:3])
    return (
        f"linear={library.name!r} would change nothing: {type(model).__name__} has no plain linear layer in its blocks"
        + (f" with sides that are multiples of {recipe.multiple}" if recipe else "")
        + (f" ({found})." if found else ".")
        + " Leave linear at 'torch'."
    )


def _inside(context: Any, forward: Forward, *args: Any, **kwargs: Any) -> Any:
    with context():
        return forward(*args, **kwargs)
