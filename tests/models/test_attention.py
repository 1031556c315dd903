"""Block masks against masks written out, and models that attend through them against transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from transformers.integrations import flex_attention as flex_integration
from transformers.masking_utils import eager_mask

from automodel_trainer.models._masks import packing_without_sync
from automodel_trainer.models._transformers import attention_in_use
from automodel_trainer.models.build import build_on_meta
from automodel_trainer.models.kernels import KernelsConfig, apply_kernels, attention
from automodel_trainer.models.kernels.attention import NAME, document_block_mask, install_attention_kernel
from tests.flex_written_out import written_out
from tests.harness import close
from tests.tiny import tiny_model
from tests.vlm.families import model_of


def _plain_flex(*args: Any, training: bool = False, **kwargs: Any) -> Any:
    return flex_attention(*args, **kwargs)


def documents(lengths: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Positions and document numbers `[b, s]` of rows of documents."""
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    numbers = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])
    return positions, numbers


def seen(numbers: Tensor, window: int | None) -> Tensor:
    """bool `[b, s, s]`: what a query may look at."""
    place = torch.arange(numbers.shape[1])
    distance = place[:, None] - place[None, :]
    mask = (distance >= 0) & (numbers[:, :, None] == numbers[:, None, :])
    return mask if window is None else mask & (distance < window)


@pytest.mark.parametrize("window", [None, 1, 100, 128, 129, 300, 5000])
@pytest.mark.parametrize(
    "lengths",
    [
        [[512]],
        [[128, 128, 256], [1, 127, 384]],
        [[100, 412], [511, 1]],
        [[300, 300, 1, 39], [640]],  # a length that is no multiple of the block
        [[3] * 43, [129]],
    ],
)
def test_block_mask(lengths: list[list[int]], window: int | None) -> None:
    """Every block is listed as what it is, and the function that masks within blocks is right."""
    _, numbers = documents(lengths)
    mask = document_block_mask(numbers, window)
    wanted = seen(numbers, window)
    rows, length = numbers.shape
    b = torch.arange(rows)[:, None, None]
    query, key = torch.arange(length)[:, None], torch.arange(length)
    torch.testing.assert_close(mask.mask_mod(b, torch.zeros(()), query, key), wanted)
    blocks = -(-length // 128)
    padded = torch.zeros(rows, blocks * 128, blocks * 128, dtype=torch.bool)
    padded[:, :length, :length] = wanted
    tiles = padded.unflatten(1, (blocks, 128)).unflatten(3, (blocks, 128)).transpose(2, 3)
    whole, some = tiles.flatten(3).all(-1), tiles.flatten(3).any(-1)

    def listed(count: Any, which: Any) -> Tensor:
        found = torch.zeros(rows, blocks, blocks, dtype=torch.bool)
        for r in range(rows):
            for q in range(blocks):
                found[r, q, which[r, 0, q, : count[r, 0, q]].long()] = True
        return found

    full = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    partial = listed(mask.kv_num_blocks, mask.kv_indices)
    assert not (full & ~whole).any(), "a block that is not whole is not masked"
    assert not (full & partial).any()
    torch.testing.assert_close(full | partial, some)
    assert full.sum() >= 0.5 * (whole.sum() if length % 128 == 0 else 0), "most whole blocks are known to be whole"


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3", "gpt_neox", "mistral"])
def test_models(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed rows give the logits that transformers' own masks give, and no mask of s × s is made."""
    monkeypatch.setattr(attention, "_HALF", (torch.float32,))
    # uncompiled: the same numbers, without the minutes that a C++ compiler takes
    monkeypatch.setattr(flex_integration, "compile_friendly_flex_attention", _plain_flex)
    options: dict[str, Any] = {"sliding_window": 40} if family in ("gemma3_text", "mistral") else {}
    model = tiny_model(family, attn_implementation="sdpa", **options).eval()
    packing_without_sync(model)
    lengths = [[100, 28, 140], [1, 200, 67]]
    positions, _ = documents(lengths)
    ids = torch.randint(5, 260, positions.shape)
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    with torch.no_grad():
        wanted = model(**inputs).logits
        alone = model(input_ids=ids[:, 100:128][:1], use_cache=False).logits
        install_attention_kernel(model)
        monkeypatch.setattr(attention, "sdpa_mask", None)  # it would be called for a whole mask
        out = model(**inputs).logits
    close(out, wanted)
    close(out[:1, 100:128], alone)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_decoders_beside_a_tower(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where transformers does not say so of the whole class."""
    monkeypatch.setattr(attention, "_HALF", (torch.float32,))
    monkeypatch.setattr(flex_integration, "compile_friendly_flex_attention", _plain_flex)
    model = model_of(family).eval()
    packing_without_sync(model)
    positions, _ = documents([[100, 28, 140], [1, 200, 67]])
    ids = torch.randint(3, 250, positions.shape)
    if family == "qwen2_5_vl":
        positions = positions.expand(4, -1, -1)
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    with torch.no_grad():
        wanted = model(**inputs).logits
        install_attention_kernel(model)
        monkeypatch.setattr(attention, "sdpa_mask", None)  # it would be called for a whole mask
        close(model(**inputs).logits, wanted)


def test_other_rows_go_to_sdpa() -> None:
    model = tiny_model("llama", attn_implementation="sdpa").eval()
    packing_without_sync(model)
    ids = torch.randint(5, 260, (2, 30))
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    wanted = model(input_ids=ids).logits, model(input_ids=ids, attention_mask=mask).logits
    install_attention_kernel(model)
    close(model(input_ids=ids).logits, wanted[0])
    close(model(input_ids=ids, attention_mask=mask).logits, wanted[1])


def test_choice() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    model = tiny_model("llama")
    apply_kernels(model, KernelsConfig(), cpu)
    assert attention_in_use(model) == "sdpa"
    with pytest.raises(ValueError, match="attention='flex' needs a GPU"):
        apply_kernels(model, KernelsConfig(attention="flex"), cpu)
    apply_kernels(model, KernelsConfig(), gpu)
    assert attention_in_use(model) == NAME
    apply_kernels(model, KernelsConfig(attention="eager"), gpu)
    assert attention_in_use(model) == "eager"
    for options, reason in (({"attention_dropout": 0.1}, "dropout"), ({"attn_implementation": "eager"}, "'eager'")):
        model = tiny_model("llama", **options)
        with pytest.raises(ValueError, match=reason):
            apply_kernels(model, KernelsConfig(attention="flex"), gpu)
        apply_kernels(model, KernelsConfig(), gpu)
        assert attention_in_use(model) != NAME


@pytest.mark.parametrize("family", ["gpt_oss", "granite_swa", "gemma2"])
def test_sinks_and_soft_caps(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `sdpa` does not do, all rows without padding go through blocks: logits and gradients are the eager ones."""
    monkeypatch.setattr(attention, "_HALF", (torch.float32,))
    monkeypatch.setattr(flex_integration, "compile_friendly_flex_attention", written_out)
    model = tiny_model(family, sliding_window=40, attn_logit_softcapping=2.0)
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            torch.nn.init.uniform_(parameter, -1, 3, generator=torch.Generator().manual_seed(1))
        elif "q_proj.weight" in name:
            parameter.data *= 20  # scores that differ, and reach the cap
    packing_without_sync(model)
    ids = torch.randint(5, 260, (2, 268), generator=torch.Generator().manual_seed(2))
    positions, _ = documents([[100, 28, 140], [1, 200, 67]])
    padding = torch.ones_like(ids)
    padding[1, 200:] = 0
    kinds = [{"position_ids": positions}, {}, {"attention_mask": padding}]

    def run(inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        logits = model(input_ids=ids, use_cache=False, **inputs).logits
        (logits[0].logsumexp(-1).mean() + logits[1, :200].logsumexp(-1).mean()).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return logits.detach(), gradients

    wanted = [run(inputs) for inputs in kinds]
    install_attention_kernel(model)
    calls = []
    monkeypatch.setattr(attention, "eager_mask", lambda **k: calls.append(1) or eager_mask(**k))
    for inputs, (logits, gradients) in zip(kinds, wanted):
        calls.clear()
        got, found = run(inputs)
        assert bool(calls) == ("attention_mask" in inputs)
        close(got[0], logits[0], 256, name=f"logits of {[*inputs]}")
        for name, gradient in gradients.items():
            close(found[name], gradient, 4096, name=f"{name} with {[*inputs]}")
    monkeypatch.setattr(flex_integration, "compile_friendly_flex_attention", _plain_flex)
    with torch.no_grad():
        close(model(input_ids=ids, **kinds[0], use_cache=False).logits, wanted[0][0], 256, name="logits of torch's own")
    cached = model.generate(ids[:1, :50], max_new_tokens=4, do_sample=False)
    model.set_attn_implementation("eager")
    assert torch.equal(cached, model.generate(ids[:1, :50], max_new_tokens=4, do_sample=False))


def test_choice_where_sdpa_does_not_do() -> None:
    gpu = torch.device("cuda")
    model = tiny_model("gpt_oss")
    assert attention_in_use(model) == "eager"
    apply_kernels(model, KernelsConfig(), gpu)
    assert attention.attention_text(attention_in_use(model)) == "FlexAttention"
    with pytest.raises(ValueError, match="soft caps, sinks"):
        apply_kernels(tiny_model("gpt_oss"), KernelsConfig(attention="cudnn"), gpu)
    asked = build_on_meta("AutoModelForCausalLM", model.config, torch.float32, "eager", False)
    apply_kernels(asked, KernelsConfig(), gpu)
    assert attention_in_use(asked) == "eager"
