"""Bytes that a block keeps from its forward to its backward, with activation checkpointing.

The compiler decides what is kept, so each case compiles a model, which takes seconds.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from automodel_trainer.callbacks import Ledger, block_memory
from automodel_trainer.models._masks import packing_without_sync
from automodel_trainer.models.kernels import KernelsConfig, apply_kernels
from automodel_trainer.models.kernels.fp8 import convert_to_fp8
from automodel_trainer.models.lora import LoRAConfig, adapters, apply_lora, finish_lora
from automodel_trainer.models.lora.fuse import Fusion
from automodel_trainer.models.quantization.quantize import quantized
from automodel_trainer.models.record import record_of
from automodel_trainer.nn.shared_input import layers_with_one_input
from automodel_trainer.nn.step_cache import unchanged_weights
from automodel_trainer.strategies.base.activation_checkpointing import apply_activation_checkpointing
from automodel_trainer.strategies.base.compile import compile_blocks
from tests.beside import use
from tests.callbacks.test_ledger import fit
from tests.tiny import tiny_model

TOKENS, WIDTH = 256, 64
INPUT = TOKENS * WIDTH * 4
SIZES = {"hidden_size": WIDTH, "intermediate_size": 224, "num_hidden_layers": 3, "head_dim": 16}
SIZES |= {"num_key_value_heads": 1, "tie_word_embeddings": False}


def kept(
    kernel: str, *, mode: str | None, compiled: bool = True, packed: bool = False, fp8: bool = False, nf4: bool = False
) -> float:
    """What the second of three blocks keeps, as a multiple of its input."""
    torch._dynamo.reset()
    model: Any = tiny_model(**SIZES)
    apply_lora(model, LoRAConfig(rank=4))
    for adapter in adapters(model) if nf4 else ():
        adapter.module.register_parameter("weight", quantized(adapter.module.weight, "nf4"))  # type: ignore[arg-type]
    if fp8:
        convert_to_fp8(model, "tensorwise", torch.device("cpu"), emulate=True)
        names = [adapter.target for adapter in adapters(model)]
        record_of(model).keep(Fusion(kernel, layers_with_one_input(model, names)))
    else:
        apply_kernels(model, KernelsConfig(lora=kernel), torch.device("cpu"))
    finish_lora(model)
    packing_without_sync(model)
    model.enable_input_require_grads()  # of the first block as of the others: the compiler takes one for all
    if mode is not None:
        apply_activation_checkpointing(model, mode)  # type: ignore[arg-type]
    if compiled:
        compile_blocks(model, "aot_eager")
    positions = torch.arange(TOKENS) % (TOKENS // 2 if packed else TOKENS)
    inputs = {"input_ids": torch.arange(TOKENS)[None], "use_cache": False}
    inputs |= {"position_ids": positions[None]} if packed else {}
    model.train()
    with unchanged_weights():  # as in an optimizer step: what fused adapters copy of their factors is copied once
        model(**inputs).logits.sum().backward()  # compiles
        return watched(model, inputs) / INPUT


def watched(model: Any, inputs: dict[str, Any]) -> int:
    """Bytes that autograd saves in the second block's forward."""
    held, seen, starts = weights(model), {}, []  # type: ignore[var-annotated]
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda *_: starts.append(dict(seen)))

    def note(tensor: Tensor) -> Tensor:
        for part in parts_of(tensor):
            storage = part.untyped_storage()
            if storage.data_ptr() not in held:
                seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(**inputs).logits.sum()
    loss.backward()
    return sum(size for key, size in starts[2].items() if key not in starts[1])


def parts_of(tensor: Tensor) -> list[Tensor]:
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [getattr(tensor, name) for name in names]


def weights(model: Any) -> set[int]:
    """Addresses of what is there before the forward: parameters, and what fused adapters hold."""
    groups = {id(m.fused): m.fused for m in model.modules() if getattr(m, "fused", None) is not None}
    tensors = [*model.parameters(), *(t for g in groups.values() for t in vars(g).values() if isinstance(t, Tensor))]
    return {part.untyped_storage().data_ptr() for tensor in tensors for part in parts_of(tensor)}


def test_full_checkpointing_keeps_the_block_s_input() -> None:
    """Compiled or not, with adapters apart or fused (in autograd functions), in fp8 and for packed rows."""
    assert kept("separate", mode="full", compiled=False) == 1
    assert kept("separate", mode=None, compiled=False) > 15
    for options in ({"kernel": "separate"}, {"kernel": "fused", "packed": True}, {"kernel": "fused", "fp8": True}):
        assert 1 <= kept(**options, mode="full") < 1.1, options  # and the state of the random generator


def test_selective_checkpointing_keeps_no_cheap_matmuls() -> None:
    """The results of adapters are as wide as those of their frozen weights, and cheap."""
    selective, fused = kept("separate", mode="selective"), kept("fused", mode="selective")
    # q, k and v; attention; the output projection; gate and up; down; the input: 1.5 + 1 + 1 + 7 + 1 + 1
    assert selective < 12.6
    assert abs(selective - fused) < 1


def test_a_4_bit_base_is_not_kept_as_dense_weights() -> None:
    use("torchao")
    assert kept("separate", mode=None, nf4=True) < kept("separate", mode=None) + 0.5


def test_the_ledger_says_what_a_block_keeps(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_use = iter([0, 1 * 2**20, 4 * 2**20, 6 * 2**20])  # the first block also holds what all share
    monkeypatch.setattr(block_memory, "allocated", lambda device: next(in_use, 0))
    facts = fit(tiny_model(num_hidden_layers=3), Ledger(), tmp_path).facts
    assert facts["run"]["bytes_per_block"] == 2.5 * 2**20
    assert "a block keeps 2.5 MiB until its backward" in capsys.readouterr().out
    monkeypatch.undo()
    assert fit(tiny_model(), Ledger(), tmp_path).facts["run"]["bytes_per_block"] is None
