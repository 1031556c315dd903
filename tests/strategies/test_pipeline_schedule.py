"""Schedules, splits and pictures: what can be known without any rank."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch

from automodel_trainer.strategies.pipeline.picture import html_picture, schedule_facts, text_picture
from automodel_trainer.strategies.pipeline.rehearsal import check_stages
from automodel_trainer.strategies.pipeline.schedule import (
    SCHEDULES,
    check_micro_batches,
    min_micro_batches,
    order_of_work,
)
from automodel_trainer.strategies.pipeline.split import balanced_counts, even_counts, find_parts, layer_costs
from automodel_trainer.tools.pipeline import main
from tests.tiny import tiny_model


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_rank_does_all_of_its_work(name: str, ranks: int) -> None:
    per_rank = 2 if SCHEDULES[name].looped else 1
    micro_batches = 2 * min_micro_batches(name, ranks, per_rank)
    done: dict[tuple[int, int], float] = {}
    for works in order_of_work(name, ranks, per_rank, micro_batches):
        for work in works:
            share = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}[work.kind]
            done[work.stage, work.micro_batch] = done.get((work.stage, work.micro_batch), 0) + share
    assert done == {(stage, m): 3.0 for stage in range(ranks * per_rank) for m in range(micro_batches)}


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("micro_batches", [8, 32])
def test_predicted_bubbles_are_those_of_the_papers(ranks: int, micro_batches: int) -> None:
    """(p − 1) / (m + p − 1) for GPipe and 1F1B (arXiv 2104.04473, § 2.2), over v with v stages per rank."""

    def bubble(name: str, per_rank: int) -> float:
        return schedule_facts(name, ranks, per_rank, micro_batches)[1]

    p, m = ranks, micro_batches
    assert bubble("1f1b", 1) == pytest.approx((p - 1) / (m + p - 1))
    assert bubble("gpipe", 1) == pytest.approx((p - 1) / (m + p - 1))
    assert bubble("interleaved_1f1b", 2) == pytest.approx((p - 1) / (2 * m + p - 1))
    assert bubble("interleaved_zero_bubble", 2) < bubble("interleaved_1f1b", 2)


def test_a_dear_stage_makes_the_others_wait() -> None:
    assert schedule_facts("1f1b", 2, 1, 8, [0.5, 1.5])[1] > schedule_facts("1f1b", 2, 1, 8)[1] + 0.2


@pytest.mark.parametrize("name", ["zbv", "interleaved_zero_bubble", "dualpipev"])
def test_whole_backwards_where_split_ones_would_be(name: str) -> None:
    split, little = schedule_facts(name, 2, 2, 8)
    whole, more = schedule_facts(name, 2, 2, 8, whole_backward=True)
    assert little < more < 0.2
    assert {t.work.kind for t in whole} == {"F", "B"}
    assert sum(t.end - t.start for t in whole) == sum(t.end - t.start for t in split)


def test_micro_batches_that_cannot_be_dealt_out() -> None:
    check_micro_batches("interleaved_1f1b", 4, 2, 8)
    with pytest.raises(ValueError, match="a multiple of 4 micro-batches"):
        check_micro_batches("interleaved_1f1b", 4, 2, 9)
    with pytest.raises(ValueError, match=r"at least 8 micro-batches .* splits into 7"):
        check_micro_batches("dualpipev", 4, 2, 7)


def test_text_picture() -> None:
    timed, _ = schedule_facts("1f1b", 2, 1, 3)
    assert text_picture(timed) == ["01··aa2bb·cc", "·0aa1bb2cc··"]
    assert text_picture(timed, columns=3) == ["01·…", "·0a…"]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--schedule", "zbv", "--pp", "2", "--micro-batches", "4", "--html", str(tmp_path / "page.html")])
    assert "predicted bubble 4.0%" in capsys.readouterr().out
    page = (tmp_path / "page.html").read_text()
    assert page.count("<i ") == 4 * 4 * 3 - 4  # stage 0 computes both halves of a backward at once
    assert "<script" not in html_picture(*[schedule_facts("1f1b", 2, 1, 2)[0], "a <b> title"])


# --- splits -----------------------------------------------------------------------------------------------------------


def test_even_counts() -> None:
    assert even_counts(8, 4) == [2, 2, 2, 2]
    assert even_counts(10, 4) == [2, 3, 3, 2]


def test_balanced_counts_are_the_best_there_are() -> None:
    costs, first, last, stages = [1.0, 1.0, 2.0, 1.0, 1.0, 3.0, 1.0], 0.5, 2.5, 3

    def dearest(counts: list[int]) -> float:
        ends = [sum(counts[: i + 1]) for i in range(stages)]
        parts = [sum(costs[end - n : end]) for end, n in zip(ends, counts)]
        return max(parts[0] + first, *parts[1:-1], parts[-1] + last)

    every = [[a, b - a, len(costs) - b] for a, b in combinations(range(1, len(costs)), 2)]
    found = balanced_counts(costs, first, last, stages)
    assert found in every
    assert dearest(found) == min(map(dearest, every))


def test_costs_count_what_a_token_multiplies() -> None:
    model = tiny_model(
        "qwen3_moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=1
    )
    layers, first, last = layer_costs(model, find_parts(model))
    attention = 32 * (4 + 2 + 2 + 4) * 8
    mlp = 2 * 3 * 32 * 16 + 8 * 32  # two experts, and the router
    assert layers == [attention + mlp] * 2
    assert (first, last) == (0, 264 * 32)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "opt"])
def test_parts_are_found_by_plan_or_by_running(family: str) -> None:
    with torch.device("meta"):
        parts = find_parts(tiny_model(family, ffn_dim=64) if family == "opt" else tiny_model(family))
    expected = {
        "llama": ("model.layers", {"model.embed_tokens"}, {"model.norm", "lm_head"}),
        "gpt_neox": ("gpt_neox.layers", {"gpt_neox.embed_in"}, {"gpt_neox.final_layer_norm", "lm_head"}),
        "gpt2": ("transformer.h", {"transformer.wte", "transformer.wpe"}, {"transformer.ln_f", "lm_head"}),
        "opt": (
            "model.decoder.layers",
            {"model.decoder.embed_tokens", "model.decoder.embed_positions"},
            {"model.decoder.final_layer_norm", "lm_head"},
        ),
    }[family]
    assert (parts.layers, set(parts.before), set(parts.after)) == expected


def test_a_tied_head_that_comes_first_is_refused() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    find_parts(model)
    model._modules = dict(reversed(model._modules.items()))
    with pytest.raises(ValueError, match=r"declares its head before its embeddings, and they share lm_head.weight"):
        find_parts(model)


def test_a_head_with_parts_and_a_bias_of_its_own_is_one_part() -> None:
    with torch.device("meta"):
        model = tiny_model("bert", is_decoder=True)
    assert find_parts(model).after == ("cls.predictions",)
    check_stages(model)


def test_what_layers_share_beside_hidden_states_is_refused() -> None:
    """Each layer of this family also takes an embedding of its own of the tokens."""
    with torch.device("meta"):
        model = tiny_model("gemma4_text", hidden_size_per_layer_input=8, vocab_size_per_layer_input=264)
    with pytest.raises(ValueError, match=r"stages of one layer.* Use fsdp2, or tp"):
        check_stages(model)


def test_a_model_that_scales_its_embeddings_in_place() -> None:
    with torch.device("meta"):
        check_stages(tiny_model("ctrl", dff=64, n_embd=32, n_layer=2, n_head=4))


def test_encoder_decoders_are_refused() -> None:
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    config = AutoConfig.for_model("t5", d_model=16, d_ff=16, num_layers=2, num_heads=2, d_kv=8, vocab_size=32)
    with torch.device("meta"), pytest.raises(ValueError, match="Use fsdp2"):
        find_parts(AutoModelForSeq2SeqLM.from_config(config))
