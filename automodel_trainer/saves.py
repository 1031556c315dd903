"""Writing a trained model as a Hugging Face folder."""

from __future__ import annotations

import os
from pathlib import Path

import lightning.pytorch as pl
import torch

from automodel_trainer.checkpoint.export import export_pretrained
from automodel_trainer.checkpoint.merge import merge_and_save
from automodel_trainer.checkpoint.remote import local_only
from automodel_trainer.modules import HuggingFaceModule


class SavesPretrained(pl.Trainer):
    """A Trainer that writes its model as a Hugging Face folder. `automodel_trainer.Trainer` extends it."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        dtype: torch.dtype | None = None,
        max_shard_size: int | str = "5GB",
    ) -> Path:
        """Write the model as a Hugging Face folder: config, generation config, tokenizer, safetensors. Collective.

        For a model with LoRA this writes the adapter, in PEFT's format. `merge_and_save` writes the whole model.

        Args:
            save_directory: the folder; missing parents are created.
            dtype: of the weights on disk; None keeps the trained dtype.
            max_shard_size: the largest weight file, in bytes or as "5GB".

        Returns:
            the folder.

        Raises:
            ValueError: this process has no model to save.
        """
        module = self._module_to_save()
        folder = local_only(save_directory, "save_pretrained")
        export_pretrained(
            module.model,
            folder,
            tokenizer=module.saved_tokenizer,
            source=module.source,
            dtype=dtype,
            max_shard_size=max_shard_size,
        )
        return folder

    def merge_and_save(self, save_directory: str | os.PathLike[str], dtype: torch.dtype | None = None) -> Path:
        """Merge the LoRA adapter into its base model and write the result as a Hugging Face folder. Collective.

        The base weights are read from their folder again and written tensor by tensor: no process holds all of them.

        Args:
            save_directory: the folder, which must not exist.
            dtype: of the weights on disk; None keeps the base's dtype.

        Returns:
            the folder.

        Raises:
            ValueError: this process has no model with an adapter, or the base model did not come from a folder.
        """
        module = self._module_to_save()
        return merge_and_save(
            module.model,
            module.source,
            local_only(save_directory, "merge_and_save"),
            dtype,
            tokenizer=module.saved_tokenizer,
            trust_remote_code=module.trust_remote_code,
        )

    def _module_to_save(self) -> HuggingFaceModule:
        module = self.lightning_module
        if not isinstance(module, HuggingFaceModule) or module.model is None:
            raise ValueError(
                "There is no model in this process to save: call fit, validate or test with a Hugging Face model "
                "first. After training in notebook workers, the weights are in the checkpoint that fit returned."
            )
        return module
