"""`amt export --gguf` and `--serve`: what other programs read is the model, or it is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from automodel_trainer.tools import _gguf as gguf_file
from automodel_trainer.tools import serve_check
from automodel_trainer.tools._gguf import write_gguf
from automodel_trainer.tools.export import main
from tests.tiny import CHATML, tiny_model

TEXT = "the 12 cats the 345 the"


def tokenizer(*rules: Any) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<unk>", "<|im_start|>", "<|im_end|>", *alphabet, "th", "the"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("t", "h"), ("th", "e")]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(rules)) if len(rules) > 1 else rules[0]
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    made.chat_template = CHATML
    return made


def byte_level() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def saved(root: Path, family: str, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    tiny_model(family, eos_token_id=2, bos_token_id=1, pad_token_id=None, **options).to(dtype).save_pretrained(root)
    tokenizer(pre_tokenizers.Digits(individual_digits=True), byte_level()).save_pretrained(root)
    return root


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"head_dim": 16}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 128}),
    ],
    ids=["tied", "wide heads", "qwen2", "qwen3"],
)
def test_transformers_reads_the_same_model(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    dtype = torch.bfloat16 if family == "qwen2" else torch.float32
    folder = saved(tmp_path / "model", family, dtype, **options)
    file = write_gguf(folder)
    assert [path.name for path in folder.glob("*.gguf")] == ["model.gguf"]
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32).eval()
    own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]])
    with torch.no_grad():
        assert torch.equal(read(ids).logits, own(ids).logits)
    fields = gguf.GGUFReader(str(file))
    rule = "qwen2" if family == "qwen2" else "smollm"  # transformers' class of this family brings its own rule
    assert fields.get_field("tokenizer.ggml.pre").contents() == rule  # type: ignore[union-attr]
    assert fields.get_field("tokenizer.chat_template").contents() == CHATML  # type: ignore[union-attr]
    assert fields.get_field("tokenizer.ggml.merges").contents() == ["t h", "th e"]  # type: ignore[union-attr]
    norms = [tensor for tensor in fields.tensors if "norm" in tensor.name]
    assert {tensor.tensor_type.name for tensor in norms} == {"F32"}


def test_a_file_that_reads_back_otherwise_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "model", "llama")
    array = gguf_file._array
    monkeypatch.setattr(gguf_file, "_array", lambda name, tensor, _: array(name, tensor, None))  # pairs as they were
    with pytest.raises(ValueError, match=r"self_attn\.[kq]_proj\.weight.* read back from GGUF differ"):
        write_gguf(folder)
    assert not list(folder.glob("*gguf*"))


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("gemma2", {}, "cannot write the family 'gemma2'|full attention in every layer"),
        ("opt", {}, "does not know the family 'opt'|no name for the weight"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "plain rotary"),
        ("qwen3", {"head_dim": 16}, "transformers cannot read this model from GGUF"),
        ("llama", {"attention_bias": True}, "GGUF does not keep attention_bias"),
    ],
)
def test_what_it_cannot_hold_is_refused(tmp_path: Path, family: str, options: dict[str, Any], message: str) -> None:
    folder = saved(tmp_path / "model", family, **options)
    with pytest.raises(ValueError, match=message):
        write_gguf(folder)
    assert not list(folder.glob("*gguf*"))


def test_tokenizers_that_llama_cpp_has_no_name_for(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "llama")
    tokenizer(pre_tokenizers.Whitespace(), byte_level()).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"split text as gpt-2, smollm, llama-bpe, qwen2 do, and this one is BPE"):
        write_gguf(folder)


class Engine:
    """A stand-in for vLLM's offline engine: it answers with what transformers computes, off by `error`."""

    error = 0.0

    def __init__(self, model: str, **_: Any) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model).eval()

    def generate(self, prompts: list[dict[str, Any]], parameters: Any) -> list[Any]:
        assert parameters.prompt_logprobs == 1
        outputs = []
        for prompt in prompts:
            ids = prompt["prompt_token_ids"]
            with torch.no_grad():
                found = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
            steps = [
                {token: SimpleNamespace(logprob=float(row[token]) + self.error)} for row, token in zip(found, ids[1:])
            ]
            outputs.append(SimpleNamespace(prompt_logprobs=[None, *steps]))
        return outputs


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """vLLM itself does not run here: a stand-in has its interface."""
    folder = saved(tmp_path / "model", "llama")
    with pytest.raises(ValueError, match=r"the package vllm is not installed"):
        main([str(folder), "--output", str(tmp_path / "a"), "--serve", "vllm"])
    assert not (tmp_path / "a").exists()
    fake = SimpleNamespace(LLM=Engine, SamplingParams=lambda **given: SimpleNamespace(**given))
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setattr(serve_check, "find_spec", lambda name: True)
    main([str(folder), "--output", str(tmp_path / "a"), "--gguf", "--serve", "vllm"])
    text = capsys.readouterr().out
    assert "a/model.gguf: transformers reads the same weights" in text
    assert "vLLM and transformers: log-probabilities of" in text
    monkeypatch.setattr(Engine, "error", 0.5)
    with pytest.raises(ValueError, match=r"vllm computes something else of .*differ by 5.00e-01 nats"):
        main([str(folder), "--output", str(tmp_path / "b"), "--serve", "vllm"])
