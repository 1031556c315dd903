"""Checkpoints whose weights are codes and scales: which of them are read here, and which are refused by name.

`dense_weights` shows the weights as if the checkpoint held them dense. Training then goes on in the dtype of the run,
and what is exported is dense too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from automodel_trainer.models.files import TensorSlice
from automodel_trainer.models.quantization.dense import Fp8Weight, Mxfp4Weight
from automodel_trainer.models.quantization_config import quantization_in
from automodel_trainer.nn.text import listed

# Methods that are read here. `mxfp8` is fp8 with one power of two for 32 codes.
READ = ("fp8", "mxfp8", "mxfp4", "fbgemm_fp8", "compressed-tensors")
_FLOAT_FORMATS = ("float-quantized", "naive-quantized")  # of compressed-tensors: fp8 codes, a scale each
# Where the scales of a weight are: its name with an ending instead of another one. The first that exists is taken.
_SCALES = (("", "_scale_inv"), ("", "_scale"), (".weight", ".scale"), (".weight", ".qscale_weight"))
_CODES = ("F8_E4M3", "F8_E5M2", "I8")
# Scales of activations and of caches. Training computes both in the dtype of the run.
_UNUSED = re.compile(r"(^|[._])(activation_scale|input_scale|input_scale_ub|qscale_act|output_scale|[kqv]_scale)$")
_PACKED = re.compile(
    r"(_blocks|qweight|qzeros|g_idx|absmax|quant_map|weight_packed|zero_point|quant_state\.\w+|\.SCB)$"
)


def quantization_of(folder: Path) -> dict[str, Any] | None:
    """What a model folder's config.json says about how its weights are quantized; None: they are not.

    Raises:
        ValueError: they are quantized by a method that is not read here. The message says what to do.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text()) if file.is_file() else {}
    except ValueError:
        return None  # whoever reads the config says what is wrong with it
    found = quantization_in(config)
    if found is not None:
        _check_method(found, folder)
    return found


def _check_method(config: Mapping[str, Any], folder: Path) -> None:
    method = config.get("quant_method")
    if method is None:
        method = "bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & config.keys() else "unknown"
    if method not in READ:
        raise ValueError(
            f"{folder} is quantized by {method!r}, which is not read here. Read are: {', '.join(READ)}. Give the "
            "unquantized checkpoint that it was made from; LoRAConfig(quantize='nf4') trains adapters on 4-bit weights."
        )
    if method == "compressed-tensors":
        groups = [g for g in (config.get("config_groups") or {}).values() if isinstance(g, dict)]
        formats = {config.get("format"), *(g.get("format") for g in groups)} - {None}
        weights = [g.get("weights") or {} for g in groups]
        floats = all(w.get("type") == "float" and w.get("num_bits") == 8 for w in weights)
        if not formats <= set(_FLOAT_FORMATS) or not floats:
            raise ValueError(
                f"{folder} is quantized by compressed-tensors in the format {listed(sorted(map(str, formats)))}. Only "
                f"fp8 weights ({', '.join(_FLOAT_FORMATS)}) are read here. Install compressed-tensors, load it by "
                "transformers with CompressedTensorsConfig(dequantize=True), save that, and train from there."
            )


def dense_weights(
    slices: Mapping[str, TensorSlice], quantization: Mapping[str, Any] | None, folder: Path
) -> dict[str, TensorSlice]:
    """The weights of a checkpoint, dense, under the names that an unquantized checkpoint has.

    Nothing is read before a weight, or a part of it, is asked for.

    Args:
        slices: every tensor in the files, by name.
        quantization: what the config says (`quantization_of`); None returns `slices` as they are.
        folder: for error messages.

    Raises:
        ValueError: a weight has no scales, scales do not fit their weight, scales belong to no weight, or the config
            says that weights are quantized and none is.
    """
    if quantization is None:
        return dict(slices)
    block = quantization.get("weight_block_size")
    dense: dict[str, TensorSlice] = {}
    used: set[str] = {name for name in slices if _UNUSED.search(name)}
    for name, codes in slices.items():
        if name.endswith("_blocks") and (scales := f"{name.removesuffix('_blocks')}_scales") in slices:
            dense[name.removesuffix("_blocks")] = Mxfp4Weight(name, codes, slices[scales])
            used |= {name, scales}
        elif codes.get_dtype() in _CODES and (found := _scales_of(name, slices)):
            dense[name] = Fp8Weight(name, codes, slices[found], block)
            used |= {name, found}
    if not dense:
        raise ValueError(
            f"The config of {folder} says that its weights are quantized ({quantization.get('quant_method')}), but "
            "none of its tensors is. If they are dense, take quantization_config out of its config.json."
        )
    rest = {name: part for name, part in slices.items() if name not in used}
    if bare := [name for name, part in rest.items() if part.get_dtype() in _CODES]:
        raise ValueError(f"{folder} holds {listed(bare)} as fp8 codes without scales, so their values are not known.")
    return dense | rest


def _scales_of(name: str, slices: Mapping[str, TensorSlice]) -> str | None:
    names = (name.removesuffix(end) + other for end, other in _SCALES if name.endswith(end))
    return next((found for found in names if found in slices), None)


def check_dense(model: nn.Module) -> None:
    """Refuse a model object whose weights are quantized by another library.

    Raises:
        ValueError: there are such weights; the message names one.
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
            raise ValueError(
                f"The model's {name} is {parameter.dtype}: its weights are quantized, and only dense weights are "
                "trained. Load it without a quantization_config, or give its folder or Hub id; "
                "LoRAConfig(quantize='nf4') trains adapters on 4-bit weights."
            )


def check_leftovers(unused: Collection[str], names: Collection[str], folder: Path) -> None:
    """Refuse codes, and scales beside a weight, that no weight of the model took.

    Args:
        unused: names in the files that the model has no place for.
        names: all names in the files.
        folder: for the error message.

    Raises:
        ValueError: there are such tensors, so the weights beside them are not what their values say.
    """
    if left := sorted(name for name in unused if _PACKED.search(name) or _is_scale(name, names)):
        raise ValueError(
            f"{folder} holds {listed(left)}, which nothing has read: these belong to quantized weights, and its "
            f"config.json does not say how they are quantized. Read are: {', '.join(READ)} (quantization_config). Give "
            "the unquantized checkpoint otherwise."
        )


def _is_scale(name: str, names: Collection[str]) -> bool:
    """Whether there is a weight that this tensor would be the scale of."""
    return any(name.endswith(scale) and name.removesuffix(scale) + end in names for end, scale in _SCALES)
