"""Builds a Hugging Face model of any auto class, lays it out on devices and streams its weights in."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from automodel_trainer.distributed.stage_names import held_elsewhere
from automodel_trainer.models._transformers import load_weights, places_of, tied_weight_names
from automodel_trainer.models.auto_classes import (
    PURPOSES,
    auto_class_of,
    auto_class_of_task,
    auto_classes_of,
    transformers_class,
)
from automodel_trainer.models.files import TensorSlice, resolve_folder, slices_of, weight_files
from automodel_trainer.models.initialize import initialize_missing, initialize_weights
from automodel_trainer.models.kernels import KernelsConfig, apply_kernels
from automodel_trainer.models.layout import Layout
from automodel_trainer.models.lora import (
    LoRAConfig,
    adapter_names,
    apply_lora,
    embeddings_of_adapter,
    finish_lora,
    untied_head,
)
from automodel_trainer.models.parts import freeze_parts
from automodel_trainer.models.quantization.checkpoint import check_leftovers, dense_weights, quantization_of
from automodel_trainer.models.quantization.fp8_layers import check_gathered
from automodel_trainer.models.quantization.quantize import quantized_weights
from automodel_trainer.models.quantization_config import ReadDense, forget_quantization, quantization_in
from automodel_trainer.models.record import record_of
from automodel_trainer.models.unused_weights import check_unused


class AutoBuilder:
    """Builds the model that transformers' auto class of the same name builds, sharded if asked.

    The result is the transformers model itself: the same class, forward, state-dict keys and `generate`. With a
    strategy (whose processes have started) the model is laid out on its mesh, and no rank ever holds all of it. A
    subclass names the auto class; `builder(name)` makes one.
    """

    auto_class: ClassVar[str]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        strategy: Layout | None = None,
        dtype: torch.dtype | str | None = None,
        *,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
        allow_missing_weights: bool | Collection[str] = False,
        allow_unused_weights: bool = False,
        device: torch.device | str = "cpu",
        lora: LoRAConfig | None = None,
        kernels: KernelsConfig | None = None,
        freeze: Sequence[str] = (),
        **config_overrides: Any,
    ) -> PreTrainedModel:
        """Build a model and stream its checkpoint into it.

        Args:
            pretrained_model_name_or_path: a folder with config.json and safetensors, or a Hub id.
            strategy: the layout; None builds the plain model on `device`.
            dtype: of the parameters. None takes the dtype of the strategy's precision; without a strategy, that of the
                checkpoint.
            attn_implementation: transformers' name of an attention kernel; None lets transformers choose.
            trust_remote_code: run model code that comes with the checkpoint.
            revision: branch, tag or commit of a Hub repository.
            allow_missing_weights: True initialises weights that the checkpoint lacks, instead of raising. Names of
                modules allow it for these only, and they must then be trained.
            allow_unused_weights: load a part of what the checkpoint holds (the text model without its vision tower,
                say). The rest is not trained, and missing in what is saved.
            device: where to build without a strategy.
            lora: adapters to train on the frozen model.
            kernels: the kernels to compute with; None leaves the choice to transformers.
            freeze: parts of a vision-language model not to train: "vision", "projector", "language", or globs over the
                names of parameters.
            config_overrides: attributes of the model's config to change.

        Raises:
            ValueError: the folder or repository does not exist, weights are missing or damaged, a config attribute is
                unknown, or this device, model or layout does not have a kernel that was asked for.
        """
        folder = resolve_folder(pretrained_model_name_or_path, revision)
        files = weight_files(folder)
        config = load_config(folder, trust_remote_code, config_overrides)
        model = build_on_meta(
            cls.auto_class, config, _parameter_dtype(dtype, strategy, config), attn_implementation, trust_remote_code
        )
        model.config.name_or_path = str(folder)
        if model.can_generate() and (folder / "generation_config.json").is_file():
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
        if freeze:
            freeze_parts(model, freeze)
        if lora is not None:
            add_adapters(model, lora, strategy)
        if kernels is not None:
            apply_kernels(model, kernels, _device(strategy, device))
        options: dict[str, Any] = {"allow_missing_weights": allow_missing_weights}
        options |= {"allow_unused_weights": allow_unused_weights, "trust_remote_code": trust_remote_code}
        fill_from_folder(model, folder, strategy, device, files=files, **options)
        return model

    @classmethod
    def from_config(
        cls,
        config: PreTrainedConfig,
        strategy: Layout | None = None,
        dtype: torch.dtype | str | None = None,
        *,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
        lora: LoRAConfig | None = None,
        kernels: KernelsConfig | None = None,
        strict: bool = True,
    ) -> PreTrainedModel:
        """Build a model with random weights. The same `seed` gives the same weights under every strategy.

        Args:
            config: of the model.
            seed: of the random weights.
            strict: False starts parameters at zero that the model has no rule for.
            strategy, dtype, attn_implementation, trust_remote_code, device, lora, kernels: see `from_pretrained`.

        Raises:
            ValueError: this device, model or layout does not have a kernel that was asked for; or the model has no rule
                to draw some of its parameters.
        """
        model = build_on_meta(
            cls.auto_class, config, _parameter_dtype(dtype, strategy, config), attn_implementation, trust_remote_code
        )
        if lora is not None:
            add_adapters(model, lora, strategy)
        if kernels is not None:
            apply_kernels(model, kernels, _device(strategy, device))
        if strategy is not None:
            strategy.parallelize(model)
        check_gathered(model)
        initialize_weights(model, _device(strategy, device), seed, adapter_names(model), strict)
        finish_lora(model)
        if strategy is not None:
            strategy.finalize_parameters(model)
        return model


class AutoModelForCausalLM(AutoBuilder):
    """Builds the model that `transformers.AutoModelForCausalLM` builds, sharded if asked: see `AutoBuilder`."""

    auto_class = "AutoModelForCausalLM"


class AutoModelForImageTextToText(AutoBuilder):
    """Builds what `transformers.AutoModelForImageTextToText` builds, sharded if asked: see `AutoBuilder`."""

    auto_class = "AutoModelForImageTextToText"


def builder(auto_class: str) -> type[AutoBuilder]:
    """The builder of a transformers auto class.

    Raises:
        ValueError: transformers has no such class.
    """
    transformers_class(auto_class)
    return type(auto_class, (AutoBuilder,), {"auto_class": auto_class})


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


def empty_model(folder: Path, trust_remote_code: bool = False, task: str | None = None) -> PreTrainedModel:
    """The model of a folder on meta, in the dtype of its checkpoint: names and shapes without values.

    Args:
        folder: of the model.
        trust_remote_code: run model code that comes with it.
        task: PEFT's `task_type` of an adapter for the model; None takes the auto class from the folder's config.
    """
    config = load_config(folder, trust_remote_code, {})
    auto_class = auto_class_of_task(task, config) or auto_class_of(config)
    return build_on_meta(auto_class, config, _parameter_dtype("auto", None, config), None, trust_remote_code)


def add_adapters(model: PreTrainedModel, lora: LoRAConfig, strategy: Layout | None) -> None:
    """Freeze a model that is not laid out yet, and add adapters.

    Frozen weights need no master copy, because nothing updates them. They are held in the dtype that they compute in.
    """
    if strategy is None:
        apply_lora(model, lora)
    else:
        apply_lora(model, lora, strategy.dtypes.compute, strategy.dtypes.parameters)


def fill_from_folder(
    model: PreTrainedModel,
    folder: Path,
    strategy: Layout | None,
    device: torch.device | str = "cpu",
    *,
    files: list[Path] | None = None,
    allow_missing_weights: bool | Collection[str] = False,
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
        allow_missing_weights: see `AutoBuilder.from_pretrained`.

    Raises:
        ValueError: the folder lacks weights that the model needs, or random weights would stay frozen.
    """
    files = files or weight_files(folder)
    quantization = quantization_of(folder)
    tensors: Mapping[str, TensorSlice] | None = None
    if quantization is not None:
        tensors = dense_weights(slices_of(files), quantization, folder)
        record_of(model).keep(ReadDense(str(quantization.get("quant_method"))))
    forget_quantization(model.config)
    tensors = _without_embeddings(model, files, tensors)
    if strategy is not None:
        strategy.parallelize(model)
    check_gathered(model)
    requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    in_turn = bool(quantized_weights(model))
    added = adapter_names(model) | (embeddings_of_adapter(model) - tied_weight_names(model).keys())
    loaded = load_weights(model, files, _device(strategy, device), added, in_turn, tensors)
    missing, unexpected = set(loaded.missing), set(loaded.unexpected)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(requires_grad[name])
    missing -= tied_weight_names(model).keys()
    unused = loaded.unused - held_elsewhere(model, loaded.unused)
    unexpected &= unused
    if unused:
        check_leftovers(unused, slices_of(files), folder)
    if not (allow_unused_weights or allow_missing_weights):
        check_unused(model, unused, folder, trust_remote_code)
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


def _is_new(name: str, allowed: bool | Collection[str]) -> bool:
    return allowed if isinstance(allowed, bool) else name.startswith(tuple(f"{module}." for module in allowed))


def _check_trained(model: PreTrainedModel, new: set[str], folder: Path) -> None:
    frozen = {name for name in new if not model.get_parameter(name).requires_grad}
    if frozen:
        modules = sorted({name.rpartition(".")[0] for name in frozen})
        raise ValueError(
            f"{folder} lacks {_some(frozen)}, which would start from random weights and stay frozen. Train them too: "
            f"LoRAConfig(modules_to_save={modules})."
        )


def load_config(folder: Path, trust_remote_code: bool, overrides: dict[str, Any]) -> PreTrainedConfig:
    """The config of a model's folder, with some attributes changed.

    Args:
        folder: with config.json.
        trust_remote_code: run configuration code that comes with it.
        overrides: attributes to change.

    Raises:
        ValueError: there is no config.json, or the config does not have an attribute.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json, so it is not a Hugging Face model folder.")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    unknown = [key for key in overrides if not hasattr(config, key)]
    if unknown:
        raise ValueError(
            f"{type(config).__name__} has no attribute {unknown}. Give attributes that this model's config has."
        )
    for key, value in overrides.items():
        setattr(config, key, value)
    return config


def build_on_meta(
    auto_class: str,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    attn_implementation: str | None,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """The model of a config on meta: no parameter has values."""
    options = {"attn_implementation": attn_implementation} if attn_implementation else {}
    with torch.device("meta"):
        model: PreTrainedModel = transformers_class(auto_class).from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code, **options
        )
    model.config.dtype = dtype
    return model


def _parameter_dtype(dtype: torch.dtype | str | None, strategy: Layout | None, config: PreTrainedConfig) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if isinstance(dtype, str) and dtype != "auto":
        found = getattr(torch, dtype.removeprefix("torch."), None)
        if not isinstance(found, torch.dtype):
            raise ValueError(f"dtype={dtype!r} is not a torch dtype. Allowed: float32, bfloat16, float16, auto.")
        return found
    if strategy is not None and dtype is None:
        return strategy.dtypes.parameters
    return _own_dtype(config)


def _own_dtype(config: PreTrainedConfig) -> torch.dtype:
    """The dtype that a checkpoint says its weights have; that of its text model if only that says it.

    Codes of quantized weights are no dtype to compute in. Such checkpoints are dense bf16 unless they say otherwise.
    """
    named = (getattr(part, "dtype", None) for part in (config, config.get_text_config()))
    for name in (name for name in named if name is not None):
        dtype = name if isinstance(name, torch.dtype) else getattr(torch, str(name).removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"The config says dtype={name!r}, which is not a torch dtype. Give dtype=torch.bfloat16.")
        if dtype.is_floating_point and dtype.itemsize > 1:
            return dtype
    return torch.bfloat16 if quantization_in(config.to_dict()) else torch.float32


def _device(strategy: Layout | None, device: torch.device | str) -> torch.device:
    if strategy is None:
        return torch.device(device)
    return strategy.root_device


def _some(names: set[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:5]) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "")
