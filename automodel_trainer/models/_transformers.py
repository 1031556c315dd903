"""Every use of a private name of transformers (5.23.0), so that an upgrade has one file to check."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    _dtensor_from_local_like,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig

from automodel_trainer.models.files import TensorSlice
from automodel_trainer.nn.text import first_line, listed
from automodel_trainer.nn.towers import tower_of

__all__ = [
    "attention_in_use",
    "forget_absent_ties",
    "forget_initialized",
    "initialize_module",
    "load_weights",
    "original_weight_names",
    "read_generation_config",
    "tie_weights",
    "tied_weight_names",
]


@dataclass(frozen=True)
class LoadedWeights:
    """What `load_weights` found.

    Args:
        missing: names that the files lack.
        unexpected: names in the files that the model has no place for, without those it is known to ignore.
        unused: all names in the files that the model has no place for.
    """

    missing: set[str]
    unexpected: set[str]
    unused: set[str]


def load_weights(
    model: PreTrainedModel,
    files: list[Path],
    device: torch.device,
    added: Set[str] = frozenset(),
    in_turn: bool = False,
    tensors: Mapping[str, TensorSlice] | None = None,
) -> LoadedWeights:
    """Stream safetensors files into a model whose parameters are on meta, plain tensors or DTensors.

    Every parameter becomes real on `device`. For a DTensor only the local shard is read from the file. Buffers that no
    checkpoint holds are computed, and tied weights are tied.

    Args:
        model: laid out, or not.
        files: the safetensors files of the checkpoint.
        device: where parameters go.
        added: names of parameters that these files do not hold. They become real and stay uninitialized (adapters),
            unless they are real already.
        in_turn: read one weight at a time, for modules that quantize theirs: only one is then held in full precision.
        tensors: read these instead of what the files hold, for files with codes and scales (`dense_weights`).

    Raises:
        ValueError: a weight does not have the model's shape.
    """
    dtype = next(model.parameters()).dtype
    mapping = _conversions(model)
    config = LoadStateDictConfig(
        pretrained_model_name_or_path=str(files[0].parent),
        device_map={"": device},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=mapping,  # type: ignore[arg-type]
    )
    with _environment("HF_DEACTIVATE_ASYNC_LOAD", "1" if in_turn else None):
        given = None if tensors is None else dict(tensors)
        info, _ = PreTrainedModel._load_pretrained_model(model, given, [str(f) for f in files], config)
    unused = set(info.unexpected_keys)
    _materialize(model, added, device)
    info.missing_keys -= added
    if info.mismatched_keys:
        shapes = [f"{name} is {list(there)}, and should be {list(here)}" for name, there, here in info.mismatched_keys]
        raise ValueError(
            f"The weights in {files[0].parent} do not fit the model of its config: {listed(sorted(shapes))}. Copy both "
            "from the same place again."
        )
    info = PreTrainedModel._finalize_model_loading(model, config, info)
    if info.error_msgs or info.mismatched_keys or info.conversion_errors:
        problems = [*info.error_msgs, *(str(k) for k in info.mismatched_keys), *info.conversion_errors]
        raise ValueError(f"The weights in {files[0].parent} do not fit the model: {'; '.join(map(str, problems))}")
    return LoadedWeights(set(info.missing_keys), set(info.unexpected_keys), unused)


@contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    """A context in which an environment variable has this value. None leaves it as it is."""
    before = os.environ.get(name)
    if value is not None:
        os.environ[name] = value
    yield
    if value is not None:
        os.environ.pop(name)
        os.environ.update({} if before is None else {name: before})


def _materialize(model: PreTrainedModel, names: Set[str], device: torch.device) -> None:
    for name in names:
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        meta = module._parameters[key]
        assert meta is not None
        if not meta.is_meta:
            continue
        local = meta.to_local() if isinstance(meta, DTensor) else meta
        value = torch.empty_like(local, device=device)
        if isinstance(meta, DTensor):
            value = _dtensor_from_local_like(value, meta)
        parameter = torch.nn.Parameter(value, requires_grad=meta.requires_grad)
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        setattr(module, key, parameter)


def initialize_module(model: PreTrainedModel, module: torch.nn.Module) -> None:
    """Fill the parameters and buffers that `module` itself holds with the model's own random initialisation."""
    owner = next((m for m in _submodels(model) if any(module is s for s in m.modules())), model)
    module._is_hf_initialized = False  # type: ignore[assignment]
    owner._initialize_weights(module, owner.is_custom_code())


def forget_initialized(module: torch.nn.Module) -> None:
    """Let `initialize_module` fill parameters of `module` that transformers has already filled."""
    for parameter in module.parameters(recurse=False):
        parameter._is_hf_initialized = False  # type: ignore[attr-defined]


def _submodels(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The models inside a model, innermost first. Each part of a composite model is initialised by its own rules."""
    return [m for m in model.modules() if isinstance(m, PreTrainedModel)][::-1]


def tied_weight_names(model: PreTrainedModel) -> dict[str, str]:
    """Name of a tied parameter -> name of the parameter that it shares, for all ties the config asks for."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def forget_absent_ties(model: PreTrainedModel) -> None:
    """Drop the ties of parameters that the model does not have, or no longer has."""
    held = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if ties := tied_weight_names(model):
        model.all_tied_weights_keys = {a: b for a, b in ties.items() if a in held and b in held}


def forget_ties(model: PreTrainedModel) -> None:
    """Let no weights of a model be tied from now on. Parameters that are shared stay so until they are replaced."""
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def read_generation_config(
    model: PreTrainedModel, folder: Path, given: GenerationConfig | None, trust_remote_code: bool
) -> None:
    """Give a model the generation config of its folder, or a copy of the `given` one, as `from_pretrained` does.

    Args:
        model: that can generate.
        folder: of the model.
        given: replaces the folder's.
        trust_remote_code: use a `generate` of the folder's own.

    Raises:
        ValueError: the folder's is damaged, or transformers refuses it.
    """
    if given is not None:
        model.generation_config = GenerationConfig.from_dict(given.to_dict())
    elif (folder / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except OSError as error:
            raise ValueError(f"{first_line(error)} Copy it again, or remove it.") from error
        except ValueError as error:
            raise ValueError(
                f"{folder / 'generation_config.json'} is invalid: {error} Correct it, or remove it."
            ) from error
    elif (folder / "config.json").is_file():  # older checkpoints keep their settings there
        options: Any = {"config_file_name": "config.json", "_from_model_config": True}
        model.generation_config = GenerationConfig.from_pretrained(folder, **options)
    if trust_remote_code and (folder / "custom_generate" / "generate.py").is_file():
        generating: Any = model
        own = generating.load_custom_generate(str(folder), trust_remote_code=True)
        generating.generate = partial(own, model=model)


def tie_weights(model: PreTrainedModel) -> None:
    """Tie the parameters that `tied_weight_names` lists."""
    model.tie_weights(recompute_mapping=False)


def original_weight_names(model: PreTrainedModel, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with the names and shapes of the model's checkpoints on disk."""
    with _own_classes(model), _found_in(model, state_dict):
        return revert_weight_conversion(model, state_dict)


def _conversions(model: PreTrainedModel, add_legacy: bool = True) -> list[Any]:
    """How names and shapes on disk become those of a model, sharded or not."""
    with _own_classes(model):
        return get_model_conversion_mapping(model, add_legacy=add_legacy)


@contextmanager
def _own_classes(model: PreTrainedModel) -> Iterator[None]:
    """A context in which sharded models have the names of their own classes, by which transformers finds conversions.

    FSDP2 puts a class of its own before the model's, which transformers takes for code of a user, without conversions.
    """
    kinds = {type(m) for m in model.modules() if isinstance(m, FSDPModule) and isinstance(m, PreTrainedModel)}
    before = {kind: (kind.__name__, kind.__module__) for kind in kinds}
    for kind in kinds:
        own = next(base for base in kind.__mro__[1:] if base is not FSDPModule)
        kind.__name__, kind.__module__ = own.__name__, own.__module__
    try:
        yield
    finally:
        for kind, (name, module) in before.items():
            kind.__name__, kind.__module__ = name, module


@contextmanager
def _found_in(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """A context in which a model gives these as its parameters, of which a pipeline stage lacks those of the others."""
    own: Any = model.get_parameter
    model.get_parameter = lambda name: tensors[name] if name in tensors else own(name)  # type: ignore
    try:
        yield
    finally:
        del model.get_parameter


def converts_weights(model: PreTrainedModel) -> bool:
    """Whether checkpoints on disk have other names or shapes than the model in memory."""
    return bool(getattr(model, "_weight_conversions", None) or _conversions(model, add_legacy=False))


def places_of(model: PreTrainedModel, names: Iterable[str], converted: bool = True) -> dict[str, str]:
    """Where a model would put tensors of a checkpoint: name in the files -> name in the model, of those it takes.

    Args:
        names: of tensors in the files.
        converted: also those that it computes something else of, beside another name.
    """
    mapping = _conversions(model)
    renamings = [step for step in mapping if isinstance(step, WeightRenaming)]
    converters = [step for step in mapping if isinstance(step, WeightConverter)]
    held = model.state_dict()
    found = {}
    for name in names:
        place, conversion = rename_source_key(name, renamings, converters, model.base_model_prefix, held)
        if (place in held or name in held) and (converted or conversion is None):
            found[name] = place if place in held else name
    return found


def ignores(model: PreTrainedModel, name: str) -> bool:
    """Whether a model leaves a tensor of this name in a checkpoint alone without a word."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)


def attention_in_use(model: PreTrainedModel) -> str:
    """The name of the attention kernel of the language model inside, as `attn_implementation` takes it."""
    return attention_of(model.config.get_text_config())


def attention_of(config: PreTrainedConfig) -> str:
    """The name of the attention kernel that a config asks for."""
    return str(getattr(config, "_attn_implementation", None) or "eager")


def set_attention(config: PreTrainedConfig, name: str) -> None:
    """Let the modules of a config attend with a kernel, which is registered already."""
    config._attn_implementation = name


def experts_in_use(model: PreTrainedModel) -> str | None:
    """The name of the implementation of transformers that computes the experts; None for a model without any."""
    named = any(hasattr(module, "_apply_gate") for module in model.modules())
    return str(getattr(model.config.get_text_config(), "_experts_implementation", None) or "eager") if named else None


def unused_balancing_loss(model: PreTrainedModel) -> str | None:
    """The configured coefficient of a routers' balancing loss that the model does not compute; None if it does."""
    config = model.config.get_text_config()
    named = {k: v for k, v in config.to_dict().items() if "aux_loss" in k and isinstance(v, int | float) and v}
    if not named or getattr(config, "output_router_logits", False):
        return None
    return ", ".join(f"{name}={value:g}" for name, value in named.items() if not isinstance(value, bool)) or None


def expert_gate(module: torch.nn.Module) -> tuple[str, Callable[[Tensor], Tensor]] | None:
    """For a module of gated experts: the name of its fused gate and up projections, and the function that turns their
    output `[n, 2·w]` into `[n, w]`."""
    gate = getattr(module, "_apply_gate", None)
    return ("gate_up_proj", gate) if gate is not None and getattr(module, "has_gate", False) else None


def offers_flex_attention(model: PreTrainedModel) -> bool:
    """Whether transformers offers FlexAttention for `model`.

    Some classes with a vision tower do not say so, although their decoder attends through transformers' interface,
    which passes any mask on. Other classes without the word may change the mask themselves.
    """
    decoder = model.get_decoder() if has_tower(model) else None
    return bool(model._supports_flex_attn or getattr(decoder, "_supports_attention_backend", False))


def offers_sdpa(model: PreTrainedModel) -> bool:
    """Whether transformers offers `sdpa` for `model`: not if its softmax has terms that `sdpa` lacks."""
    return bool(model._supports_sdpa)


def has_tower(model: nn.Module) -> bool:
    """Whether transformers knows an image encoder in `model`, beside its decoder."""
    return isinstance(model, PreTrainedModel) and tower_of(model) is not None


def is_loaded(parameter: Tensor) -> bool:
    """Whether `parameter` has its values from a checkpoint, so that transformers does not initialize it."""
    return bool(getattr(parameter, "_is_hf_initialized", False))


def mark_loaded(parameter: Tensor, loaded: bool) -> None:
    """Mark whether `parameter` has its values from a checkpoint."""
    parameter._is_hf_initialized = loaded  # type: ignore[attr-defined]
