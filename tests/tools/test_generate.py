from __future__ import annotations

import io
import re
import shutil
import sys

import pytest
import torch

from automodel_trainer.cli import main as cli
from automodel_trainer.tools.generate import check_folder, generate, main
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    tiny_model().save_pretrained(path)
    tiny_tokenizer(chat_template=None).save_pretrained(path)
    return path


def expected_greedy(text, new_tokens):
    """Greedy decoding by hand, without cache or generate."""
    model, tokenizer = tiny_model().eval(), tiny_tokenizer()
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(new_tokens):
        token = model(ids).logits[0, -1].argmax()
        ids = torch.cat([ids, token.view(1, 1)], dim=1)
        if token == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_the_answer_is_greedy_over_the_chat_template_and_streams(folder, capsys):
    (answer,) = generate(folder, "hi", max_new_tokens=6)
    assert answer == expected_greedy("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", 6)
    assert answer.strip() in capsys.readouterr().out


def test_a_system_message_comes_first(folder):
    (answer,) = generate(folder, "hi", system="Be brief.", max_new_tokens=6)
    chat = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert answer == expected_greedy(chat, 6)


def test_a_base_model_continues_the_text(base_folder):
    (answer,) = generate(base_folder, "once upon", max_new_tokens=6)
    assert answer == expected_greedy("once upon", 6)
    with pytest.raises(ValueError, match="no chat template"):
        generate(base_folder, "once upon", system="Be brief.")


def test_lines_of_standard_input_are_turns_and_an_empty_one_starts_anew(folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\nand\n\nhi\n"))
    first, second, third = generate(folder, None, max_new_tokens=4)
    opening = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert first == third == expected_greedy(opening, 4)
    later = f"{opening}{first}<|im_end|>\n<|im_start|>user\nand<|im_end|>\n<|im_start|>assistant\n"
    assert second == expected_greedy(later, 4)


def test_drawing_repeats_with_the_seed_and_differs_from_greedy(folder):
    def draw(seed):
        return generate(folder, "hi", temperature=5.0, seed=seed, max_new_tokens=12)

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_greedy_does_not_warn_about_sampling_settings(tmp_path, capsys, recwarn):
    model = tiny_model()
    model.generation_config.update(do_sample=True, temperature=0.6, top_k=20, top_p=0.95)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    (answer,) = generate(tmp_path, "hi", max_new_tokens=4)
    assert answer == expected_greedy("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", 4)
    assert "temperature" not in capsys.readouterr().err
    assert not [warning for warning in recwarn if "temperature" in str(warning.message)]


def test_a_folder_without_weights_or_config_is_named(tmp_path, capsys):
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no config\.json and no weights") as error:
        check_folder(tmp_path)
    assert str(tmp_path) in str(error.value)
    tiny_model().config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no weights"):
        check_folder(tmp_path)
    for wrong, message in ((tmp_path, "no weights"), (tmp_path / "nowhere", "nowhere")):
        with pytest.raises(SystemExit) as ended:
            cli(["generate", "--model", str(wrong), "--prompt", "hi"])
        assert ended.value.code == 1
        assert message in capsys.readouterr().err


def test_a_truncated_weights_file_is_an_error_that_names_the_folder(folder, tmp_path, capsys):
    broken = shutil.copytree(folder, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=re.escape(str(broken))):
        main(["--model", str(broken), "--prompt", "hi"])


@pytest.mark.parametrize("arguments", [{"temperature": -1.0}, {"top_p": 0.0}, {"max_new_tokens": 0}])
def test_settings_that_make_no_sense_are_refused(folder, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        generate(folder, "hi", **arguments)


def test_main_answers(folder, capsys):
    main(["--model", str(folder), "--prompt", "hi", "--max-new-tokens", "5"])
    assert capsys.readouterr().out.strip()
