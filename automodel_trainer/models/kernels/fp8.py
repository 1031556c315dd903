"""Linear layers that multiply in fp8, by torchao.

torchao casts trained weights in every forward, as it casts inputs and gradients. Under FSDP2 they are cast before they
are gathered (`strategies/data_parallel/fp8_gather.py`). The frozen weights under adapters are cast once, when they are
read, and held in fp8 (`models/quantization/fp8_weight.py`).

Source: torchao.float8; FP8 formats, arXiv 2209.05433.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from automodel_trainer.models.kernels.linear_layers import block_linear_layers
from automodel_trainer.models.lora import lora_of
from automodel_trainer.models.lora.layers import LoRALinear
from automodel_trainer.models.quantization.fp8_layers import TENSORWISE, Fp8Layers
from automodel_trainer.models.quantization.fp8_shared_input import multiply_together
from automodel_trainer.models.quantization.fp8_weight import MULTIPLE
from automodel_trainer.models.quantization.quantize import quantize_linear
from automodel_trainer.models.record import record_of
from automodel_trainer.nn.shared_input import blocks_of, layers_with_one_input

RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")


def convert_to_fp8(
    model: PreTrainedModel,
    recipe: str,
    device: torch.device,
    *,
    emulate: bool = False,
    all_gather: bool | str = "auto",
    together: Sequence[Sequence[str]] | None = None,
) -> Fp8Layers:
    """Make the linear layers in the blocks of `model` (on meta or real, not laid out yet) multiply in fp8, in place.

    Names and shapes of parameters stay; head and embeddings are left alone. In a model with adapters the frozen weights
    become fp8. Nothing else needs them in full precision: a merge reads the base checkpoint again.

    Args:
        recipe: "tensorwise" (fastest), "rowwise" (more exact), "rowwise_with_gw_hp" (gradients of weights in bf16).
        device: that will compute.
        emulate: compute the same in fp32, for a device without fp8.
        all_gather: whether FSDP2 gathers trained weights in fp8: "auto" (if it can), True (or an error), or False.
        together: names of layers that share an input; None: they are found here.

    Raises:
        ValueError: an unknown recipe; no torchao; a device without fp8; no layer whose shape suits; adapters that
            start from the frozen weights (PiSSA); or `all_gather=True` for weights that have several scales or are
            frozen.
    """
    if recipe not in RECIPES:
        raise ValueError(f"fp8={recipe!r} is unknown. Allowed: {', '.join(RECIPES)}, or null for none.")
    if not emulate and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)):
        raise ValueError(f"fp8={recipe!r} needs an NVIDIA GPU of the Ada, Hopper or a later kind. Set fp8 to null.")
    lora = lora_of(model)
    if lora is not None and lora.init == "pissa":
        raise ValueError(
            f"fp8={recipe!r} casts frozen weights as they are read, and lora init='pissa' would change them later. Set "
            "fp8 to null, or init to 'kaiming'."
        )
    linear = block_linear_layers(model)
    left = {name: why for name, module in linear.items() if (why := _unsuitable(module))}
    converted = [name for name in linear if name not in left]
    if not converted:
        raise ValueError(
            f"fp8={recipe!r} would change nothing: {type(model).__name__} has no linear layer in its blocks with sides "
            f"that are multiples of {MULTIPLE}" + (f" ({_some(left)})." if left else ".") + " Set fp8 to null."
        )
    frozen = [name for name in converted if lora is not None and not linear[name].weight.requires_grad]
    trained = [name for name in converted if name not in frozen]
    _cast_on_the_fly(model, recipe, set(trained), emulate)
    quantize_linear(model, frozen, f"fp8-{recipe.partition('_')[0]}")
    layers = Fp8Layers(recipe, converted, left, frozen=frozen, all_gather=all_gather)
    if all_gather is True and not layers.gatherable:
        why = "these weights are frozen, and held in fp8 anyway" if frozen else "its weights have a scale for every row"
        raise ValueError(f"fp8_all_gather=true with fp8={recipe!r}: {why}. Leave it at 'auto', or use 'tensorwise'.")
    record_of(model).keep(layers)
    if recipe == TENSORWISE:
        _group(model, set(trained), layers_with_one_input(model, trained) if together is None else together)
    return layers


def _cast_on_the_fly(model: PreTrainedModel, recipe: str, names: set[str], emulate: bool) -> None:
    if not names:
        return
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ValueError(f"fp8={recipe!r} needs torchao: pip install 'automodel-trainer[fp8]'.") from error
    config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)
    convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: name in names)


def _group(model: PreTrainedModel, names: set[str], groups: Sequence[Sequence[str]]) -> None:
    blocks = blocks_of(model)
    for together in groups:
        layers: dict[int | None, list[nn.Module]] = {}
        for layer in (model.get_submodule(name) for name in together if name in names):
            layers.setdefault(blocks.get(id(layer)), []).append(layer)
        for members in layers.values():
            multiply_together(members)


def _unsuitable(module: nn.Linear) -> str | None:
    if module.in_features % MULTIPLE or module.out_features % MULTIPLE:
        return f"{module.out_features} × {module.in_features}"
    return None if type(module) in (nn.Linear, LoRALinear) else f"a {type(module).__name__}"


def _some(left: dict[str, str]) -> str:
    shown = [f"{name}: {why}" for name, why in list(left.items())[:3]]
    return ", ".join(shown) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
