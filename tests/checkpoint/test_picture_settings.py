"""A run with pictures goes on with something changed: each setting of its module and its data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from transformers import AutoProcessor

from automodel_trainer import ImageTextDataModule, ImageTextModule, OptimizerConfig, Trainer
from automodel_trainer.models.parts import ModelParts
from tests.test_trainer import quiet
from tests.vlm.families import folder_of, rows


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows(folder))))
    shutil.copytree(folder_of("llava", folder), folder / "model")
    fit(folder, folder / "run", 2)
    fit(folder, folder / "parts", 2, lr={"language": 1e-3, "*": 1e-2})
    return folder


def fit(
    home: Path, root: Path, steps: int, data: Any = None, resume: Any = None, callback: Any = None, **options: Any
) -> Trainer:
    trainer = Trainer(**quiet(root, max_steps=steps, callbacks=[callback] if callback else None))
    module = ImageTextModule(home / "model", **{"scheduler": "constant", **options})
    rows = ImageTextDataModule(str(home / "rows.jsonl"), seq_len=256, global_batch_size=2, **(data or {}))
    trainer.fit(module, rows, **({} if resume is None else {"ckpt_path": "last", "resume": resume}))
    return trainer


def copy(home: Path, name: str, root: Path) -> Path:
    return Path(shutil.copytree(home / name, root / "run", symlinks=True))


def other_processor(home: Path) -> Any:
    processor = AutoProcessor.from_pretrained(home / "model")
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    return processor


@pytest.mark.parametrize("name", ["freeze", "processor", "data processor", "min_pixels", "max_pixels", "image_mark"])
def test_refused(home: Path, tmp_path: Path, name: str) -> None:
    options, words = {
        "freeze": ({"freeze": ["vision", "projector"]}, "model.freeze .*: other weights are trained"),
        "processor": ({"processor": other_processor(home)}, "model.processor .* prepared otherwise"),
        "data processor": ({"data": {"processor": other_processor(home)}}, "model.processor .* prepared otherwise"),
        "min_pixels": ({"data": {"min_pixels": 5000}}, "data.min_pixels None → 5000"),
        "max_pixels": ({"data": {"max_pixels": 100}}, "data.max_pixels None → 100"),
        "image_mark": ({"data": {"image_mark": "<img>"}}, "data.image_mark <image> → <img>"),
    }[name]
    with pytest.raises(ValueError, match="cannot go on with what has changed") as error:
        fit(home, copy(home, "run", tmp_path), 3, resume="all", **options)  # type: ignore[arg-type]
    error.match(words)


def test_new_data_of_the_same_processor(home: Path, tmp_path: Path) -> None:
    trainer = fit(home, copy(home, "run", tmp_path), 4, resume="data", data={"max_pixels": 100})
    assert trainer.global_step == 4
    changed, root = {"processor": other_processor(home)}, copy(home, "run", tmp_path / "b")
    with pytest.raises(ValueError, match=r"model\.processor"):
        fit(home, root, 4, resume="data", data=changed)


def test_taken_over(home: Path, tmp_path: Path) -> None:
    """The same processor given by its path, and a learning rate for each part."""
    trainer = fit(home, copy(home, "run", tmp_path / "a"), 3, resume="all", data={"processor": str(home / "model")})
    assert trainer.global_step == 3
    rates = {"language": 5e-4, "*": 2e-3}
    trainer = fit(home, copy(home, "parts", tmp_path / "b"), 3, resume="all", lr=rates)
    assert {group["lr"] for group in trainer.optimizers[0].param_groups} == set(rates.values())


PARTS: list[tuple[Any, Any]] = [  # learning rates before and after
    (1e-2, {"language": 1e-3, "*": 1e-2}),  # one group becomes two
    ({"language": 1e-3, "*": 1e-2}, 3e-3),  # and two become one
    ({"language": 1e-3, "*": 1e-2}, {"vision": 1e-3, "projector": 5e-3, "language": 1e-2}),
    ({"language": 1e-3, "*": 1e-2}, {"vision": 1e-2, "*": 1e-3}),  # the projector goes to the other group
]


@pytest.mark.parametrize(("before", "after"), PARTS)
def test_other_parts_are_taken_over_by_name(home: Path, tmp_path: Path, before: Any, after: Any) -> None:
    """Against plain AdamW, a parameter at a time, on the gradients of the run itself."""
    steps = Gradients(before), Gradients(after)
    options = {"freeze": [], "scheduler": "linear", "optimizer": OptimizerConfig(weight_decay=0.1, args={"eps": 1e-4})}
    fit(home, tmp_path, 2, callback=steps[0], lr=before, **options)
    fit(home, tmp_path, 5, callback=steps[1], lr=after, resume="all", **options)
    both = [*steps[0].seen, *steps[1].seen]
    lengths = [(2, i) for i in range(2)] + [(5, i) for i in range(2, 5)]
    for name, start in steps[0].start.items():
        plain = torch.nn.Parameter(start.clone())
        optimizer = torch.optim.AdamW([plain], weight_decay=0.1 if plain.ndim > 1 else 0.0, eps=1e-4)
        for (total, step), found in zip(lengths, both, strict=True):
            peak = (steps[0] if step < 2 else steps[1]).rate(name)
            optimizer.param_groups[0]["lr"] = peak * (1 - step / total)
            plain.grad = found[name].clone()
            optimizer.step()
        assert torch.allclose(steps[1].end[name], plain, rtol=1e-6, atol=1e-7), name


class Gradients(Callback):
    """Gradients of every step by parameter, and the weights before and after."""

    def __init__(self, rates: Any) -> None:
        self.rates = rates if isinstance(rates, dict) else {"*": rates}
        self.seen: list[dict[str, torch.Tensor]] = []

    def rate(self, name: str) -> float:
        part = ModelParts(self.model).of(name)
        return self.rates.get(part, self.rates.get("*"))  # type: ignore[no-any-return]

    def weights(self) -> dict[str, torch.Tensor]:
        return {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.model = module.model
        self.start = self.weights()

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.seen.append({n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None})

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.end = self.weights()


def test_a_run_from_the_weights_freezes_what_it_likes(home: Path, tmp_path: Path) -> None:
    root = copy(home, "run", tmp_path)
    assert fit(home, root, 1, resume="weights", freeze=["vision", "projector"]).global_step == 1
