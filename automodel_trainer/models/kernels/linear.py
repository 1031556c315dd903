"""Linear layers that multiply through TransformerEngine, in bf16 or fp8; parameters and their names stay.

FP8 formats and delayed scaling, arXiv 2209.05433.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from automodel_trainer.models.kernels.libraries._transformer_engine import (
    MULTIPLES,
    RECIPES,
    LinearKernel,
    check_recipe,
    recipe,
    scaled,
    transformer_engine,
)
from automodel_trainer.models.kernels.linear_layers import block_linear_layers
from automodel_trainer.models.lora.layers import LoRALinear
from automodel_trainer.models.quantization.fp8_layers import Fp8Layers
from automodel_trainer.nn.mixing import mixed


class TELinear(nn.Linear):
    """A linear layer that multiplies with `kernel`. Mixed in by `convert_to_te`."""

    kernel: LinearKernel
    packable = False  # see models/quantization/quantize.py

    def forward(self, x: Tensor) -> Tensor:
        # The bias is added here: layers cut by rows take it away meanwhile, for it is added once and not once per rank.
        y = self.kernel(x, self.weight)
        return y if self.bias is None else y + self.bias


def convert_to_te(model: PreTrainedModel, fp8: str | None) -> tuple[list[str], dict[str, str]]:
    """Make the linear layers in the blocks of `model` (on meta or real, not laid out yet) multiply through
    TransformerEngine, in place. Head and embeddings are left alone.

    Args:
        fp8: None multiplies in the inputs' dtype; "delayed" scales by the largest values of steps before (fastest),
            "current" by those of the tensor itself, "block" by those of blocks of 128.

    Returns:
        names of the layers, and of every other linear layer of the blocks -> why.

    Raises:
        ValueError: not installed, an unknown recipe, a device that has it not, or no layer that suits.
    """
    if fp8 is not None and fp8 not in RECIPES:
        raise ValueError(
            f"fp8={fp8!r} is not for linear='te'. Allowed: {', '.join(RECIPES)}, or null (torchao's recipes are for "
            "linear='torch')."
        )
    transformer_engine("linear='te'")
    if fp8 is not None:
        check_recipe(fp8)
    linear = block_linear_layers(model)
    left = {name: why for name, module in linear.items() if (why := _unsuitable(module, fp8))}
    converted = [name for name in linear if name not in left]
    if not converted:
        found = "; ".join(f"{name}: {why}" for name, why in list(left.items())[:3])
        raise ValueError(
            f"linear='te' would change nothing: {type(model).__name__} has no plain linear layer in its blocks"
            + (f" with sides that are multiples of {MULTIPLES[fp8]}" if fp8 else "")
            + (f" ({found})." if found else ".")
            + " Leave linear at 'torch'."
        )
    for name in converted:
        module = linear[name]
        module.__class__ = TELinear if type(module) is nn.Linear else mixed(LoRALinear, TELinear)  # type: ignore[assignment]
        module.kernel = LinearKernel(fp8)  # type: ignore[assignment]
    if fp8 is not None:
        model.fp8_layers = Fp8Layers(f"TransformerEngine, {fp8}", converted, left, fp8 == "delayed")  # type: ignore[assignment]
    if fp8 == "delayed":
        _scale_once_per_forward(model, recipe(fp8))
    return converted, left


def _scale_once_per_forward(model: PreTrainedModel, scaling: Any) -> None:
    """Scales change when the outermost forward ends, so that has to be the model's."""
    from automodel_trainer.nn.wrap import wrap  # strategies import models

    def forward(original: Any, *args: Any, **kwargs: Any) -> Any:
        with scaled(scaling):
            return original(*args, **kwargs)

    wrap(model, forward)


def _unsuitable(module: nn.Linear, fp8: str | None) -> str | None:
    if fp8 and (module.in_features % MULTIPLES[fp8] or module.out_features % MULTIPLES[fp8]):
        return f"{module.out_features} × {module.in_features}"
    if hasattr(module, "packing"):
        return "its weight is held packed (lora quantize)"
    return None if type(module) in (nn.Linear, LoRALinear) else f"a {type(module).__name__}"
