"""What the auto classes do: find a model's files, read its config, and build it; adapters with their base."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from automodel_trainer.models.arguments import Arguments
from automodel_trainer.models.auto_classes import may_bring_a_head
from automodel_trainer.models.build import MayBeMissing, build_pretrained, build_random, load_config
from automodel_trainer.models.files import resolve_folder
from automodel_trainer.models.kernels import KernelsConfig
from automodel_trainer.models.layout import Layout
from automodel_trainer.models.lora import LoRAConfig
from automodel_trainer.models.lora.config_changes import read_changes

_ADAPTER = "adapter_config.json"
_FROM_CONFIG = ("experts_implementation", "code_revision")  # more options of transformers' `from_config`


def load_pretrained(
    auto_class: str,
    path_or_id: str | os.PathLike[str],
    strategy: Layout | None,
    arguments: Arguments,
    *,
    attn_implementation: str | None,
    trust_remote_code: bool,
    allow_missing_weights: MayBeMissing | None,
    allow_unused_weights: bool,
    device: torch.device | str | None,
    lora: LoRAConfig | None,
    kernels: KernelsConfig | None,
) -> PreTrainedModel:
    """Build the model of a folder, a Hub repository or an adapter; see `AutoBuilder.from_pretrained`. Collective.

    Raises:
        ValueError: see `AutoBuilder.from_pretrained`.
    """
    if strategy is not None and (device or arguments.device) is not None:
        name = "device" if device is not None else "device_map"
        raise ValueError(f"A strategy places the weights itself: leave out {name}= or strategy=.")
    name, hub = str(path_or_id), dict(arguments.hub)
    revision = hub.get("revision")
    folder = resolve_folder(path_or_id, **hub)
    overrides = arguments.overrides
    if (folder / _ADAPTER).is_file():
        lora = replace(lora or LoRAConfig(), adapter=str(folder))
        if not (folder / "config.json").is_file():
            overrides = read_changes(folder) | overrides
            name, folder, revision = _base_of(folder, hub)
    if allow_missing_weights is None:
        allow_missing_weights = "head" if may_bring_a_head(auto_class) else False
    where = device or arguments.device or default_device()
    if torch.device(where).type == "meta":
        raise ValueError("from_pretrained reads weights, and the device is meta. from_config builds an empty model.")
    config = load_config(
        folder,
        trust_remote_code,
        overrides,
        given=arguments.config,
        code_revision=arguments.code_revision,
    )
    options = {name: value for name in _FROM_CONFIG if (value := getattr(arguments, name)) is not None}
    return build_pretrained(
        auto_class,
        folder,
        config,
        strategy,
        dtype=arguments.dtype,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        allow_missing_weights=allow_missing_weights,
        allow_unused_weights=allow_unused_weights,
        device=where,
        lora=lora,
        kernels=kernels,
        name=name,
        revision=revision,
        generation_config=arguments.generation_config,
        **options,
    )


def draw(
    auto_class: str,
    config: PreTrainedConfig,
    strategy: Layout | None,
    *,
    seed: int | None,
    device: torch.device | str | None,
    lora: LoRAConfig | None,
    options: dict[str, Any],
    **rest: Any,
) -> PreTrainedModel:
    """Build a model with random weights; see `AutoBuilder.from_config`. Collective.

    Raises:
        ValueError: see `AutoBuilder.from_config`.
    """
    if unknown := sorted(options.keys() - set(_FROM_CONFIG)):
        raise ValueError(f"from_config has no argument {unknown}. Set attributes of the config before you give it.")
    where = device or default_device()
    if strategy is None and torch.device(where).type == "meta" and lora is not None:
        raise ValueError("lora= gives adapters values, and the device is meta. Leave out lora=, or give device='cpu'.")
    if seed is None:
        seed = int(torch.randint(2**31, (), device="cpu"))
        seed = seed if strategy is None else strategy.broadcast(seed)
    return build_random(auto_class, config, strategy, seed=seed, device=where, lora=lora, **rest, **options)


def default_device() -> torch.device:
    """The device on which a new module would be built now: torch's default, or meta in `init_empty_weights()`.

    No random number is drawn: what the caller draws afterwards stays as it would be.
    """
    module = nn.Module()
    module.register_parameter("probe", nn.Parameter(torch.empty(0)))
    return module.get_parameter("probe").device


def _base_of(adapter: Path, hub: dict[str, Any]) -> tuple[str, Path, str | None]:
    """The name, the folder and the revision of the base model that an adapter names.

    Raises:
        ValueError: it names none.
    """
    config = json.loads((adapter / _ADAPTER).read_text())
    name = config.get("base_model_name_or_path")
    if not name:
        raise ValueError(
            f"{adapter} is an adapter that names no base model. Give the base, with "
            f"lora=LoRAConfig(adapter='{adapter}')."
        )
    rest = {key: value for key, value in hub.items() if key not in ("revision", "subfolder")}
    revision = config.get("revision")
    return str(name), resolve_folder(name, revision, **rest), revision
