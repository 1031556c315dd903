"""Adapters on disk, in PEFT's format: `adapter_model.safetensors` and `adapter_config.json`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from automodel_trainer.models.auto_classes import peft_task
from automodel_trainer.models.files import check_safetensors, resolve_folder
from automodel_trainer.models.lora.config import LoRAConfig
from automodel_trainer.models.lora.config_changes import config_changes, write_changes
from automodel_trainer.models.lora.embeddings import saved_embeddings
from automodel_trainer.models.lora.initialize import assign, whole
from automodel_trainer.models.lora.layers import LINEAR, Adapter, adapters
from automodel_trainer.models.lora.targets import Target, some
from automodel_trainer.models.record import recorded
from automodel_trainer.models.sidecars import ModelFolder
from automodel_trainer.models.stage_names import WholeTensors, names_of_all_stages, of_all_stages

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
_MAGNITUDE = "lora_magnitude_vector"
_INITS = {"kaiming": True, "pissa": "pissa", "orthogonal": "orthogonal"}
# Options that change the arithmetic of an adapter in ways that are not implemented here.
_UNSUPPORTED = (
    "alora_invocation_tokens", "arrow_config", "kasa_config",
    "layer_replication", "lora_bias", "monteclora_config", "trainable_token_indices", "use_bdlora", "use_qalora",
    "velora_config",
)  # fmt: skip
# PEFT takes linear layers by these names for parts of fused experts, if a model has fused experts.
_EXPERT_LEAVES = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}


# --- reading --------------------------------------------------------------------------------------------------------


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and no model."""
    return (folder / CONFIG_NAME).is_file() and (folder / WEIGHTS_NAME).is_file()


def read_config(adapter: str | os.PathLike[str]) -> dict[str, Any]:
    """The adapter_config.json of a folder or Hub repository, checked.

    Raises:
        ValueError: it is missing or damaged, or describes an adapter that is not implemented here.
    """
    file = resolve_folder(adapter) / CONFIG_NAME
    if not file.is_file():
        raise ValueError(f"{file.parent} has no {CONFIG_NAME}, so it is not an adapter in PEFT's format.")
    try:
        config = json.loads(file.read_text())
        kind = config["peft_type"]
        config["r"], config["lora_alpha"] = int(config["r"]), float(config["lora_alpha"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is not an adapter configuration: {error!r}. Copy or save the adapter again."
        ) from error
    if kind != "LORA":
        raise ValueError(f"{file} describes a {kind} adapter; only LORA is read here.")
    if config["r"] < 1:
        raise ValueError(f"{file} says r={config['r']}: an adapter has a positive rank.")
    asked = [key for key in _UNSUPPORTED if config.get(key)]
    if config.get("bias", "none") != "none":
        asked.append("bias")
    if asked:
        raise ValueError(
            f"{file} uses {', '.join(asked)}, which this trainer does not compute. Train an adapter "
            "without it, or merge this one into its base (PEFT's merge_and_unload) and add a new one."
        )
    return config


def read_tensors(adapter: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The adapter's tensors by their names in the model (PEFT's prefix taken off), on the CPU.

    Raises:
        ValueError: no safetensors, or a damaged file.
    """
    file = resolve_folder(adapter) / WEIGHTS_NAME
    if not file.is_file():
        pickled = " adapter_model.bin is not read (pickle can run code): save the adapter as safetensors."
        raise ValueError(
            f"{file.parent} has no {WEIGHTS_NAME}.{pickled if (file.parent / 'adapter_model.bin').is_file() else ''}"
        )
    check_safetensors(file)
    return _without_copies({name.removeprefix(PREFIX): tensor for name, tensor in load_file(file).items()})


def _without_copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` without what PEFT writes twice of embeddings that were resized and are trained whole.

    It reads `lm_head.weight`, and writes the parts of its wrapper beside it: `lm_head.modules_to_save.weight` (the
    same) and `lm_head.original_module.weight` (not used).
    """
    plain = {name: re.sub(r"\.(modules_to_save|original_module)\.", ".", name) for name in tensors}
    return {name: tensor for name, tensor in tensors.items() if plain[name] == name or plain[name] not in tensors}


def adapter_config(config: LoRAConfig) -> LoRAConfig:
    """`config`, with the values that its adapter on disk decides."""
    assert config.adapter is not None
    saved = read_config(config.adapter)
    inits = {value: key for key, value in _INITS.items()}
    tensors = read_tensors(config.adapter)
    whole_modules = [f".{name}." for name in saved.get("modules_to_save") or ()]
    modules = {
        name.rpartition(".")[0]
        for name in tensors
        if ".lora_" not in name and any(part in f".{name}" for part in whole_modules)
    }
    return replace(
        config,
        rank=saved["r"],
        alpha=saved["lora_alpha"],
        dropout=float(saved.get("lora_dropout") or 0.0),
        use_rslora=bool(saved.get("use_rslora")),
        use_dora=bool(saved.get("use_dora")),
        # The adapter's values replace any other initial values. PiSSA also changed the base that it was trained on.
        init=inits.get(saved.get("init_lora_weights"), "kaiming"),  # type: ignore[arg-type]
        modules_to_save=sorted(modules),
    )


def adapter_targets(model: nn.Module, config: LoRAConfig) -> list[Target]:
    """The weights of `model` that the adapter on disk updates.

    Raises:
        ValueError: the adapter belongs to another base model (names or shapes differ).
    """
    assert config.adapter is not None
    saved, tensors = read_config(config.adapter), read_tensors(config.adapter)
    targets = []
    for key in tensors:
        if not key.endswith(".lora_A.weight"):
            continue
        name, parameter = _locate(model, key.removesuffix(".lora_A.weight"), tensors, saved, config.adapter)
        module = model.get_submodule(name)
        is_linear = isinstance(module, LINEAR)
        target = name if is_linear else f"{name}.{parameter}"
        weight = getattr(module, parameter)
        stack = weight.shape[0] if weight.ndim == 3 else 1
        rank, rest = divmod(tensors[key].shape[0], stack)
        if rest or tensors[key].shape[1] not in weight.shape[-2:]:
            raise ValueError(_misfit(key, tensors[key], target, weight, config.adapter))
        alpha = _pattern_value(saved.get("alpha_pattern"), target, saved["lora_alpha"])
        targets.append(Target(target, rank, config.scaling(rank, alpha)))
    if not targets:
        raise ValueError(f"{config.adapter} holds no LoRA weights. Its tensors: {some(tensors) or 'none'}.")
    return targets


def _locate(
    model: nn.Module, path: str, tensors: Mapping[str, Tensor], saved: Mapping[str, Any], adapter: str
) -> tuple[str, str]:
    """The name of the module that PEFT's path stands for, and of the adapted parameter on it."""
    depth = path.count(".base_layer")
    name = path.replace(".base_layer", "")
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"Adapter {adapter} is for another base model: {type(model).__name__} has no {name}, which it updates."
        ) from None
    if isinstance(module, LINEAR):
        return name, "weight"
    named = [key for key, p in module.named_parameters(recurse=False) if p.ndim in (2, 3)]
    wanted = [key for key in named if _is_target(f"{name}.{key}", saved.get("target_parameters") or ())]
    if isinstance(module, nn.Embedding) or depth >= len(wanted):
        raise ValueError(
            f"Adapter {adapter} updates {name}, a {type(module).__name__}: only linear layers and parameters that its "
            "target_parameters name can have an adapter here."
        )
    return name, wanted[len(wanted) - 1 - depth]


def _is_target(name: str, targets: Any) -> bool:
    return any(name == target or name.endswith("." + target) for target in targets)


def _pattern_value(patterns: Mapping[str, Any] | None, name: str, default: float) -> float:
    """The value of the first regular expression that matches the end of the name, as in PEFT's alpha_pattern."""
    return float(next((v for k, v in (patterns or {}).items() if re.match(rf"(.*\.)?({k})$", name)), default))


@torch.no_grad()
def load_adapter(model: nn.Module, adapter: str | os.PathLike[str]) -> None:
    """Write an adapter on disk into the model's adapters and modules_to_save, each rank its shards. Collective.

    Raises:
        ValueError: names or shapes differ: an adapter of another base model, or of other targets.
    """
    tensors = read_tensors(adapter)
    own = trained_tensors(model)
    known = set(names_of_all_stages(model, own))
    given = {id(parameter) for name, parameter in own.items() if name in tensors}
    own = {
        name: p for name, p in own.items() if name in tensors or id(p) not in given
    }  # of a tied weight, one is enough
    if missing := own.keys() - tensors.keys():
        raise ValueError(f"Adapter {adapter} lacks {some(missing)}: it was trained with other targets or another base.")
    if unknown := tensors.keys() - known:
        raise ValueError(
            f"Adapter {adapter} holds {some(unknown)}, for which the model has no adapter: linear layers and experts "
            "have them. Merge this one into its base (PEFT's merge_and_unload), and add a new one."
        )
    for name, parameter in own.items():
        if parameter.shape != tensors[name].shape:
            raise ValueError(_misfit(name, tensors[name], name, parameter, str(adapter)))
    written: dict[int, str] = {}
    for name, parameter in own.items():
        first = written.setdefault(id(parameter), name)
        if first != name and not torch.equal(tensors[first], tensors[name]):
            raise ValueError(
                f"Adapter {adapter} has different values for {first} and {name}, which this base model ties together."
            )
        assign(parameter, tensors[name])


def _misfit(key: str, tensor: Tensor, name: str, weight: Tensor, adapter: str) -> str:
    return (
        f"Adapter {adapter} is for another base model: its {key} has the shape {list(tensor.shape)}, which does not "
        f"fit {name} of shape {list(weight.shape)}."
    )


# --- writing --------------------------------------------------------------------------------------------------------


def trained_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """All tensors of an adapter, by PEFT's names without their prefix. A tied weight stands under both of its names.

    Embeddings that were resized are among them, trained or not: the base model's files do not fit them.
    """
    tensors: dict[str, nn.Parameter] = {}
    ours: set[int] = set()
    resized = saved_embeddings(model)
    for adapter in adapters(model):
        named = {"lora_A.weight": adapter.a.weight, "lora_B.weight": adapter.b.weight, _MAGNITUDE: adapter.magnitude}
        for suffix, parameter in named.items():
            if parameter is not None:
                tensors[adapter.peft_prefix + suffix] = parameter  # type: ignore[assignment]
                ours.add(id(parameter))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in ours and (parameter.requires_grad or name in resized):
            tensors[name] = parameter
    return tensors


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
    """Write the adapter as PEFT reads it: a few MB, whatever the size of the base. Collective.

    What the config says unlike that of the base lies beside it; see `config_changes`.

    Args:
        model: with the adapter, laid out in any way.
        folder: created if it does not exist.
        dtype: of the tensors; None keeps the dtypes that they are trained in.

    Raises:
        OSError: on rank 0: a file could not be written.
    """
    gathered, config = gather_adapter(model, dtype)
    if gathered:
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        try:
            save_file(gathered, path / WEIGHTS_NAME, metadata={"format": "pt"})
        except SafetensorError as error:  # safetensors raises this for a full disk
            raise OSError(str(error)) from error
        (path / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        write_changes(config_changes(model), path)


def gather_adapter(model: nn.Module, dtype: torch.dtype | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Gather an adapter on rank 0. Collective.

    Returns:
        copies of its tensors in host memory by PEFT's names (empty on other ranks), and PEFT's configuration.
    """
    gathered = {}
    first = not dist.is_initialized() or dist.get_rank() == 0
    trained = WholeTensors(model, trained_tensors(model), whole)
    for name in trained.shapes:
        full = trained.get(name)
        if first and full is not None:
            # A copy each, also for tied weights: PEFT holds two, and safetensors refuses shared memory.
            gathered[PREFIX + name] = full.to("cpu", dtype, copy=True).contiguous()
    return gathered, _peft_config(model)


def _peft_config(model: nn.Module) -> dict[str, Any]:
    config = recorded(model, LoRAConfig)
    assert config is not None
    # of all stages, if the model is split over a pipeline
    found = [
        _AdapterFacts(*facts) for facts in of_all_stages(model, {a.target: _facts(a) for a in adapters(model)}).values()
    ]
    fused = any(adapter.experts > 1 for adapter in found)
    as_parameter = [a for a in found if not a.is_linear or (fused and a.target.rpartition(".")[2] in _EXPERT_LEAVES)]
    as_module = [a for a in found if a not in as_parameter]
    every = names_of_all_stages(model, (n for n, module in model.named_modules() if isinstance(module, LINEAR)))
    held = of_all_stages(model, {name: p.requires_grad for name, p in trained_tensors(model).items()})
    trained = [name for name, is_trained in held.items() if is_trained]
    saved = sorted({name.rpartition(".")[0] for name in trained if ".lora_" not in name and "lora_" not in name})
    source = getattr(getattr(model, "config", None), "name_or_path", None)
    read_from = recorded(model, ModelFolder)
    return {
        "peft_type": "LORA",
        "task_type": peft_task(model),
        "base_model_name_or_path": source or None,
        "revision": read_from.revision if read_from is not None and read_from.name == source else None,
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": any(a.transposed for a in found),
        "init_lora_weights": _INITS[config.init],
        "r": config.rank,
        "lora_alpha": config.scale,
        # PEFT has no dropout for parameters, and refuses to load one.
        "lora_dropout": 0.0 if as_parameter else config.dropout,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "rank_pattern": {re.escape(a.target): a.rank for a in found if a.rank != config.rank},
        "alpha_pattern": {re.escape(a.target): v for a in found if (v := _alpha(a, config)) != config.scale},
        "target_modules": _short_names([a.target for a in as_module], every),
        "target_parameters": [a.target + (".weight" if a.is_linear else "") for a in as_parameter] or None,
        "modules_to_save": saved or None,
    }  # fmt: skip


@dataclass
class _AdapterFacts:
    """What PEFT's configuration says about an adapter."""

    target: str
    rank: int
    scaling: float
    experts: int
    is_linear: bool
    transposed: bool


def _facts(adapter: Adapter) -> tuple[str, int, float, int, bool, bool]:
    return (
        adapter.target, adapter.rank, adapter.scaling, adapter.experts, adapter.is_linear, adapter.is_transposed,
    )  # fmt: skip


def _alpha(adapter: _AdapterFacts, config: LoRAConfig) -> float:
    return round(adapter.scaling * (adapter.rank**0.5 if config.use_rslora else adapter.rank), 9)


def _short_names(targets: list[str], every: list[str]) -> list[str]:
    """Last names (`q_proj`) if they match the same modules, else full names."""
    leaves = {name.rpartition(".")[2] for name in targets}
    meant = {name for name in every if name.rpartition(".")[2] in leaves}
    return sorted(leaves) if meant == set(targets) else sorted(targets)
