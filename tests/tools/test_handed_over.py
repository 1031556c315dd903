"""What is handed over is what was trained: tokenizer and template in every folder, and the checks of an export."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import s3fs
import torch
import transformers
from safetensors.torch import load_file, save_file

from automodel_trainer import CausalLMModule, ChatDataModule, LoRAConfig, Trainer
from automodel_trainer.callbacks import DCPCheckpoint, HFExport
from automodel_trainer.checkpoint.merge import merge
from automodel_trainer.tools.check_export import check_export
from automodel_trainer.tools.export import main
from tests.tiny import CHATML, tiny_model, tiny_tokenizer

CHATS = [
    {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "x" * i}]}
    for i in range(1, 9)
]
OTHER = CHATML.replace("<|im_start|>", "<|im_start|>the ")
TURN = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def base(root: Path, tied: bool = False) -> Path:
    tiny_model(tie_word_embeddings=tied).save_pretrained(root / "base")
    tiny_tokenizer().save_pretrained(root / "base")
    return root / "base"


def fit(root: Path, module: Any, tokenizer: Any = None, *callbacks: Any, steps: int = 2) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        callbacks=list(callbacks),
        default_root_dir=root,
        logger=False,
        enable_progress_bar=False,
        enable_ledger=False,
    )
    trainer.fit(module, ChatDataModule(CHATS, tokenizer=tokenizer, seq_len=64))
    return trainer


def template(folder: Path) -> str:
    return transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(TURN, tokenize=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=4)], ids=["whole", "LoRA"])
def test_the_tokenizer_that_was_trained_with_lies_everywhere(tmp_path: Path, lora: LoRAConfig | None) -> None:
    """By the module's argument or the data's, as an object or a path: in checkpoint, export, save_pretrained, merge."""
    folder = base(tmp_path)
    other = tiny_tokenizer(OTHER)
    other.save_pretrained(tmp_path / "other")
    expected = other.apply_chat_template(TURN, tokenize=False)
    for number, (for_module, for_data) in enumerate(
        ((other, None), (str(tmp_path / "other"), None), (None, other), (None, str(tmp_path / "other")))
    ):
        root = tmp_path / str(number)
        module = CausalLMModule(folder, tokenizer=for_module, lora=lora, lr=1e-2)
        trainer = fit(root, module, for_data, HFExport(root / "hf"))
        trainer.save_pretrained(root / "saved")
        checkpoint = root / "checkpoints" / "latest"
        merge(checkpoint, root / "merged")
        for place in (checkpoint / "model", root / "hf", root / "saved", root / "merged"):
            assert template(place) == expected, f"{number}: {place}"
    plain = fit(tmp_path / "plain", CausalLMModule(folder, lora=lora))
    assert plain.checkpoint_callback is not None
    assert template(tmp_path / "plain" / "checkpoints" / "latest" / "model") == template(folder)


def test_a_built_in_template_is_handed_over(tmp_path: Path) -> None:
    """A tokenizer without a template: the error lists the built-in ones, and the chosen one lies in the checkpoint."""
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer(None).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"no chat template.*chatml, plain"):
        fit(tmp_path / "none", CausalLMModule(tmp_path / "base"))
    for name in ("plain", "chatml"):
        root = tmp_path / name
        quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_ledger": False}
        trainer = Trainer(accelerator="cpu", devices=1, max_steps=1, default_root_dir=root, **quiet)
        trainer.fit(CausalLMModule(tmp_path / "base"), ChatDataModule(CHATS, seq_len=64, chat_template=name))
        assert ("### Assistant" in template(root / "checkpoints" / "latest" / "model")) == (name == "plain")
    with pytest.raises(ValueError, match=r"no file and no template\. Allowed: chatml, plain"):
        ChatDataModule(CHATS, tokenizer=tiny_tokenizer(), chat_template="chatlm").prepare()


def test_two_vocabularies_are_an_error(tmp_path: Path) -> None:
    added = tiny_tokenizer()
    added.add_tokens(["<new>"])
    with pytest.raises(ValueError, match="262 tokens and the data one of 263"):
        fit(tmp_path, CausalLMModule(tiny_model(), tokenizer=tiny_tokenizer()), added)


def test_check_holds_for_what_was_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, lora in (("whole", None), ("lora", LoRAConfig(rank=4, use_rslora=True))):
        root = tmp_path / name
        fit(root, CausalLMModule(base(root, tied=lora is None), lora=lora, lr=1e-2))
        main([str(root / "checkpoints" / "latest"), "--output", str(root / "out"), "--check"])
        out = capsys.readouterr().out
        assert "WRONG" not in out
        assert "3 conversations have the tokens" in out
        assert ("weights are base + adapter" in out) == (lora is not None)
        assert (", 1 tied" in out) == (lora is None)


def test_each_fault_of_an_export_is_named(tmp_path: Path) -> None:
    """One thing is made wrong after the export, and the check names it."""
    fit(tmp_path, CausalLMModule(base(tmp_path), lora=LoRAConfig(rank=4), lr=1e-2))
    checkpoint = tmp_path / "checkpoints" / "latest"
    q = "model.layers.0.self_attn.q_proj.weight"

    def weights(folder: Path, change: Any, name: str = "model.safetensors") -> None:
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name, {"format": "pt"})

    def config(folder: Path, name: str, **values: Any) -> None:
        old = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        (folder / name).write_text(json.dumps({**old, **values}))

    faults: dict[str, tuple[Any, str]] = {
        "lacks": (lambda f: weights(f, lambda t: t.pop(q)), f"tensors.*lacks {q}"),
        "adds": (lambda f: weights(f, lambda t: t.update(more=torch.zeros(1))), "tensors.*adds more"),
        "unmerged": (
            lambda f: weights(f, lambda t: t.update({q: load_file(tmp_path / "base" / "model.safetensors")[q]})),
            f"merged.*{q} is not base",
        ),
        "generation": (
            lambda f: config(f, "generation_config.json", do_sample=False, temperature=0.5),
            "generation config.*\n.*temperature",
        ),
        "another norm": (
            lambda f: weights(f, lambda t: t["model.norm.weight"].add_(1e-3)),
            "unchanged.*model.norm.weight differs from the source",
        ),
        "eps": (
            lambda f: config(f, "config.json", rms_norm_eps=2e-6, rope_parameters={"rope_theta": 5.0}),
            "config: WRONG: rms_norm_eps is 2e-06 and was .*; rope_parameters.rope_theta is 5.0 and was",
        ),
        "not a number": (lambda f: weights(f, lambda t: t[q].fill_(float("nan"))), f"merged.*{q} is not base"),
        "no such token": (
            lambda f: config(f, "generation_config.json", eos_token_id=[1, 99999]),
            "generation config.*eos_token_id=99999, and the model has",
        ),
        "template": (lambda f: (f / "chat_template.jinja").write_text(OTHER), "chat template.*renders"),
    }
    for name, (spoil, message) in faults.items():
        folder = merge(checkpoint, tmp_path / name)
        assert not [f for f in check_export(checkpoint, folder) if f.fault]
        spoil(folder)
        found = " ".join(str(f) for f in check_export(checkpoint, folder) if f.fault)
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(found)
    untrained = tmp_path / "untrained"
    fit(untrained, CausalLMModule(base(untrained), lora=LoRAConfig(rank=4), lr=0.0))
    folder = merge(untrained / "checkpoints" / "latest", tmp_path / "zero")
    assert "updates are zero" in " ".join(map(str, check_export(untrained / "checkpoints" / "latest", folder)))


def test_an_export_that_is_not_tied_any_more_is_named(tmp_path: Path) -> None:
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    folder = merge(tmp_path / "tied", tmp_path / "export")
    assert not [f for f in check_export(tmp_path / "tied", folder) if f.fault]
    tensors = load_file(folder / "model.safetensors")
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file({**tensors, **head}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    faults = " ".join(str(f) for f in check_export(tmp_path / "tied", folder) if f.fault)
    assert "lm_head.weight is tied in the source and not here" in faults
    assert "config: WRONG: tie_word_embeddings is False and was True." in faults + "."


def test_writing_fails_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = CausalLMModule(tiny_model(), tokenizer=tiny_tokenizer())
    (tmp_path / "file").write_text("")

    def refused(message: str, *callbacks: Any) -> None:
        with pytest.raises(ValueError, match=message):
            fit(tmp_path, CausalLMModule(tiny_model(), tokenizer=tiny_tokenizer()), None, *callbacks)

    refused("Checkpoints cannot be written to .*Not a directory", DCPCheckpoint(tmp_path / "file" / "run"))
    refused("exported model cannot be written to .*Not a directory", HFExport(tmp_path / "file" / "hf"))
    refused("Checkpoints cannot be written to s3://nowhere/run.*credentials", DCPCheckpoint("s3://nowhere/run"))
    s3fs.S3FileSystem.clear_instance_cache()  # other tests have credentials
    usage = __import__("shutil")._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6)
    with monkeypatch.context() as patched:
        patched.setattr("shutil.disk_usage", lambda path: usage)
        with pytest.warns(UserWarning, match="keep fewer"):
            fit(tmp_path, module, None, DCPCheckpoint(tmp_path / "a"))
        patched.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
        refused(r"A checkpoint needs about 0\.4 MiB and .* has 0\.0 MiB free", DCPCheckpoint(tmp_path / "b"))


def test_what_is_wrong_in_the_source_is_not_blamed_on_the_export(tmp_path: Path) -> None:
    """Published settings of generation that transformers only warns of, in either file: saved as transformers saves."""
    for name, values in (
        ("generation_config.json", {"temperature": 0.6, "eos_token_id": 99999}),
        ("config.json", {"temperature": 0.6}),
        ("generation_config.json", {"eos_token_id": [4, 99999]}),
    ):
        root = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder = base(root)
        settings = folder / "generation_config.json"
        if name != settings.name:
            settings.unlink()
        (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **values}))
        transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(root / "reference")
        reference = transformers.GenerationConfig.from_pretrained(root / "reference")
        fit(root, CausalLMModule(folder), steps=1)
        for source in (root / "checkpoints" / "latest", folder):
            exported = merge(source, root / f"of {source.name}")
            assert transformers.GenerationConfig.from_pretrained(exported) == reference, (name, source)
            found = {finding.name: finding for finding in check_export(source, exported)}["generation config"]
            assert not found.fault
            assert "as in the source: " in found.detail, found.detail
    broken = base(tmp_path / "broken") / "generation_config.json"
    broken.write_text(json.dumps({"num_return_sequences": 3}))
    with pytest.raises(ValueError, match=r"generation_config\.json is invalid: .*num_return_sequences.* Correct it"):
        fit(tmp_path / "broken", CausalLMModule(broken.parent))


def test_settings_of_generation_that_the_user_changed_are_handed_over(tmp_path: Path) -> None:
    folder = base(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.max_new_tokens = 77
    trainer = fit(tmp_path, CausalLMModule(model), steps=1)
    trainer.save_pretrained(tmp_path / "saved")
    for place in (tmp_path / "checkpoints" / "latest" / "model", tmp_path / "saved"):
        assert transformers.GenerationConfig.from_pretrained(place).max_new_tokens == 77, place
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.temperature = 0.6  # which transformers does not save without do_sample
    with pytest.raises(ValueError, match="generation_config cannot be saved"):
        fit(tmp_path / "refused", CausalLMModule(model), steps=1)


def test_another_base_than_the_trained_one_is_named(tmp_path: Path) -> None:
    """When adapters are merged, when they are checked, and when they are trained on an object unlike its folder."""
    folder, lora = base(tmp_path), LoRAConfig(rank=4)
    checkpoint = tmp_path / "checkpoints" / "latest"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*another model|.*others than")
        fit(tmp_path, CausalLMModule(folder, lora=lora, lr=1e-2))
        half = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        fit(tmp_path / "half", CausalLMModule(half, lora=lora))
        assert not [f for f in check_export(checkpoint, merge(checkpoint, tmp_path / "same")) if f.fault]
        trainer = Trainer(accelerator="cpu", devices=1, logger=False, default_root_dir=tmp_path / "evaluated")
        data = ChatDataModule(CHATS, validation=CHATS[1:4], seq_len=64)
        trainer.validate(CausalLMModule.load_from_checkpoint(checkpoint), data, ckpt_path=checkpoint)
    tiny_model(seed=9).save_pretrained(tmp_path / "other")
    with pytest.warns(UserWarning, match="others than those that the adapter .* was trained on"):
        exported = merge(checkpoint, tmp_path / "asked", base=tmp_path / "other")
    assert not [f for f in check_export(checkpoint, exported, base=tmp_path / "other") if f.fault]
    tiny_model(seed=9).save_pretrained(folder)
    with pytest.warns(UserWarning, match="others than those that the adapter .* was trained on"):
        exported = merge(checkpoint, tmp_path / "in place")
    assert "base: WRONG: the weights in" in " ".join(map(str, check_export(checkpoint, exported)))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.1)  # as merging another adapter does
    with pytest.warns(
        UserWarning, match=r"layers\.1\.mlp\.up_proj\.weight of the model that was given is another than"
    ):
        fit(tmp_path / "changed", CausalLMModule(model, lora=lora))


def test_a_vocabulary_that_grew_under_adapters_is_no_fault(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<a>", "<b>", "<c>", "<d>"])
    model = transformers.AutoModelForCausalLM.from_pretrained(base(tmp_path))
    model.resize_token_embeddings(len(tokenizer))
    fit(tmp_path, CausalLMModule(model, tokenizer=tokenizer, lora=LoRAConfig(rank=4), lr=1e-2))
    checkpoint = tmp_path / "checkpoints" / "latest"
    exported = merge(checkpoint, tmp_path / "out")
    assert not [f for f in check_export(checkpoint, exported) if f.fault]
    assert len(load_file(exported / "model.safetensors")["model.embed_tokens.weight"]) == len(tokenizer) == 266
