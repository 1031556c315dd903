"""Try a model out on shards of rows, on a small copy and in one process."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from automodel_trainer.models._transformers import has_tower
from automodel_trainer.models.rehearsal import logits_of, rehearse
from automodel_trainer.models.small_copy import text_inputs
from automodel_trainer.strategies.context.at_decoder import split_at_decoder
from automodel_trainer.strategies.context.attention import Sequences, exchanging, replace_attention

SHARDS = 2


def check_shards(model: PreTrainedModel) -> None:
    """Check that a model gives the same numbers for a row in shards as for the whole row.

    Raises:
        ValueError: it does not.
    """
    found = rehearse(model, "shards", _in_shards)
    if found is not None:
        raise ValueError(
            f"cp > 1 splits rows into shards, and a small copy of {type(model).__name__} on shards {found}. It may "
            "count positions by itself instead of by position_ids, or mix tokens outside of attention. Set cp=1, and "
            "use fsdp2 or tp instead."
        )
    if has_tower(model) and (found := rehearse(model, "text", _by_text)) is not None:
        raise ValueError(
            f"cp > 1 gives ranks other tokens of a row, and a small copy of {type(model).__name__} on tokens of text "
            f"{found}. A rank without tokens of pictures would lack gradients that others sum over ranks. Set cp=1, "
            "and use fsdp2, tp or ep instead."
        )


def _by_text(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The logits for rows of text.

    Raises:
        ValueError: they do not reach all of the decoder's parameters, as where tokens of pictures have experts of their
            own.
    """
    with torch.enable_grad():
        logits = logits_of(model(**text_inputs(model, ids)))
        logits.sum().backward()
    trained = {name: parameter for name, parameter in model.get_decoder().named_parameters() if parameter.requires_grad}
    if unreached := [name for name, parameter in trained.items() if parameter.grad is None]:
        raise ValueError(f"{len(unreached)} parameters of the decoder are not reached: {unreached[0]}, …")
    return logits.detach()


def _in_shards(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The logits for rows `[b, s]` of which a process holds all shards, one after another along the batch."""
    try:
        replace_attention(model)
    except ValueError:  # `install_attention` says it of the model itself
        return logits_of(model(**text_inputs(model, ids)))
    rows, length = ids.shape
    chunks = torch.arange(length).chunk(2 * SHARDS)
    shards = [torch.cat([chunks[i], chunks[2 * SHARDS - 1 - i]]) for i in range(SHARDS)]

    def cut(tensor: Tensor, dim: int) -> Tensor:
        return torch.cat([tensor.index_select(dim, shard) for shard in shards], dim - 1)

    order = torch.cat(shards)
    positions = torch.arange(length).expand(rows, -1)
    sequences = Sequences(None, "ulysses", order, positions, None, None)
    if has_tower(model):
        split_at_decoder(model)
        sequences.cut = cut
        inputs = {"input_ids": ids}
    else:
        mask = torch.ones(SHARDS * rows, length // SHARDS, dtype=torch.long)
        inputs = {"input_ids": cut(ids, 1), "position_ids": cut(positions, 1), "attention_mask": mask}
    with exchanging(sequences):
        output = model(**inputs)
    return torch.cat(logits_of(output).chunk(SHARDS), dim=1)[:, order.argsort()]
