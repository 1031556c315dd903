"""Checkpoints: safetensors under Hugging Face names, and JSON. They are written atomically and fit any layout.

Start with `state.py` (what a checkpoint holds, and in which order it is written and read).
"""

from automodel_trainer.checkpoint.folder import remove_checkpoint
from automodel_trainer.checkpoint.manifest import check_checkpoint
from automodel_trainer.checkpoint.state import load_checkpoint, save_checkpoint
from automodel_trainer.distributed.agreement import CheckpointError

__all__ = ["CheckpointError", "check_checkpoint", "load_checkpoint", "remove_checkpoint", "save_checkpoint"]
