"""The settings of a run as plain data, under the names that `checkpoint/settings.py` lists."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from datasets import Dataset, DatasetDict
from torch.utils.data import DataLoader
from transformers import PreTrainedConfig

from automodel_trainer.callbacks.layout import dp_size, tokenizer_of
from automodel_trainer.checkpoint.settings import BASE, GIVEN_BASE, ROWS
from automodel_trainer.data.base import MicroBatchDataModule
from automodel_trainer.data.cache import tokenizer_rules
from automodel_trainer.data.given_rows import rows_of_loader, rows_of_stream
from automodel_trainer.data.mixture import sources_of
from automodel_trainer.models.files import weight_fingerprint
from automodel_trainer.modules.optim import OptimizerConfig, SchedulerConfig
from automodel_trainer.strategies import MeshStrategy, Objective

Settings = dict[str, Any]
# Not settings: where the config came from, and what a version of transformers writes by itself.
_CONFIG_FACTS = ("_name_or_path", "transformers_version", "architectures", "auto_map", "torch_dtype", "id2label")


def run_settings(trainer: pl.Trainer, module: pl.LightningModule) -> Settings:
    """Every setting of a run: maps names to plain values. The data must be prepared and the processes started."""
    return {**_trainer(trainer), **module_settings(module), **_data(trainer, module)}


def _trainer(trainer: pl.Trainer) -> Settings:
    strategy = trainer.strategy
    found = {name: _plain(value) for name, value in getattr(trainer, "arguments", {}).items()}
    mesh = strategy.device_mesh if isinstance(strategy, MeshStrategy) else None
    sizes = {} if mesh is None else dict(zip(mesh.mesh_dim_names or (), mesh.shape))
    found.update(
        max_epochs=trainer.max_epochs,
        max_steps=trainer.max_steps,
        precision=str(trainer.precision),
        strategy=type(strategy).__name__,
        accelerator=type(trainer.accelerator).__name__,
        devices=trainer.num_devices,
        num_nodes=trainer.num_nodes,
        layout=" × ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one device",
    )
    options = {f"strategy.{name}": value for name, value in _given(strategy).items()}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        options |= {f"callbacks.{type(callback).__name__}.{name}": value for name, value in _given(callback).items()}
    return _named("trainer", {**found, **options})


def _given(thing: object) -> Settings:
    """The arguments that an object was given, as far as it keeps them under their names as plain values."""
    names, held = inspect.signature(type(thing).__init__).parameters, dict(vars(thing))
    if hasattr(held.get("schedule"), "__dict__"):  # when a checkpoint is due, and which are kept
        held |= vars(held["schedule"])
    kept = {name: held[key] for name in names for key in (name, f"_{name}") if key in held}
    return {name: value for name, value in kept.items() if value is None or type(value) in (str, int, float, bool)}


def module_settings(module: pl.LightningModule) -> Settings:
    """Those of the model, its adapters and how it learns."""
    given = {name: _plain(value) for name, value in module.hparams.items()}
    if not isinstance(module, Objective):
        return _named("model", given)
    for name, kind in (("optimizer", OptimizerConfig), ("scheduler", SchedulerConfig)):
        config = getattr(module, f"{name}_config", None)
        if isinstance(config, str):
            config = kind(name=config)
        if isinstance(config, kind):
            given[name] = {**_plain(config), "name": config.name.rpartition(".")[2]}
    given.update({name: _plain(getattr(module, name, None)) for name in ("revision", "trust_remote_code")})
    if (lora := getattr(module, "given_lora", None)) is not None:
        given["lora"] = _plain(lora)
    found = _named("model", given)
    adapts = given.get("lora") is not None
    found["model.lora"] = "adapters" if adapts else "whole model"
    if isinstance(module.model_config, PreTrainedConfig):
        found |= _named("model.config", _config(module.model_config))
    if adapts and isinstance(module.source, Path) and getattr(module, "changed_in_memory", None) is None:
        found[BASE] = weight_fingerprint(module.source)
    if adapts and (values := getattr(module, "base_values", None)) is not None:
        found[GIVEN_BASE] = values
    return found


def _config(config: PreTrainedConfig) -> Settings:
    return {key: _plain(value) for key, value in config.to_dict().items() if key not in _CONFIG_FACTS}


def _data(trainer: pl.Trainer, module: pl.LightningModule) -> Settings:
    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(datamodule, MicroBatchDataModule):
        found = _named("data", {name: _plain(value) for name, value in getattr(datamodule, "hparams", {}).items()})
        loader = getattr(trainer, "_training_data", None)
        if datamodule is None and (rows := rows_of_loader(loader)) is not None:
            found[ROWS] = rows
        if isinstance(loader, DataLoader) and isinstance(loader.batch_size, int):
            found["data.rows_per_batch"] = loader.batch_size * dp_size(trainer)
        return found | _tokenizer(tokenizer_of(module))
    names = inspect.signature(type(datamodule).__init__).parameters
    given = {name: _plain(getattr(datamodule, name)) for name in names if hasattr(datamodule, name)}
    given.pop("tokenizer", None)
    given["class"] = type(datamodule).__name__
    if "train" in datamodule.rows:
        given["rows"] = datamodule.rows["train"].fingerprint
    else:
        given["stream"] = given.get("train")
        if (rows := rows_of_stream(sources_of(getattr(datamodule, "train", None)))) is not None:
            given["rows"] = rows
    tokenizer = datamodule.tokenizer if hasattr(datamodule.tokenizer, "get_vocab") else tokenizer_of(module)
    return _named("data", given) | _tokenizer(tokenizer) | _processor(getattr(datamodule, "processor", None))


def _processor(processor: Any) -> Settings:
    """What a processor does to pictures; not how it is called, which depends on the version of transformers."""
    pictures = getattr(processor, "image_processor", None)
    if pictures is None:
        return {}
    does = {key: value for key, value in pictures.to_dict().items() if not key.endswith(("_type", "_class", "_map"))}
    return {"model.processor": _digest(sorted((key, _plain(value)) for key, value in does.items()))}


def _tokenizer(tokenizer: Any) -> Settings:
    if tokenizer is None or not hasattr(tokenizer, "get_vocab"):
        return {}
    template = getattr(tokenizer, "chat_template", None)
    return {
        "model.tokenizer": _digest(sorted(tokenizer.get_vocab().items())),
        "model.tokenizer_rules": _digest(sorted(tokenizer_rules(tokenizer).items())),
        "data.chat_template": _digest(template) if template else "none",
    }


def _named(prefix: str, values: Mapping[str, Any]) -> Settings:
    """Nested values under dotted names."""
    found: Settings = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= _named(f"{prefix}.{name}", value)
        else:
            found[f"{prefix}.{name}"] = value
    return found


def _plain(value: Any) -> Any:
    """A value that JSON can hold; an object is named by its class."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str | int):  # enums
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Dataset | DatasetDict):
        return f"{type(value).__name__} of {value.num_rows} rows"
    if isinstance(value, list | tuple):
        if len(value) > 50:  # rows of data
            return f"{len(value):,} items"
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return getattr(value, "__qualname__", None) or type(value).__name__


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]
