"""Every use of a private transformers name (transformers 5.23.0), so that an upgrade has one place to look at."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import LoadStateDictConfig

__all__ = ["initialize_module", "load_weights", "original_weight_names", "tied_weight_names"]


def load_weights(model: PreTrainedModel, files: list[Path], device: torch.device) -> tuple[set[str], set[str]]:
    """Stream safetensors files into a model whose parameters lie on meta, plain or DTensor.

    Every parameter becomes real on `device` (a DTensor: its local shard only, sliced out of the file); buffers that no
    checkpoint holds are computed, and tied weights tied.

    Returns:
        names the files lack, and names the model has no place for.
    """
    dtype = next(model.parameters()).dtype
    mapping = get_model_conversion_mapping(model)
    config = LoadStateDictConfig(
        pretrained_model_name_or_path=str(files[0].parent),
        device_map={"": device},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=mapping,
    )
    info, _ = PreTrainedModel._load_pretrained_model(model, None, [str(f) for f in files], config)
    info = PreTrainedModel._finalize_model_loading(model, config, info)
    if info.error_msgs or info.mismatched_keys or info.conversion_errors:
        problems = [*info.error_msgs, *(str(k) for k in info.mismatched_keys), *info.conversion_errors]
        raise ValueError(f"The weights in {files[0].parent} do not fit the model: {'; '.join(map(str, problems))}")
    return set(info.missing_keys), set(info.unexpected_keys)


def initialize_module(model: PreTrainedModel, module: torch.nn.Module) -> None:
    """Fill the parameters and buffers that `module` itself holds with the model's own random initialisation."""
    owner = next((m for m in _submodels(model) if any(module is s for s in m.modules())), model)
    module._is_hf_initialized = False  # type: ignore[assignment]
    owner._initialize_weights(module, owner.is_custom_code())


def _submodels(model: PreTrainedModel) -> list[PreTrainedModel]:
    """Innermost first: a composite's part initialises itself by its own rules."""
    return [m for m in model.modules() if isinstance(m, PreTrainedModel)][::-1]


def tied_weight_names(model: PreTrainedModel) -> dict[str, str]:
    """Name of a tied parameter -> name of the parameter that it shares, for all ties the config asks for."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def original_weight_names(model: PreTrainedModel, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict under the names and in the shapes that the model's checkpoints on disk have."""
    return revert_weight_conversion(model, state_dict)


def converts_weights(model: PreTrainedModel) -> bool:
    """Whether checkpoints on disk name or shape weights otherwise than the model in memory."""
    return bool(getattr(model, "_weight_conversions", None) or get_model_conversion_mapping(model, add_legacy=False))
