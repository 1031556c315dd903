"""`Trainer.fit` with a vision-language model from a folder: what it trains, saves, resumes and refuses."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from PIL import Image as PILImage
from transformers import AutoModelForImageTextToText, AutoProcessor

from automodel_trainer import ImageTextDataModule, ImageTextModule, LoRAConfig, Trainer
from automodel_trainer.callbacks import Ledger
from automodel_trainer.data.formats import Conversation
from automodel_trainer.data.pictures.encode import PictureEncoder
from automodel_trainer.lightning_cli import build
from automodel_trainer.tools.generate import generate
from automodel_trainer.tools.preview import main as preview
from automodel_trainer.tools.visual_prompt import VisualPrompt
from tests.harness import Stop, once
from tests.test_trainer import module as text_module
from tests.test_trainer import quiet
from tests.tiny import tiny_model, tiny_tokenizer
from tests.vlm.families import ALONE, folder_of, model_of, processor_of, rows


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and rows."""
    folder = tmp_path_factory.mktemp("vlm")
    (folder / "pictures.jsonl").write_text("\n".join(map(json.dumps, rows(folder))))
    return folder


def data(home: Path, **options: Any) -> ImageTextDataModule:
    return ImageTextDataModule(str(home / "pictures.jsonl"), **{"seq_len": 256, "global_batch_size": 2, **options})


def reloaded(folder: Path) -> tuple[Any, Any]:
    """The model and the processor of an export, which transformers must find whole."""
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model, AutoProcessor.from_pretrained(folder)


def inputs(processor: Any, home: Path) -> Any:
    line = json.loads((home / "pictures.jsonl").read_text().splitlines()[0])["messages"][0]
    parts = [{**p, "image": PILImage.open(home / p["image"])} if "image" in p else p for p in line["content"]]
    return processor.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=True, return_dict=True, return_tensors="pt"
    )


def test_a_folder_and_a_file_are_enough(home: Path, tmp_path: Path) -> None:
    folder = folder_of("llava", home)
    trainer = Trainer(**quiet(tmp_path, max_steps=2))
    checkpoint = trainer.fit(str(folder), str(home / "pictures.jsonl"))
    module = trainer.lightning_module
    assert isinstance(module, ImageTextModule)
    before = dict(AutoModelForImageTextToText.from_pretrained(folder).named_parameters())
    moved = {n.split(".")[1] for n, p in module.model.named_parameters() if not p.detach().equal(before[n])}
    assert moved == {"language_model", "multi_modal_projector", "weight"}
    ledger = json.loads((tmp_path / "ledger.json").read_text())
    assert ledger["model"]["frozen_parts"] == "vision (freeze=['vision'])"
    exported = tmp_path / "export"
    trainer.save_pretrained(exported)
    model, processor = reloaded(exported)
    for name, parameter in module.model.named_parameters():
        assert model.get_parameter(name).detach().equal(parameter.detach()), name
    assert processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}]).count("<image>") == 1
    assert checkpoint is not None
    reloaded(checkpoint / "model")


@pytest.mark.parametrize("family", [family for family in ALONE if family != "llava"])
def test_exports_are_whole(family: str, home: Path, tmp_path: Path) -> None:
    trainer = Trainer(**quiet(tmp_path, max_steps=1, enable_checkpointing=False))
    trainer.fit(ImageTextModule(folder_of(family, home)), data(home))
    trainer.save_pretrained(tmp_path / "export")
    model, processor = reloaded(tmp_path / "export")
    got = model(**inputs(processor, home)).logits
    want = trainer.lightning_module.model.eval()(**inputs(processor_of(family), home)).logits
    torch.testing.assert_close(got, want)


def test_adapters_are_of_the_language_model_and_peft_reads_them(home: Path, tmp_path: Path) -> None:
    folder = folder_of("llava", home)
    trainer = Trainer(**quiet(tmp_path, max_steps=2))
    checkpoint = trainer.fit(ImageTextModule(folder, lora=LoRAConfig(rank=2), lr=1e-2), data(home))
    module = trainer.lightning_module
    trained = {n for n, p in module.model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".language_model." in name for name in trained)
    assert checkpoint is not None
    processor = AutoProcessor.from_pretrained(checkpoint / "model")
    base = AutoModelForImageTextToText.from_pretrained(folder)
    given = inputs(processor, home)
    want = module.model.eval()(**given).logits
    torch.testing.assert_close(PeftModel.from_pretrained(base, checkpoint / "model")(**given).logits, want)
    merged, _ = reloaded(trainer.merge_and_save(tmp_path / "merged"))
    torch.testing.assert_close(merged(**given).logits, want, rtol=1e-4, atol=1e-4)


def test_a_run_resumes_in_the_middle_of_an_epoch(home: Path, tmp_path: Path) -> None:
    def run(name: str, stop: int | None = None, rows: Any = None, **options: Any) -> tuple[Any, Path | None]:
        callbacks = [] if stop is None else [Stop(stop)]
        trainer = Trainer(**quiet(tmp_path / name, max_steps=4, callbacks=callbacks))
        rows = rows or data(home, packing=False)
        path = trainer.fit(ImageTextModule(folder_of("llava", home), lr=1e-3), rows, **options)
        return trainer.lightning_module.model, path

    whole, _ = run("whole")
    _, path = run("part", stop=1)
    assert path is not None
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in (*home.glob("*.png"), home / "pictures.jsonl"):
        shutil.copy(file, moved)
    rows = data(moved, packing=False, image_root=str(moved), num_workers=1)
    resumed, _ = run("part", rows=rows, ckpt_path=path)
    for name, parameter in whole.named_parameters():
        assert resumed.get_parameter(name).detach().equal(parameter.detach()), name


def test_what_no_forward_reaches_is_frozen(home: Path, tmp_path: Path) -> None:
    """The features come from the tower's last layer but one."""
    module = ImageTextModule(str(folder_of("llava", home)), freeze=[])
    trainer = Trainer(**quiet(tmp_path, max_steps=2))
    trainer.fit(module, data(home))
    plain = AutoModelForImageTextToText.from_pretrained(folder_of("llava", home))
    seen = inputs(processor_of("llava"), home)
    plain(**seen, labels=seen["input_ids"]).loss.backward()
    reached = {name for name, parameter in plain.named_parameters() if parameter.grad is not None}
    trained = {name for name, parameter in module.model.named_parameters() if parameter.requires_grad}
    assert trained == reached
    assert not all(".layers.1." in name for name in reached)
    facts = next(c.facts for c in trainer.callbacks if isinstance(c, Ledger))
    assert set(facts["model"]["idle"]) == {name for name, _ in plain.named_parameters()} - reached
    optimized = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert optimized == {id(p) for p in module.model.parameters() if p.requires_grad}


@pytest.mark.parametrize("roles", [("assistant",), ("assistant", "system"), ("user", "assistant", "system")])
def test_turns_are_written_in_the_form_that_the_template_takes(roles: tuple[str, ...], home: Path) -> None:
    """Many templates write pictures in the user's turns, and the text of the others as it is."""
    processor = processor_of("llava")
    whole = processor.chat_template
    condition = f"{{% if m['content'] is string or m['role'] in {list(roles)} %}}"
    processor.chat_template = whole.replace("{% if m['content'] is string %}", condition)
    assert processor.chat_template != whole
    encoder, reference = PictureEncoder(processor, "assistant"), PictureEncoder(processor_of("llava"), "assistant")
    turns = [("system", "Be brief."), ("user", "A 'type'?"), ("assistant", "Yes.")]
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    assert encoder.plan(Conversation(messages), []) == reference.plan(Conversation(messages), [])
    shown = [{**messages[1], "content": [{"type": "image"}, *messages[1]["content"]]}, messages[2]]
    if "user" in roles:
        with pytest.raises(ValueError, match="takes text alone in turns of 'user'"):
            encoder.plan(Conversation(shown), [(32, 32)])
    else:
        assert encoder.plan(Conversation(shown), [(32, 32)]) == reference.plan(Conversation(shown), [(32, 32)])


def test_learning_rates_and_parts(home: Path, tmp_path: Path) -> None:
    rates = {"language": 1e-3, "projector": 1e-2}
    trainer = Trainer(**quiet(tmp_path, max_steps=1, enable_checkpointing=False))
    trainer.fit(ImageTextModule(folder_of("llava", home), lr=rates, scheduler="constant"), data(home))
    names = {id(p): n for n, p in trainer.lightning_module.model.named_parameters()}
    for group in trainer.optimizers[0].param_groups:
        for parameter in group["params"]:
            part = "projector" if "projector" in names[id(parameter)] else "language"
            assert group["lr"] == rates[part], names[id(parameter)]

    def refused(match: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            Trainer(**quiet(tmp_path, max_steps=1)).fit(
                ImageTextModule(folder_of("llava", home), **options), data(home)
            )

    refused("lr=.* says nothing of .*projector", lr={"language": 1e-3})
    refused("'vision' is no part of what is trained", lr={"vision": 1e-3, "*": 1e-4})
    refused("freeze: 'tower' is no part of this model. Allowed: vision, projector, language", freeze=["tower"])
    refused("leaves nothing to train", freeze=["vision", "projector", "language"])
    refused("must be a list", freeze="vision")


def test_text_alone_trains_the_language_model(home: Path, tmp_path: Path) -> None:
    chats = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}] * 4
    for family in ("llava", "gemma3"):
        trainer = Trainer(**quiet(tmp_path, max_steps=1, enable_checkpointing=False))
        trainer.fit(ImageTextModule(folder_of(family, home)), ImageTextDataModule(chats, seq_len=64))
        trained = {n for n, p in trainer.lightning_module.model.named_parameters() if p.requires_grad}
        assert not any("projector" in name or "vision" in name for name in trained)


def test_what_does_not_fit_is_refused(home: Path, tmp_path: Path) -> None:
    def fit(*arguments: Any) -> None:
        Trainer(**quiet(tmp_path, max_steps=1)).fit(*arguments)

    with pytest.raises(ValueError, match="Use ImageTextDataModule"):
        fit(text_module(tiny_model(), tokenizer=tiny_tokenizer()), str(home / "pictures.jsonl"))
    bare = tmp_path / "bare"
    model_of("llava").save_pretrained(bare)
    with pytest.raises(ValueError, match="holds no processor"):
        fit(str(bare), str(home / "pictures.jsonl"))


def test_the_command_line_chooses_by_the_config(home: Path, tmp_path: Path) -> None:
    folder = folder_of("llava", home)
    rest = ["--trainer.accelerator=cpu", f"--trainer.default_root_dir={tmp_path}", "--model.freeze=[vision, projector]"]
    _, module, dm = build([f"--model={folder}", f"--data={home / 'pictures.jsonl'}", "--data.max_pixels=5000", *rest])
    assert isinstance(module, ImageTextModule)
    assert module.frozen == ("vision", "projector")
    assert isinstance(dm, ImageTextDataModule)
    assert dm.max_pixels == 5000
    written = {
        "model": {"model": str(folder), "lr": {"language": 1e-5, "projector": 1e-4}},
        "data": {"train": "a.jsonl"},
    }
    _, module, dm = build(written)
    assert isinstance(module, ImageTextModule)
    assert module.rates == {"language": 1e-5, "projector": 1e-4}
    assert isinstance(dm, ImageTextDataModule)


def test_a_picture_is_asked_about(home: Path) -> None:
    folder = folder_of("gemma3", home)
    image = next(home.glob("*.png"))
    (home / "links").mkdir()
    (link := home / "links" / "picture").symlink_to(image)
    (answer,) = generate(folder, "what is it?", images=[link], max_new_tokens=4)
    processor, model = AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder)
    with PILImage.open(image) as opened:
        parts = [{"type": "image", "image": opened}, {"type": "text", "text": "what is it?"}]
        given = processor.apply_chat_template(
            [{"role": "user", "content": parts}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    width, height = VisualPrompt(processor, [link], max_pixels=100).pictures[0].size
    assert 80 < width * height <= 100
    with pytest.raises(ValueError, match=r"'https://example.org/a.png' is on the network"):
        VisualPrompt(processor, ["https://example.org/a.png"])
    with pytest.raises(ValueError, match="max_pixels=0 must be at least 1"):
        generate(folder, "what is it?", images=[link], max_pixels=0)
    new = model.generate(**given, max_new_tokens=4, do_sample=False)[0, given["input_ids"].shape[1] :]
    assert answer == processor.decode(new, skip_special_tokens=True)
    text = home / "text"
    tiny_model().save_pretrained(text)
    tiny_tokenizer().save_pretrained(text)
    with pytest.raises(ValueError, match="--image and --video are for models that see pictures"):
        generate(text, "what is it?", images=[image])


def test_a_preview_shows_rows_with_pictures(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of("idefics3", home)
    preview([f"--model={folder}", f"--data={home / 'pictures.jsonl'}", "--data.seq_len=512"])
    shown = capsys.readouterr().out
    assert "2 documents" in shown
    assert "«" in shown or "<image>" in shown


def test_broken_pictures_are_named_before_training(home: Path, tmp_path: Path) -> None:
    folder = folder_of("llava", home)
    whole = next(home.glob("*.png")).read_bytes()
    lines = [{"question": "<image>?", "answer": "!", "image": f"{number}.png"} for number in range(4)]
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(whole[: len(whole) // 2] if number % 2 else whole)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = [f"--model={folder}", f"--data={tmp_path / 'rows.jsonl'}", "--check-pictures", "--data.val_split=0.25"]
    with pytest.raises(ValueError, match=r"of 2 rows cannot be read:\nrow 1 .*'1.png'.*truncated.*\nrow 3 ") as error:
        preview(arguments)
    assert "row 2 " not in str(error.value)
    for number in (1, 3):
        (tmp_path / f"{number}.png").write_bytes(whole)
    preview(arguments)


def test_the_page_of_a_preview_has_small_pictures(home: Path, tmp_path: Path) -> None:
    """Each beside its own document; and the tokens that stand for one are shown once, with their number."""
    texts = []
    for name, colour in (("red", (250, 0, 0)), ("blue", (0, 0, 250))):
        PILImage.new("RGB", (400, 200), colour).save(tmp_path / f"{name}.png")
        turns = [{"role": "user", "content": f"<image>is it {name}"}, {"role": "assistant", "content": "yes"}]
        texts.append(json.dumps({"messages": turns, "image": f"{name}.png"}))
    (tmp_path / "rows.jsonl").write_text("\n".join(texts))
    page = tmp_path / "page.html"
    model, options = folder_of("idefics3", home), ["--data.seq_len=1024", f"--html={page}"]
    preview([f"--model={model}", f"--data={tmp_path / 'rows.jsonl'}", *options])
    found = re.findall(r'<article>.*?src="data:image/jpeg;base64,([^"]+)".*?</article>', page.read_text(), re.S)
    for article, data in zip(re.findall("<article>.*?</article>", page.read_text(), re.S), found):
        small = PILImage.open(io.BytesIO(base64.b64decode(data)))
        assert small.size == (160, 80)
        red, _, blue = small.getpixel((80, 40))
        assert ("red" if red > blue else "blue") in "".join(re.findall(r">(\w+)</span>", article))
        assert "400 × 200" in article
        assert re.search(r">\d{2,} × ", article)
    assert len(found) == 2


def test_two_pictures_of_one_model_are_told_apart(home: Path) -> None:
    """The same text with another picture has another loss: pictures reach the model."""
    processor, model = processor_of("llava"), once(model_of)("llava")
    given = inputs(processor, home)
    other = {**given, "pixel_values": given["pixel_values"].flip(-1)}
    assert not torch.allclose(model(**given).logits, model(**other).logits)
