"""The objective of docs/add_an_objective.md runs as it stands there, against plain transformers on one device."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForTokenClassification

from automodel_trainer import (
    LoRAConfig,
    OptimizerConfig,
    Trainer,
)
from automodel_trainer.checkpoint.merge import merge
from automodel_trainer.models.stage_names import WholeTensors
from automodel_trainer.verification.verify import verify
from tests.harness import full, relative_error
from tests.pool import RankPool
from tests.processes import amt, call, run_code
from tests.test_trainer import Curve, quiet
from tests.tiny import tiny_config, tiny_model, tiny_tokenizer

PAGE = (Path(__file__).parent.parent / "docs" / "add_an_objective.md").read_text()
OBJECTIVE, RUN = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
(YAML,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
STEPS, LR, MAX_NORM, LABELS = 3, 1e-2, 0.5, 5
RAGGED = [(9, 14), (5, 7), (12, 3), (8, 8)]  # lengths of the rows of a step's micro-batches


def rows_of(step: int) -> list[dict[str, list[int]]]:
    """The rows of one optimizer step; a third of the tokens has no label, one row has none at all."""
    generator = torch.Generator().manual_seed(step)
    rows = []
    for index, length in enumerate(length for pair in RAGGED for length in pair):
        ids = torch.randint(6, 260, (length,), generator=generator)
        masked = torch.rand(length, generator=generator) < (1.0 if index == 3 else 0.3)
        labels = torch.randint(LABELS, (length,), generator=generator).masked_fill(masked, -100)
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return rows


def tags(home: Path) -> Any:
    """The page's module, imported from the file that its reader saves."""
    if str(home) not in sys.path:
        sys.path.insert(0, str(home))
        importlib.invalidate_caches()
    return importlib.import_module("tags")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the page describes it: the module, a base language model, a tagger, and rows."""
    folder = tmp_path_factory.mktemp("objective")
    (folder / "tags.py").write_text(OBJECTIVE)
    (folder / "tags.yaml").write_text(YAML)
    tiny_model("qwen3", classifier_dropout=0.0).save_pretrained(folder / "my-model")
    tiny_tokenizer().save_pretrained(folder / "my-model")
    torch.manual_seed(0)
    config = tiny_config("qwen3", num_labels=LABELS, classifier_dropout=0.0)
    AutoModelForTokenClassification.from_config(config, dtype=torch.float32).save_pretrained(folder / "start")
    lines = "".join(json.dumps(row) + "\n" for row in rows_of(0))
    for name in ("train.jsonl", "validation.jsonl"):
        (folder / name).write_text(lines)
    return folder


def micro_batches(home: Path, step: int) -> list[dict[str, Any]]:
    rows = rows_of(step)
    return [tags(home).collate(rows[i : i + 2]) for i in range(0, len(rows), 2)]


def train(home: Path, root: Path, strategy: str, dp: tuple[int, int] = (0, 1), **options: Any) -> Any:
    """Three optimizer steps of the page's objective on this rank's share; whole weights come back."""
    arguments = {"strategy": strategy, "max_steps": STEPS, "precision": "fp32", "enable_checkpointing": False}
    curve, (rank, size) = Curve(), dp
    world = options.pop("devices", 1)
    trainer = Trainer(**quiet(root, devices=world, callbacks=[curve], **arguments))
    settings = {"lr": LR, "optimizer": OptimizerConfig(weight_decay=0.0), "scheduler": "constant"}
    module = tags(home).TokenClassification(
        str(home / options.pop("model", "start")), gradient_clip_val=MAX_NORM, **settings, **options
    )
    batches = [micro_batches(home, step)[rank::size] for step in range(STEPS)]
    trainer.fit(module, batches)
    metrics = trainer.validate(module, [[micro_batch] for micro_batch in micro_batches(home, 0)[rank::size]])
    predicted = trainer.predict(module, [[micro_batches(home, 0)[0]]])
    named = dict(module.model.named_parameters())
    tensors = WholeTensors(module.model, named, full)
    weights = {name: found.detach() for name in tensors.shapes if (found := tensors.get(name)) is not None}
    trainer.save_pretrained(root / "saved")
    return {"rows": curve.rows, "weights": weights, "metrics": metrics[0], "predicted": predicted[0][0]}


def on_rank(home: Path, root: Path, strategy: str, world: int, split: bool, options: dict[str, Any]) -> Any:
    dp = (int(os.environ["RANK"]), world) if split else (0, 1)
    return train(home, root, strategy, dp, devices=world, **options)


@pytest.fixture(scope="module")
def expected(home: Path) -> Any:
    """Plain torch and transformers on one device."""
    model = AutoModelForTokenClassification.from_pretrained(home / "start", dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    rows = []
    for step in range(STEPS):
        parts = micro_batches(home, step)
        count = sum((part["labels"] != -100).sum() for part in parts)
        total = 0.0
        for part in parts:
            logits = model(input_ids=part["input_ids"], attention_mask=part["attention_mask"]).logits
            loss = F.cross_entropy(logits.flatten(0, 1), part["labels"].flatten(), reduction="sum") / count
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        rows.append({"train_loss": total, "grad_norm": norm.item()})
    model.eval()
    correct = seen = 0
    with torch.no_grad():
        for part in micro_batches(home, 0):
            likeliest = model(input_ids=part["input_ids"], attention_mask=part["attention_mask"]).logits.argmax(-1)
            correct += ((likeliest == part["labels"]) & (part["labels"] != -100)).sum().item()
            seen += (part["labels"] != -100).sum().item()
        first = micro_batches(home, 0)[0]
        predicted = model(input_ids=first["input_ids"], attention_mask=first["attention_mask"]).logits.argmax(-1)
    return {
        "rows": rows,
        "weights": dict(model.named_parameters()),
        "accuracy": correct / seen,
        "predictions": predicted,
        "mask": first["attention_mask"].bool(),
    }


def check(result: Any, expected: Any) -> None:
    for got, want in zip(result["rows"], expected["rows"], strict=True):
        assert got["train_loss"] == pytest.approx(want["train_loss"], rel=1e-5)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)
    for name, weight in result["weights"].items():
        assert relative_error(weight, expected["weights"][name].detach()) < 1e-4, name
    assert result["metrics"]["val_token_accuracy"] == pytest.approx(expected["accuracy"])
    assert result["metrics"].keys() == {"val_loss", "val_token_accuracy"}
    found, mask = result["predicted"]["predictions"], expected["mask"]
    assert torch.equal(found[mask], expected["predictions"][mask])


def test_the_page_keeps_its_word() -> None:
    """The objective is complete, and short."""
    assert len(OBJECTIVE.splitlines()) <= 60


@pytest.mark.parametrize(
    ("strategy", "world", "split"),
    [
        ("fsdp2", 2, True),
        ("fsdp2:tp=2", 2, False),
        ("fsdp2:tp=2,sequence_parallel=true", 2, False),
        ("fsdp2:cp=2", 2, False),
        ("3d:pp=2", 2, False),
    ],
)
def test_layouts(
    pool: RankPool, home: Path, tmp_path: Path, expected: Any, strategy: str, world: int, split: bool
) -> None:
    """Ragged rows, several micro-batches: the numbers of plain transformers."""
    results = pool.run(world, on_rank, home, tmp_path, strategy, world, split, {})
    for result in results:
        check(result, expected)
    assert results[0]["weights"].keys() == expected["weights"].keys()
    saved = AutoModelForTokenClassification.from_pretrained(tmp_path / "saved")
    assert relative_error(saved.score.weight, expected["weights"]["score.weight"]) < 1e-4


def test_a_new_head(pool: RankPool, home: Path, tmp_path: Path) -> None:
    """A base language model has no `score`: it starts the same on every layout, and the saved model knows its kind."""
    options = {"model": "my-model", "config_overrides": {"num_labels": LABELS}}
    alone = train(home, tmp_path / "one", "auto", **options)
    for result in pool.run(2, on_rank, home, tmp_path / "two", "fsdp2", 2, True, options):
        assert result["rows"][0]["train_loss"] == pytest.approx(alone["rows"][0]["train_loss"], rel=1e-5)
        assert relative_error(result["weights"]["score.weight"], alone["weights"]["score.weight"]) < 1e-4
    config = json.loads((tmp_path / "two/saved/config.json").read_text())
    assert config["architectures"] == ["Qwen3ForTokenClassification"]
    assert len(config["id2label"]) == LABELS


def test_lora(home: Path, tmp_path: Path) -> None:
    """A random head that stays frozen is refused; trained, it is part of the adapter, for PEFT too."""
    options = {"model": "my-model", "config_overrides": {"num_labels": LABELS}}
    with pytest.raises(ValueError, match=r"modules_to_save=\['score'\]"):
        train(home, tmp_path, "auto", lora=LoRAConfig(rank=4), **options)
    train(home, tmp_path, "auto", lora=LoRAConfig(rank=4, modules_to_save=["score"]), **options)
    config = json.loads((tmp_path / "saved/adapter_config.json").read_text())
    assert config["task_type"] == "TOKEN_CLS"
    assert config["modules_to_save"] == ["score"]
    with pytest.raises(ValueError, match=r"has no score\.bias, which the adapter trained as a whole"):
        merge(tmp_path / "saved", tmp_path / "merged")
    merge(tmp_path / "saved", tmp_path / "merged", home / "start")
    trained = load_file(tmp_path / "saved/adapter_model.safetensors")["base_model.model.score.weight"]
    merged = AutoModelForTokenClassification.from_pretrained(tmp_path / "merged")
    assert torch.equal(merged.score.weight, trained)


def test_run_blocks(home: Path) -> None:
    """The Trainer's block and the YAML's, in a process of their own."""
    code = "import sys\nsys.path.insert(0, '.')\n" + RUN.replace(
        "max_steps=4)", "max_steps=4, accelerator='cpu', devices=1)"
    )
    call(home, run_code, code, home / "run.py")
    assert (home / "tagger/config.json").is_file()


def test_from_yaml(home: Path) -> None:
    """The page's YAML, but for devices; `validate` follows."""
    device = ["--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    amt("fit", "--config", "tags.yaml", *device, "--trainer.default_root_dir", "run", folder=home, path=[home])
    saved = (home / "run/config.yaml").read_text()
    assert "class_path: tags.TokenClassification" in saved
    table = amt("validate", "--config", "tags.yaml", *device, folder=home, path=[home])
    assert "val_token_accuracy" in table


@pytest.mark.parametrize("strategy", ["fsdp2:tp=2", "fsdp2:cp=2"])
def test_verify(pool: RankPool, home: Path, strategy: str) -> None:
    """A head with dropout of its own, labels that are no token ids."""
    for ranks in (1, 2):  # the reference's and the layout's
        pool.run(ranks, import_tags, home)
    model = AutoModelForTokenClassification.from_config(tiny_config("qwen3", num_labels=LABELS), dtype=torch.float32)
    report = verify(tags(home).TokenClassification(model), micro_batches(home, 0), strategy, launch=pool.run)
    assert report.passed, [q for q in report.quantities if not q.passed]
    assert report.modules_compared > 10


def import_tags(home: Path) -> None:
    tags(home)


def test_resume(home: Path, tmp_path: Path) -> None:
    """Two epochs in one run, and in two."""
    batches = [micro_batches(home, step) for step in range(2)]

    def run(root: Path, epochs: int, checkpoint: Path | None = None) -> tuple[Path | None, dict[str, torch.Tensor]]:
        trainer = Trainer(**quiet(root, strategy="auto", max_epochs=epochs, precision="fp32"))
        module = tags(home).TokenClassification(str(home / "start"), lr=LR, scheduler="constant")
        path = trainer.fit(module, batches, ckpt_path=checkpoint)
        return path, {name: p.detach().clone() for name, p in module.model.named_parameters()}

    _, expected = run(tmp_path / "one", 2)
    checkpoint, _ = run(tmp_path / "two", 1)
    _, found = run(tmp_path / "two", 2, checkpoint)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
