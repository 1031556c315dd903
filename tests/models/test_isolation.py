"""What is proved of a model's rows, for families that keep documents apart and for those that do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import masking_utils

from automodel_trainer import AutoModelForCausalLM, CausalLMModule, ChatDataModule, TextDataModule, Trainer
from automodel_trainer.models import _masks, isolation
from automodel_trainer.models.packed_inputs import document_inputs, lengths_of
from automodel_trainer.modules import isolation as kept
from tests.tiny import tiny_config, tiny_model, tiny_tokenizer

CHATS = [
    {"messages": [{"role": "user", "content": f"number {n}?"}, {"role": "assistant", "content": "a word " * (n + 1)}]}
    for n in range(4)
]
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
APART: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 12, "hidden_size": 512, "num_attention_heads": 16, "head_dim": 32},
    "gpt_oss": {"num_local_experts": 8},
    "gpt2": {},
    "bloom": {"n_head": 4},
    "llama4_text": {"attention_chunk_size": 8192, "num_local_experts": 4},
    "gemma4_text": {"num_hidden_layers": 12},
}
LEAKS: dict[str, tuple[dict[str, Any], str]] = {
    "qwen3_next": ({"num_hidden_layers": 8, "num_experts": 8, "moe_intermediate_size": 32, **LINEAR}, "GatedDeltaNet"),
    "lfm2": ({"num_hidden_layers": 6, "layer_types": ["conv", "conv", "full_attention"] * 2}, "ShortConv"),
    "mamba2": ({"num_heads": 8, "head_dim": 8, "state_size": 16, "n_groups": 2}, "Mamba2Mixer"),
}


def proof(family: str, options: dict[str, Any]) -> isolation.Isolation:
    with torch.device("meta"):
        model = tiny_model(family, **options)
    return CausalLMModule(model, tokenizer=tiny_tokenizer()).isolation


@pytest.mark.parametrize("family", APART)
def test_documents_are_kept_apart(family: str) -> None:
    found = proof(family, APART[family])
    assert (found.packed, found.padded_obstacle, found.causal_obstacle) == ("positions", None, None)


@pytest.mark.parametrize("family", LEAKS)
def test_documents_that_see_each_other(family: str) -> None:
    options, layer = LEAKS[family]
    found = proof(family, options)
    assert found.packed is None
    assert layer in str(found.packed_obstacle)
    assert found.padded_obstacle is None


def test_a_defect_in_the_masks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof runs what training runs: without the document boundaries no family is kept apart."""
    monkeypatch.setattr(_masks, "_document_indices", lambda positions: torch.zeros_like(positions))
    monkeypatch.setattr(kept, "_kept", lambda described, prove: prove())
    found = proof("llama", {})
    assert "a document changes the logits of the next" in str(found.packed_obstacle)


def test_what_sees_the_future_is_not_trained_to_predict_it(tmp_path: Path) -> None:
    trainer = Trainer(default_root_dir=tmp_path, max_steps=1, accelerator="cpu", logger=False)
    bert = CausalLMModule(tiny_model("bert"), tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match=r"predict the next token, and this one sees it.*is_decoder"):
        trainer.fit(bert, ChatDataModule(CHATS))
    assert proof("bert", {"is_decoder": True}).causal_obstacle is None


def test_packed_rows_of_a_model_that_cannot_take_them(tmp_path: Path) -> None:
    options, _ = LEAKS["lfm2"]
    quiet: dict[str, Any] = {"default_root_dir": tmp_path, "max_steps": 1, "accelerator": "cpu", "logger": False}
    module = CausalLMModule(tiny_model("lfm2", **options), tokenizer=tiny_tokenizer())
    for data in (ChatDataModule(CHATS, packing=True), TextDataModule([{"text": "one"}], packing=True)):
        with pytest.raises(ValueError, match=r"packing=True .* cannot keep them apart: .*ShortConv"):
            Trainer(**quiet).fit(module, data)
    with pytest.raises(ValueError, match=r"Streamed rows are packed, and this model cannot .*streaming=False"):
        Trainer(**quiet).fit(module, TextDataModule([{"text": "one"}], streaming=True))
    ids = torch.randint(5, 200, (1, 8))
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])}
    with pytest.raises(ValueError, match=r"position_ids of these rows restart.*ShortConv"):
        Trainer(**quiet).fit(module, [batch])
    with pytest.raises(ValueError, match="packing='maybe' is unknown"):
        ChatDataModule(CHATS, packing="maybe")  # type: ignore[arg-type]


def test_padded_texts_hold_every_token_once() -> None:
    texts = ["a" * 40, "b", "c" * 7, "d" * 16]
    rows = {}
    for packing in (True, False):
        data = TextDataModule(
            [{"text": t} for t in texts], tokenizer=tiny_tokenizer(), seq_len=16, packing=packing, cache=False
        )
        data.prepare()
        rows[packing] = data.rows["train"].fetch(range(len(data.rows["train"])))
    assert all(len(row) == 1 for row in rows[False])
    assert [len(row[0].input_ids) for row in rows[False]] == [16, 16, 9, 2, 8, 16]  # of "d" the last row is one token
    alone = [token for row in rows[False] for token in row[0].input_ids.tolist()]
    packed = [token for row in rows[True] for document in row for token in document.input_ids.tolist()]
    assert alone == packed[:-1]


def test_proofs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the process and on disk, by config; not what nothing proved; a cache that cannot be written is none."""
    runs: list[int] = []

    def prove(config: Any, *_: Any, **__: Any) -> isolation.Isolation:
        runs.append(1)
        checked = config.rms_norm_eps != 0.5
        return isolation.Isolation("M", "positions" if checked else None, checked=checked)

    monkeypatch.setattr(kept, "prove_isolation", prove)
    monkeypatch.setenv("AMT_CACHE", str(tmp_path))
    monkeypatch.setattr(kept, "_known", {})
    proof("llama", {}), proof("llama", {})
    assert len(runs) == 1
    kept._known.clear()
    assert proof("llama", {}).packed == "positions"
    assert len(runs) == 1
    proof("llama", {"rms_norm_eps": 1e-3})
    assert len(runs) == 2
    proof("llama", {"rms_norm_eps": 0.5})
    kept._known.clear()
    assert not proof("llama", {"rms_norm_eps": 0.5}).checked
    assert len(runs) == 4
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AMT_CACHE", str(tmp_path / "file"))
    kept._known.clear()
    assert proof("llama", {}).packed == "positions"


def test_masks_that_are_more_than_documents_and_a_window() -> None:
    numbers = torch.tensor([[0, 0, 1, 1]])
    positions = torch.tensor([[0, 1, 0, 1]])

    def packed(function: Any) -> Any:
        return masking_utils.packed_sequence_compatibility_function(function, positions, numbers)

    causal = masking_utils.causal_mask_function
    assert _masks.is_plain(packed(causal))
    assert _masks.is_plain(packed(masking_utils.sliding_window_causal_mask_function(2)))
    assert not _masks.is_plain(packed(masking_utils.chunked_causal_mask_function(2, torch.zeros(1))))
    assert not _masks.is_plain(masking_utils.bidirectional_mask_function)
    spans = masking_utils.blockwise_overlay(torch.tensor([[0, 0, -1, -1]]))
    assert not _masks.is_plain(masking_utils.or_masks(packed(causal), spans))
    assert not _masks.is_plain(masking_utils.and_masks(causal, lambda b, h, q, k: q >= 0))


def test_document_inputs() -> None:
    positions = torch.tensor([[0, 1, 0], [0, 1, 2]])
    assert lengths_of(positions) == [[2, 1], [3]]
    given = {"input_ids": torch.arange(6).view(2, 3), "position_ids": positions, "use_cache": False}
    made = document_inputs(given, lengths_of(positions))
    assert made["input_ids"].tolist() == [[0, 1, 2, 3, 4, 5]]
    assert made["position_ids"].tolist() == [[0, 1, 0, 0, 1, 2]]
    assert made["cu_seq_lens_q"].tolist() == made["cu_seq_lens_k"].tolist() == [0, 2, 3, 6]
    assert made["seq_idx"].tolist() == [[0, 0, 1, 2, 2, 2]]
    assert (made["max_length_q"], made["use_cache"]) == (3, False)


def test_random_weights_that_a_parent_draws() -> None:
    """Of some routers the block around them has the rule; nothing may start from what was in memory."""
    options, _ = LEAKS["qwen3_next"]
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3_next", **options))
    routers = [p for name, p in model.named_parameters() if name.endswith("mlp.gate.weight")]
    assert routers
    for router in routers:
        assert router.std().item() == pytest.approx(0.02, rel=0.3)
    with pytest.raises(ValueError, match=r"no rule to draw random values of .*alpha_p"):
        AutoModelForCausalLM.from_config(tiny_config("apertus"))


def test_buffers_that_a_parent_fills() -> None:
    """A buffer that no checkpoint holds is as the constructor makes it, wherever the rule for it is."""
    sizes = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
    config = tiny_config("falcon_h1", ssm_multipliers=[0.5, 2.0, 3.0, 4.0, 5.0], **sizes)
    ours = dict(AutoModelForCausalLM.from_config(config).named_buffers())
    theirs = dict(transformers.AutoModelForCausalLM.from_config(config).named_buffers())
    assert ours.keys() == theirs.keys()
    for name, buffer in theirs.items():
        torch.testing.assert_close(ours[name], buffer)
