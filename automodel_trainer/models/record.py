"""What was done to a model, in one record on the model itself.

The record is an attribute, not a table beside the models, so that a copy (`copy.deepcopy`, a pickle, a model under
fake tensors) has a record of its own. `state_dict` and `config` do not see it. What else we attach to a Hugging Face
model replaces transformers' own methods (to save, to checkpoint activations, to compute the loss), or tells
transformers' Trainer that the model is sharded.

An entry is found by its type, and the package that makes an entry owns the type:

| entry | written by | says |
| --- | --- | --- |
| `lora.LoRAConfig` | `apply_lora` | which adapters the model has |
| `lora.fuse.Fusion` | `apply_kernels` | which adapted layers are to compute in one matmul with their frozen weights |
| `lora.embeddings.SavedEmbeddings` | `apply_lora` | which embeddings are saved with the adapter |
| `lora.embeddings.UntiedHead` | `apply_lora` | which weight is tied in the base and not with the adapter |
| `kernels.KernelsInUse` | `apply_kernels` | what each part computes with |
| `kernels.attention.AttentionAsked` | `build_on_meta` | which attention the caller asked transformers for |
| `quantization.fp8_layers.Fp8Layers` | `convert_to_fp8`, `swap_linear_layers` | which layers multiply in fp8 |
| `parts.FrozenParts` | `freeze_parts` | which parts of a vision-language model the user froze |
| `quantization_config.ReadDense` | `fill_from_folder` | the checkpoint's weights were quantized, and are dense now |
| `sidecars.ModelFolder` | `build_pretrained` | where the model was read from |
| `_masks.PackingWithoutSync` | `packing_without_sync` | documents of packed rows are found without a wait |
| `DefersLogits` | `chunked_loss` | its head can defer its logits |
| `Checkpointed` | `checkpoint_when_asked` | its blocks are checkpointed |
| `modules.balance.Balanced` | `balance_of` | what balances the load of its experts |
| `stage_names.SplitOver` | the 3D strategy | this rank holds some stages of the model |
| `CompiledBlock`, on a block | `compile_blocks` | the training forward of this block is compiled |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

ATTRIBUTE = "_automodel_record"
Entry = TypeVar("Entry")


class ModelRecord:
    """Entries of a model or a block, at most one of each type."""

    def __init__(self) -> None:
        self._entries: dict[type, Any] = {}

    def keep(self, entry: object) -> None:
        """Add an entry, in place of an earlier one of the same type."""
        self._entries[type(entry)] = entry

    def find(self, kind: type[Entry]) -> Entry | None:
        """The entry of this type."""
        return self._entries.get(kind)

    def __repr__(self) -> str:
        return f"ModelRecord({', '.join(map(repr, self._entries.values()))})"


def record_of(module: nn.Module) -> ModelRecord:
    """The record of a model or a block; an empty one is made if there is none."""
    found = getattr(module, ATTRIBUTE, None)
    if not isinstance(found, ModelRecord):
        found = ModelRecord()
        setattr(module, ATTRIBUTE, found)
    return found


def recorded(module: nn.Module, kind: type[Entry]) -> Entry | None:
    """The entry of this type in the record of a model or a block. It leaves a module without a record as it is."""
    found = getattr(module, ATTRIBUTE, None)
    return found.find(kind) if isinstance(found, ModelRecord) else None


@dataclass(frozen=True)
class CompiledBlock:
    """On a block: its training forward is compiled, so layers in it may use what only pays in compiled code."""
