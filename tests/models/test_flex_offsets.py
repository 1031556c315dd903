"""Rows whose tokens lie so far apart that FlexAttention's 32 bits would not reach them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations import flex_attention as flex_integration

from automodel_trainer.models._masks import packing_without_sync
from automodel_trainer.models.kernels import attention, flex_offsets
from automodel_trainer.models.kernels.attention import install_attention_kernel
from automodel_trainer.models.kernels.flex_offsets import head_by_head, passes_32_bits
from tests.flex_written_out import written_out
from tests.harness import close
from tests.tiny import tiny_model


@pytest.mark.parametrize(
    ("heads", "head_size", "tokens", "far"),
    [(32, 128, 524_288, False), (32, 128, 524_289, True), (64, 128, 262_145, True), (8, 128, 1_048_576, False)],
)
def test_which_rows(heads: int, head_size: int, tokens: int, far: bool) -> None:
    side_by_side = torch.empty(1, tokens, heads, head_size, device="meta").transpose(1, 2)
    assert passes_32_bits(side_by_side) == far
    assert passes_32_bits(side_by_side.contiguous()) == far, "a compiler may lay the heads side by side"


def test_a_slice_of_a_wider_projection() -> None:
    """Query, key and value of one projection lie three times as far apart."""
    together = torch.empty(1, 262_144, 3, 32, 128, device="meta")
    assert passes_32_bits(together[:, :, 0].transpose(1, 2))


def asked_for_sums(options: dict[str, Any]) -> bool:
    return options.get("return_aux") is not None and options["return_aux"].lse


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_far_rows(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel gets tensors and a gradient whose tokens lie side by side, and the numbers stay."""
    monkeypatch.setattr(attention, "_HALF", (torch.float32,))
    strides: list[tuple[int, ...]] = []

    def recorded(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        strides.extend(tensor.stride() for tensor in (query, key, value))
        out, aux = written_out(query, key, value, **{"scale": query.shape[-1] ** -0.5} | options)
        out.register_hook(lambda gradient: strides.append(gradient.stride()))
        return (out, aux) if asked_for_sums(options) else out

    monkeypatch.setattr(flex_integration, "compile_friendly_flex_attention", recorded)
    model = tiny_model(family)
    packing_without_sync(model)
    install_attention_kernel(model)
    ids = torch.randint(5, 260, (1, 268), generator=torch.Generator().manual_seed(2))
    positions = torch.cat([torch.arange(n) for n in (100, 28, 140)])[None]

    def run() -> list[Tensor]:
        strides.clear()
        model.zero_grad()
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        logits.logsumexp(-1).mean().backward()
        return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    near = run()
    monkeypatch.setattr(flex_offsets, "LIMIT", 1000)
    far = run()
    layers = model.config.num_hidden_layers
    assert len(strides) == 4 * layers
    assert all(stride[2] == model.config.head_dim for stride in strides), strides
    for found, wanted in zip(far, near, strict=True):
        close(found, wanted, 256)


def test_the_copy_is_an_operator_of_its_own() -> None:
    tensor = torch.randn(1, 6, 4, 8, requires_grad=True)
    torch.library.opcheck(head_by_head, (tensor.transpose(1, 2),))
