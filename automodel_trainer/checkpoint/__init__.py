"""Checkpoints: sharded safetensors under Hugging Face names and JSON, whole or not there, for any layout."""

from automodel_trainer.checkpoint.folder import remove_checkpoint
from automodel_trainer.checkpoint.manifest import check_checkpoint
from automodel_trainer.checkpoint.state import load_checkpoint, save_checkpoint
from automodel_trainer.distributed.agreement import CheckpointError

__all__ = ["CheckpointError", "check_checkpoint", "load_checkpoint", "remove_checkpoint", "save_checkpoint"]
