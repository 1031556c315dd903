"""Context parallel against plain torch on one device: packed and padded rows, windows, ulysses and ring."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from automodel_trainer import CausalLMModule, Trainer
from tests.harness import Batch, NextToken, adamw, check_steps, close, make_strategy, train_steps, with_limits
from tests.matrix import more
from tests.pool import RankPool
from tests.routers import decided, routed_model
from tests.strategies.test_tensor import LATENT, MOE
from tests.tiny import tiny_model

STEPS, ROWS, MAX_NORM, LR = 2, 4, 0.5, 1e-2
TERMS = 32  # a logit is a sum over the hidden size
FORMATS = {"plain": 24, "packed": 24, "padded": 24, "packed, ragged": 29, "padded, ragged": 29, "plain, ragged": 27}
WINDOW = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
SINGLE_KV = {"num_key_value_heads": 1}
TWO_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}  # fewer heads than ranks: only a ring will do


def rows_of(form: str, seed: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    length = FORMATS[form]
    return [_row(form.partition(",")[0], length, index, generator) for index in range(ROWS)]


def _row(form: str, length: int, index: int, generator: torch.Generator) -> Batch:
    ids = torch.randint(6, 260, (1, length), generator=generator)
    labels = ids.masked_fill(torch.rand(1, length, generator=generator) < 0.3, -100)
    positions = torch.arange(length)[None]
    row = {"input_ids": ids, "labels": labels}
    if form == "packed":
        cuts = sorted(torch.randperm(length - 2, generator=generator)[:3].add(1).tolist())
        for cut in cuts:
            positions[:, cut:] = torch.arange(length - cut)
            labels[:, cut] = -100
        return {**row, "position_ids": positions}
    if form == "padded":
        end = length - 5 * index
        labels[:, end:] = -100
        return {**row, "position_ids": positions, "attention_mask": (positions < end).long()}
    return row


def train(spec: str, world_size: int, family: str, form: str, overrides: dict[str, Any]) -> Any:
    strategy = make_strategy(spec, world_size)
    attention = overrides.pop("attn_implementation", None)
    model = routed_model(family, **overrides)
    if attention:
        model.set_attn_implementation(attention)
    strategy.parallelize(model)
    # eps: Adam turns a gradient of 1e-9, which is rounding, into a full step
    optimizer = adamw(model.parameters(), LR, eps=1e-2)
    with decided(model) if world_size == 1 else nullcontext():
        result = train_steps(
            strategy, NextToken(model), optimizer, lambda step: rows_of(form, step), 2, steps=STEPS, max_norm=MAX_NORM
        )
    return {**result, "method": strategy._context and strategy._context.method}


@pytest.mark.parametrize(
    ("spec", "world_size", "family", "form", "overrides"),
    [
        ("fsdp2:cp=2", 2, "deepseek_v3", "packed", LATENT),
        ("fsdp2:cp=2", 2, "llama", "packed", {"attn_implementation": "eager"}),
        ("fsdp2:cp=2", 2, "phi3", "padded, ragged", {}),
        ("fsdp2:cp=2,activation_checkpointing=full", 2, "qwen3", "packed, ragged", {}),
        ("fsdp2:cp=4", 4, "qwen3", "packed", SINGLE_KV),  # fewer kv heads than ranks
        more("fsdp2:cp=4", 4, "gemma3_text", "packed", WINDOW),
        ("fsdp2:cp=2", 2, "gemma3_text", "padded", WINDOW),
        ("fsdp2:cp=2", 4, "qwen3_moe", "plain, ragged", MOE),  # dp_shard=2 × cp=2
        ("fsdp2:cp=2", 2, "gpt_oss", "plain, ragged", {"num_local_experts": 4}),  # each head has a sink
        ("hsdp:cp=2", 4, "gpt_neox", "packed", {}),
        more("fsdp2:cp=2,cp_attention=ring", 2, "llama", "plain", {}),
        ("fsdp2:cp=2,cp_attention=ring", 2, "qwen3", "packed, ragged", {}),
        ("fsdp2:cp=2,cp_attention=ring,activation_checkpointing=selective", 2, "llama", "padded", {}),
        ("fsdp2:cp=4,cp_attention=ring", 4, "llama", "plain, ragged", {}),
        ("fsdp2_cp", 4, "llama", "packed", TWO_HEADS),
        more("fsdp2:cp=4,cp_attention=ring", 4, "gemma3_text", "packed", WINDOW),
        ("fsdp2:cp=2,cp_attention=ring", 4, "gemma3_text", "padded, ragged", WINDOW),
    ],
)
def test_parity(pool: RankPool, spec: str, world_size: int, family: str, form: str, overrides: dict[str, Any]) -> None:
    expected = with_limits(lambda: train("auto", 1, family, form, dict(overrides)))
    assert expected["method"] is None
    for result in pool.run(world_size, train, spec, world_size, family, form, dict(overrides)):
        check_steps(result, expected)
        ring = "ring" in spec or overrides == TWO_HEADS
        assert result["method"] == ("ring" if ring else "ulysses")


def parallelized(spec: str, family: str, **overrides: Any) -> str:
    """The words of the refusal."""
    try:
        make_strategy(spec, 2).parallelize(tiny_model(family, **overrides))
    except ValueError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    ("spec", "family", "overrides", "words"),
    [
        ("fsdp2:cp=2,cp_attention=ulysses", "llama", {"num_attention_heads": 1, "num_key_value_heads": 1}, "'ring'"),
        ("fsdp2:cp=2,cp_attention=tree", "llama", {}, "Allowed: auto, ulysses, ring"),
        ("fsdp2:cp=2", "lfm2", {"layer_types": ["conv", "full_attention"]}, "conv"),
        ("fsdp2:cp=2", "roberta", {"is_decoder": True}, "count positions by itself"),  # from the padding id on
        ("fsdp2:cp=2", "bert", {"is_decoder": True}, "accepted"),  # learned positions
    ],
)
def test_refusals(pool: RankPool, spec: str, family: str, overrides: dict[str, Any], words: str) -> None:
    for said in pool.run(2, parallelized, spec, family, **overrides):
        assert words in said


def split_and_gather(length: int) -> Any:
    strategy = make_strategy("fsdp2:cp=2", 2)
    model = strategy.parallelize(tiny_model())
    ids = torch.arange(2 * length).view(2, length)
    with strategy.split_sequence({"input_ids": ids, "use_cache": False}, {"next": ids + 1}) as (inputs, targets):
        ids_again = strategy.gather_sequence(inputs["input_ids"], length)
        targets_again = strategy.gather_sequence(targets["next"], length)
        positions = inputs["position_ids"]
    whole = model(input_ids=ids % 260).logits.detach()  # outside of a split the model is what it was
    saved = model.config.to_dict()
    return torch.equal(ids_again, ids) and torch.equal(targets_again, ids + 1), positions, whole, saved


def test_split_and_gather(pool: RankPool) -> None:
    results = pool.run(2, split_and_gather, 7)
    assert all(same for same, *_ in results)
    assert results[0][1][0].tolist() == [0, 1, 6, 7]
    assert results[1][1][0].tolist() == [2, 3, 4, 5]
    expected = tiny_model()(input_ids=torch.arange(14).view(2, 7)).logits
    close(results[1][2], expected.detach(), TERMS)
    assert "amt_cp" not in str(results[0][3])


def split_pixels() -> str:
    strategy = make_strategy("fsdp2:cp=2", 2)
    strategy.parallelize(tiny_model())
    inputs = {"input_ids": torch.zeros(1, 8, dtype=torch.long), "pixel_values": torch.zeros(1, 3, 8, 8)}
    with pytest.raises(ValueError, match="pixel_values") as caught, strategy.split_sequence(inputs, None):
        pass
    return str(caught.value)


def test_inputs_it_cannot_split_are_refused(pool: RankPool) -> None:
    assert "cp=1" in pool.run(2, split_pixels)[0]


def evaluate(spec: str, devices: int) -> Any:
    options = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = Trainer(strategy=spec, accelerator="cpu", devices=devices, **options)
    module = CausalLMModule(tiny_model())
    data = [[row] for row in rows_of("packed, ragged", seed=0)]
    (metrics,) = trainer.validate(module, data, verbose=False)
    scores = trainer.predict(module, data)
    return metrics, torch.cat([scored["log_probs"] for batch in scores for scored in batch])


def test_evaluation_sees_whole_rows(pool: RankPool) -> None:
    metrics, scores = evaluate("auto", 1)
    assert metrics.keys() == {"val_loss", "val_perplexity", "val_token_accuracy"}
    for found, parts in pool.run(2, evaluate, "fsdp2:cp=2", 2):
        for name, value in metrics.items():
            close(torch.tensor(found[name]), torch.tensor(value), TERMS, name)
        close(parts, scores, TERMS)
