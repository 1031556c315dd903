"""Builds a Hugging Face model of any auto class, lays it out on devices and streams its weights in."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel

from automodel_trainer.models._transformers import (
    load_weights,
    places_of,
    read_generation_config,
    tied_weight_names,
)
from automodel_trainer.models.auto_classes import (
    PURPOSES,
    auto_class_of,
    auto_class_of_task,
    auto_classes_of,
    transformers_class,
)
from automodel_trainer.models.files import TensorSlice, floating_dtypes, slices_of, weight_files
from automodel_trainer.models.generation import GENERATION_CONFIG
from automodel_trainer.models.initialize import initialize_missing, initialize_weights
from automodel_trainer.models.kernels import KernelsConfig, apply_kernels
from automodel_trainer.models.kernels.attention import AttentionAsked
from automodel_trainer.models.layout import Layout
from automodel_trainer.models.lora import (
    LoRAConfig,
    adapter_names,
    apply_lora,
    embeddings_of_adapter,
    finish_lora,
    untied_head,
)
from automodel_trainer.models.new_heads import new_heads, tell_new_heads
from automodel_trainer.models.parts import freeze_parts
from automodel_trainer.models.quantization import mxfp4
from automodel_trainer.models.quantization.as_stored import (
    is_held_as_stored,
    read_as_stored,
    stored_weights,
    weights_in,
)
from automodel_trainer.models.quantization.checkpoint import check_leftovers, dense_weights, quantization_of
from automodel_trainer.models.quantization.dense import DenseWeight, Mxfp4Weight
from automodel_trainer.models.quantization.fp8_layers import check_gathered
from automodel_trainer.models.quantization.quantize import quantized_weights
from automodel_trainer.models.quantization_config import ReadDense, forget_quantization, quantization_in
from automodel_trainer.models.record import record_of
from automodel_trainer.models.sidecars import remember_folder
from automodel_trainer.models.stage_names import held_elsewhere
from automodel_trainer.models.unused_weights import check_unused
from automodel_trainer.nn.text import first_line

MayBeMissing = bool | Collection[str] | Literal["head"]
"""Which weights a checkpoint may lack: all, those in these modules, or a head of the model's own choice."""


def build_pretrained(
    auto_class: str,
    folder: Path,
    config: PreTrainedConfig,
    strategy: Layout | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    allow_missing_weights: MayBeMissing = False,
    allow_unused_weights: bool = False,
    device: torch.device | str = "cpu",
    lora: LoRAConfig | None = None,
    kernels: KernelsConfig | None = None,
    freeze: Sequence[str] = (),
    name: str | None = None,
    revision: str | None = None,
    generation_config: GenerationConfig | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Build the model of a folder and stream its weights into it, in evaluation mode. Collective.

    Args:
        auto_class: name of the transformers auto class that builds it.
        folder: with safetensors.
        config: of the model.
        name: what the user calls the model, a Hub id say; None: the folder.
        revision: of the Hub repository.
        generation_config: replaces the folder's.
        freeze: parts of a vision-language model that are not trained; see `freeze_parts`.
        options: of the auto class's `from_config`.
        strategy, dtype, …: see `automodel_trainer.AutoModelForCausalLM.from_pretrained`.

    Raises:
        ValueError: weights are missing or damaged, or this device, model or layout does not have a kernel that was
            asked for.
    """
    files = weight_files(folder)
    held = _parameter_dtype(dtype, strategy, config, files)
    config.name_or_path = str(folder)  # code that comes with the checkpoint is looked for there
    model = build_on_meta(auto_class, config, held, attn_implementation, trust_remote_code, **options)
    remember_folder(model, folder, name or str(folder), revision)
    if model.can_generate():
        read_generation_config(model, folder, generation_config, trust_remote_code)
    if freeze:
        freeze_parts(model, freeze)
    if lora is not None:
        add_adapters(model, lora, strategy, folder)
    if kernels is not None:
        apply_kernels(model, kernels, _device(strategy, device))
    fill_from_folder(
        model,
        folder,
        strategy,
        device,
        files=files,
        allow_missing_weights=allow_missing_weights,
        allow_unused_weights=allow_unused_weights,
        trust_remote_code=trust_remote_code,
    )
    return model.eval()


def build_random(
    auto_class: str,
    config: PreTrainedConfig,
    strategy: Layout | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
    lora: LoRAConfig | None = None,
    kernels: KernelsConfig | None = None,
    strict: bool = True,
    freeze: Sequence[str] = (),
    **options: Any,
) -> PreTrainedModel:
    """Build a model with random weights. The same `seed` gives the same weights under every strategy. Collective.

    Args:
        auto_class: name of the transformers auto class that builds it.
        freeze: see `build_pretrained`.
        options: of the auto class's `from_config`.
        config, strategy, …: see `automodel_trainer.AutoModelForCausalLM.from_config`.

    Raises:
        ValueError: this device, model or layout does not have a kernel that was asked for; or the model has no rule
            to draw some of its parameters.
    """
    held = _parameter_dtype(dtype, strategy, config)
    model = build_on_meta(auto_class, config, held, attn_implementation, trust_remote_code, **options)
    if freeze:
        freeze_parts(model, freeze)
    if lora is not None:
        add_adapters(model, lora, strategy)
    if kernels is not None:
        apply_kernels(model, kernels, _device(strategy, device))
    if strategy is None and torch.device(device).type == "meta":
        return model
    if strategy is not None:
        strategy.parallelize(model)
    check_gathered(model)
    initialize_weights(model, _device(strategy, device), seed, adapter_names(model), strict)
    finish_lora(model)
    if strategy is not None:
        strategy.finalize_parameters(model)
    return model


def check_purpose(model: PreTrainedModel, auto_class: str) -> None:
    """Check that `auto_class` builds models of this kind. A class that transformers does not list passes.

    Raises:
        ValueError: other auto classes build it.
    """
    found = auto_classes_of(model)
    if found and auto_class in PURPOSES and auto_class not in found:
        raise ValueError(
            f"{' or '.join(found)} builds a {type(model).__name__}, but this objective trains models that {auto_class} "
            f"builds. Load the model with {auto_class}, or give the objective its folder or Hub id."
        )


def empty_model(
    folder: Path, trust_remote_code: bool = False, task: str | None = None, overrides: dict[str, Any] | None = None
) -> PreTrainedModel:
    """The model of a folder on meta, in the dtype of its checkpoint: names and shapes without values.

    Args:
        folder: of the model.
        trust_remote_code: run model code that comes with it.
        task: PEFT's `task_type` of an adapter for the model; None takes the auto class from the folder's config.
        overrides: attributes of the config to change.
    """
    config = load_config(folder, trust_remote_code, overrides or {})
    auto_class = auto_class_of_task(task, config) or auto_class_of(config)
    model = build_on_meta(auto_class, config, _parameter_dtype("auto", None, config), None, trust_remote_code)
    if model.can_generate() and not (folder / GENERATION_CONFIG).is_file():
        read_generation_config(model, folder, None, trust_remote_code=False)  # older folders have it in config.json
    return model


def add_adapters(model: PreTrainedModel, lora: LoRAConfig, strategy: Layout | None, folder: Path | None = None) -> None:
    """Freeze a model that is not laid out yet, and add adapters.

    Frozen weights need no master copy, because nothing updates them. They are held in the dtype that they compute in.

    Args:
        model: on meta or real.
        lora: what to adapt, and how.
        strategy: its dtypes are taken.
        folder: whose weights a model on meta will have; None: others, or it has its weights.
    """
    stored = None
    if lora.quantize == mxfp4.SCHEME and folder is not None:
        stored = weights_in(model, folder, weight_files(folder))
    if strategy is None:
        apply_lora(model, lora, stored=stored)
    else:
        apply_lora(model, lora, strategy.dtypes.compute, strategy.dtypes.parameters, stored)


def fill_from_folder(
    model: PreTrainedModel,
    folder: Path,
    strategy: Layout | None,
    device: torch.device | str = "cpu",
    *,
    files: list[Path] | None = None,
    allow_missing_weights: MayBeMissing = False,
    allow_unused_weights: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Lay out a model that is on meta, and stream the weights of `folder` into it. Collective.

    Args:
        model: on meta, perhaps with adapters.
        folder: with safetensors.
        strategy: the layout; None leaves the model whole on `device`.
        device: where to put it without a strategy.
        files: the weight files, if they have been checked already.
        allow_missing_weights: see `automodel_trainer.AutoModelForCausalLM.from_pretrained`.

    Raises:
        ValueError: the folder lacks weights that the model needs, or random weights would stay frozen.
    """
    files = files or weight_files(folder)
    quantization = quantization_of(folder)
    tensors: Mapping[str, TensorSlice] | None = None
    stored: dict[str, Mxfp4Weight] = {}
    if quantization is not None:
        tensors = dense_weights(slices_of(files), quantization, folder)
        stored = {n: w for n, w in stored_weights(model, tensors).items() if is_held_as_stored(model, n)}
        tensors = {name: part for name, part in tensors.items() if part not in stored.values()}
        if any(isinstance(part, DenseWeight) for part in tensors.values()):
            record_of(model).keep(ReadDense(str(quantization.get("quant_method"))))
    forget_quantization(model.config)
    tensors = _without_embeddings(model, files, tensors)
    if strategy is not None:
        strategy.parallelize(model)
    check_gathered(model)
    requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    read_as_stored(model, stored, _device(strategy, device))
    in_turn = any(weight.is_meta for weight in quantized_weights(model))
    added = adapter_names(model) | (embeddings_of_adapter(model) - tied_weight_names(model).keys())
    added |= stored.keys() & requires_grad.keys()
    loaded = load_weights(model, files, _device(strategy, device), added, in_turn, tensors)
    missing, unexpected = set(loaded.missing), set(loaded.unexpected)
    for name, parameter in model.named_parameters():
        if name not in requires_grad:
            raise ValueError(
                f"The config of {folder} ties {name} to another weight (tie_word_embeddings), and the checkpoint holds "
                "other values for it. Set config_overrides={'tie_word_embeddings': False} to train both."
            )
        parameter.requires_grad_(requires_grad[name])
    missing -= tied_weight_names(model).keys()
    unused = loaded.unused - held_elsewhere(model, loaded.unused)
    unexpected &= unused
    if unused:
        check_leftovers(unused, slices_of(files), folder)
    if not (allow_unused_weights or allow_missing_weights):
        check_unused(model, unused, folder, trust_remote_code)
    if allow_missing_weights == "head":
        allow_missing_weights = new_heads(model, missing)
        tell_new_heads(model, allow_missing_weights, folder)
    new = {name for name in missing if _is_new(name, allow_missing_weights)}
    if missing - new:
        raise ValueError(
            f"{folder} lacks weights of {type(model).__name__}: {_some(missing - new)}. It is not a checkpoint of this "
            "model (allow_missing_weights=True initialises them randomly)."
        )
    if allow_missing_weights is not True:
        _check_trained(model, new, folder)
        initialize_missing(model, new, _device(strategy, device))
    if unexpected:
        warnings.warn(
            f"{folder} holds weights that {type(model).__name__} does not have: {_some(unexpected)}.", stacklevel=2
        )
    finish_lora(model)
    if strategy is not None:
        strategy.finalize_parameters(model)


def _without_embeddings(
    model: PreTrainedModel, files: list[Path], tensors: Mapping[str, TensorSlice] | None
) -> Mapping[str, TensorSlice] | None:
    """What is read of a base whose embeddings an adapter on disk holds, perhaps in another size, or takes apart.

    Args:
        files: the files of the base.
        tensors: what to read instead of what they hold; None: they are read as they are.
    """
    from_adapter, head = embeddings_of_adapter(model), untied_head(model)
    if not from_adapter and head is None:
        return tensors
    found: Mapping[str, TensorSlice] = slices_of(files) if tensors is None else tensors
    places = places_of(model, found)
    read = {name: part for name, part in found.items() if places.get(name) not in from_adapter}
    if head is not None and head.name not in from_adapter:  # in the files it has the name of what it was tied to
        known_as = next((name for name in found if places.get(name) == head.source), head.source)  # maybe of a stage
        read[head.name] = found[known_as]
    return read


def _is_new(name: str, allowed: MayBeMissing) -> bool:
    return allowed if isinstance(allowed, bool) else name.startswith(tuple(f"{module}." for module in allowed))


def _check_trained(model: PreTrainedModel, new: set[str], folder: Path) -> None:
    frozen = {name for name in new if not model.get_parameter(name).requires_grad}
    if frozen:
        modules = sorted({name.rpartition(".")[0] for name in frozen})
        raise ValueError(
            f"{folder} lacks {_some(frozen)}, which would start from random weights and stay frozen. Train them too: "
            f"LoRAConfig(modules_to_save={modules})."
        )


def load_config(
    folder: Path,
    trust_remote_code: bool,
    overrides: dict[str, Any],
    *,
    given: PreTrainedConfig | str | os.PathLike[str] | None = None,
    code_revision: str | None = None,
) -> PreTrainedConfig:
    """The config of a model's folder, with some attributes changed.

    Args:
        folder: with config.json.
        trust_remote_code: run configuration code that comes with it.
        overrides: attributes to change.
        given: a config to use instead (a copy of it), or the folder or Hub id of one.
        code_revision: of configuration code in another repository.

    Raises:
        ValueError: there is no config.json, or the config does not have an attribute.
    """
    if isinstance(given, PreTrainedConfig):
        config = copy.deepcopy(given)
        unknown = [key for key in overrides if not hasattr(config, key)]
        for key, value in overrides.items():
            setattr(config, key, value)
    else:
        if given is None and not (folder / "config.json").is_file():
            hint = ""
            if (folder / "adapter_config.json").is_file():
                hint = f" It is an adapter: give its base as the model, and lora={{'adapter': '{folder}'}}."
            elif (folder / "model" / "config.json").is_file():
                hint = f" It is a checkpoint: give {folder / 'model'}."
            raise ValueError(f"{folder} has no config.json, so it is not a Hugging Face model folder.{hint}")
        options = {"trust_remote_code": trust_remote_code, "code_revision": code_revision}
        source = folder if given is None else given
        try:
            config, unused = AutoConfig.from_pretrained(source, return_unused_kwargs=True, **options, **overrides)
        except (OSError, AttributeError) as error:  # not JSON; a dtype that torch does not have
            raise ValueError(f"The config of {source} cannot be read: {first_line(error)}. Correct it.") from error
        unknown = [key for key in overrides if key in unused]
    if unknown:
        raise ValueError(
            f"{type(config).__name__} has no attribute {unknown}, and from_pretrained no argument of that name. Give "
            "attributes that this model's config has."
        )
    return config


def build_on_meta(
    auto_class: str,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    attn_implementation: str | None,
    trust_remote_code: bool,
    **options: Any,
) -> PreTrainedModel:
    """The model of a config on meta: no parameter has values. `options` are those of transformers' `from_config`."""
    options |= {"attn_implementation": attn_implementation} if attn_implementation else {}
    with torch.device("meta"):
        model: PreTrainedModel = transformers_class(auto_class).from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code, **options
        )
    model.config.dtype = dtype
    if attn_implementation:
        record_of(model).keep(AttentionAsked(attn_implementation))
    return model


def _parameter_dtype(
    dtype: torch.dtype | str | None, strategy: Layout | None, config: PreTrainedConfig, files: Sequence[Path] = ()
) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if isinstance(dtype, str) and dtype != "auto":
        found = getattr(torch, dtype.removeprefix("torch."), None)
        if not isinstance(found, torch.dtype):
            raise ValueError(f"dtype={dtype!r} is not a torch dtype. Allowed: float32, bfloat16, float16, auto.")
        return found
    if strategy is not None and dtype is None:
        return strategy.dtypes.parameters
    return _own_dtype(config, files)


def _own_dtype(config: PreTrainedConfig, files: Sequence[Path]) -> torch.dtype:
    """The dtype that a checkpoint says its weights have; that of its text model if only that says it.

    If the config says nothing, it is that of the first weights in the files, as in transformers. Codes of quantized
    weights are no dtype to compute in. Such checkpoints are dense bf16 unless they say otherwise.
    """
    named = (getattr(part, "dtype", None) for part in (config, config.get_text_config()))
    for name in (name for name in named if name is not None):
        dtype = name if isinstance(name, torch.dtype) else getattr(torch, str(name).removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"The config says dtype={name!r}, which is not a torch dtype. Give dtype=torch.bfloat16.")
        if dtype.is_floating_point and dtype.itemsize > 1:
            return dtype
    if quantization_in(config.to_dict()):
        return torch.bfloat16
    return next((dtype for file in files[:1] for dtype in floating_dtypes(file)), torch.float32)


def _device(strategy: Layout | None, device: torch.device | str) -> torch.device:
    if strategy is None:
        return torch.device(device)
    return strategy.root_device


def _some(names: set[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:5]) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "")
