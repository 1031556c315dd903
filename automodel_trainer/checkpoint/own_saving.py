"""`model.save_pretrained` and `push_to_hub` of a model that transformers would not save right.

transformers writes what one process holds: a shard, a pipeline stage, or a base model with the adapters' tensors among
its own. So such a model gets methods of its own, of the same names. They write what `Trainer.save_pretrained` writes.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from types import MethodType
from typing import Any

from huggingface_hub import HfApi
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from automodel_trainer.checkpoint.export import export_pretrained
from automodel_trainer.distributed.agreement import rank
from automodel_trainer.models.lora import lora_of


def save_by_export(model: PreTrainedModel) -> None:
    """Let `model.save_pretrained` and `model.push_to_hub` write the whole model, or its adapter, on any layout."""
    own: Any = model
    own.save_pretrained, own.push_to_hub = MethodType(save_pretrained, model), MethodType(push_to_hub, model)


def save_pretrained(
    self: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    push_to_hub: bool = False,
    max_shard_size: int | str = "50GB",
    **kwargs: Any,
) -> None:
    """Write the model as a Hugging Face folder, or its adapter as PEFT's. Collective: every rank must call it.

    Args:
        save_directory: the folder.
        is_main_process: has no effect without `state_dict`: rank 0 writes.
        state_dict: weights to write instead of the model's, whole. Then this rank writes, if it is the main process.
        push_to_hub: upload the folder too, as transformers does.
        max_shard_size: the largest weight file.
        kwargs: more of transformers' arguments: `repo_id`, `token`, `private`, `commit_message`, … of the upload.

    Raises:
        ValueError: an argument cannot be honoured.
    """
    if kwargs.get("variant") or kwargs.get("distributed_checkpoint"):
        name = "variant" if kwargs.get("variant") else "distributed_checkpoint"
        raise ValueError(f"{name}= is not honoured for a model that is sharded or has adapters. Leave it out.")
    if state_dict is not None and lora_of(self) is None and not _sharded(state_dict):
        options: Any = {
            "is_main_process": is_main_process,
            "push_to_hub": push_to_hub,
            "max_shard_size": max_shard_size,
        }
        type(self).save_pretrained(self, save_directory, state_dict=state_dict, **options, **kwargs)
        return
    export_pretrained(self, Path(save_directory), max_shard_size=max_shard_size)
    if push_to_hub and rank() == 0:
        _upload(Path(save_directory), kwargs)


def push_to_hub(self: PreTrainedModel, repo_id: str, **kwargs: Any) -> Any:
    """Write the model and upload it. Collective: every rank must call it, and rank 0 uploads.

    Args:
        repo_id: the repository.
        kwargs: more of transformers' arguments.

    Returns:
        what transformers returns, on rank 0; None on the others.
    """
    if rank() == 0:
        return type(self).push_to_hub(self, repo_id, **kwargs)  # it calls `save_pretrained`
    with tempfile.TemporaryDirectory() as folder:  # rank 0's is the one that is written
        self.save_pretrained(folder, max_shard_size=kwargs.get("max_shard_size", "50GB"))
    return None


def _sharded(state_dict: dict[str, Any]) -> bool:
    return any(isinstance(value, DTensor) for value in state_dict.values())


def _upload(folder: Path, options: dict[str, Any]) -> None:
    api = HfApi(token=options.get("token"))
    repo_id = api.create_repo(
        options.get("repo_id", folder.name), private=options.get("private"), exist_ok=True
    ).repo_id
    api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=options.get("commit_message"),
        revision=options.get("revision"),
        create_pr=options.get("create_pr", False),
    )
