"""Tell loggers of checkpoints. Private names of lightning 2.6.6's W&B and MLflow loggers stay here."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger

from automodel_trainer.checkpoint.manifest import MANIFEST, only_manifest
from automodel_trainer.checkpoint.runs import created

_UPLOAD = "_scan_and_log_checkpoints"  # of WandbLogger and MLFlowLogger: uploads what is new; it skips folders


def tell_loggers(trainer: pl.Trainer, callback: Any) -> None:
    """Call `after_save_checkpoint` of every logger, as ModelCheckpoint does. For rank 0."""
    for logger in trainer.loggers:
        logger.after_save_checkpoint(callback)


def upload_folders(loggers: list[Logger]) -> None:
    """Let `log_model` of W&B and MLflow upload checkpoint folders; Lightning's own code skips all but files."""
    for logger in loggers:
        if hasattr(logger, _UPLOAD) and _UPLOAD not in vars(logger):
            setattr(logger, _UPLOAD, partial(_upload, logger, getattr(logger, _UPLOAD)))


def _upload(logger: Any, files_only: Any, callback: Any) -> None:
    """Upload the checkpoints of a callback that are new."""
    files_only(callback)
    for path, score in _folders(callback).items():
        changed = (Path(path) / MANIFEST).stat().st_mtime
        if logger._logged_model_time.get(path) == changed:  # not `>=`: another machine may have written it
            continue
        best = path == callback.best_model_path
        (_to_wandb if hasattr(logger, "add_file_policy") else _to_mlflow)(logger, path, score, best)
        logger._logged_model_time[path] = changed


def _folders(callback: Any) -> dict[str, Any]:
    found = {getattr(callback, "last_model_path", ""): getattr(callback, "current_score", None)}
    found[getattr(callback, "best_model_path", "")] = getattr(callback, "best_model_score", None)
    found |= getattr(callback, "best_k_models", {})
    there = {path: score for path, score in found.items() if path and os.path.isfile(os.path.join(path, MANIFEST))}
    there = {path: score for path, score in there.items() if not only_manifest(Path(path))}
    return dict(sorted(there.items(), key=lambda item: created(Path(item[0]))))


def _to_wandb(logger: Any, path: str, score: Any, best: bool) -> None:
    import wandb

    name = logger._checkpoint_name or f"model-{logger.experiment.id}"
    metadata = {"score": _number(score), "original_filename": Path(path).name}
    artifact = wandb.Artifact(name=name, type="model", metadata=metadata)
    artifact.add_dir(path)
    logger.experiment.log_artifact(artifact, aliases=["latest", "best"] if best else ["latest"])


def _to_mlflow(logger: Any, path: str, score: Any, best: bool) -> None:
    place = Path(path).name
    logger.experiment.log_artifacts(logger.run_id, path, place)
    about = {"score": _number(score), "aliases": ["latest", "best"] if best else ["latest"]}
    logger.experiment.log_dict(logger.run_id, about, f"{place}/about.json")


def _number(score: Any) -> float | None:
    return float(score) if isinstance(score, (torch.Tensor, float, int)) else None
