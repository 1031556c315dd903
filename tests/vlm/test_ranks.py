"""Training with pictures on several ranks is that on one device, also where a rank has none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from automodel_trainer import ImageTextDataModule, ImageTextModule, LoRAConfig, Trainer
from automodel_trainer.checkpoint.export import export_pretrained
from tests.harness import full, once
from tests.matrix import more
from tests.pool import RankPool
from tests.test_trainer import quiet
from tests.vlm import more_families
from tests.vlm.families import model_of, processor_of, rows
from tests.vlm.films import films

STEPS = 3


class Case(NamedTuple):
    """A family on a layout of two ranks."""

    family: str
    spec: str = "fsdp2"
    lora: bool = False
    packing: bool = False
    rows: str = "mixed"
    freeze: tuple[str, ...] = ("vision",)
    layers: int = 2
    batch: int = 2
    export: bool = False


CASES = [
    *(Case(family) for family in ("qwen3_vl", "gemma3", "idefics3", "internvl")),
    Case("mllama", rows="pictured"),
    Case("llava", "ddp", packing=True),
    Case("qwen3_vl", lora=True, packing=True),
    Case("llava", "ddp", lora=True),
    Case("llava_onevision", packing=True),
    Case("llava", "hsdp:dp_replicate=2"),
    # The tower is trained, and a rank without pictures gives it zeros.
    Case("qwen3_vl", "fsdp2:sync_every_micro_batch=true", freeze=("*.embed_tokens.*",)),
    Case("internvl", "ddp", freeze=("language",)),
    *(Case("llava", spec, freeze=()) for spec in ("ddp", "fsdp2")),  # no forward reaches the tower's last layer
    Case("qwen3_vl", rows="films"),  # a rank has videos, and another pictures: each runs the tower twice
    Case("llava_onevision", packing=True, rows="films-alike", freeze=()),
    Case("gemma3", "fsdp2_tp:tp=2", packing=True),
    # It adds features between cut layers, and its plan for tp forgets the norms of queries and keys.
    Case("qwen3_vl_moe", "fsdp2_tp:tp=2", packing=True),
]
CASES += [
    *(Case(family, "fsdp2:cp=2", packing=True) for family in ("qwen3_vl", "gemma3")),
    Case("llava", "fsdp2:cp=2,cp_attention=ring", freeze=()),
    Case("gemma3", "3d:pp=2", packing=True),
    Case("qwen3_vl", "3d:pp=2", freeze=(), layers=4),  # its first two layers take features of pictures
    Case("llava_onevision", "3d:pp=2", freeze=(), packing=True),  # image_newline is a parameter of the model itself
    Case("qwen3_vl_moe", "fsdp2:ep=2", packing=True, export=True),
    Case("qwen3_vl_moe", "fsdp2_ep", lora=True),
    Case("gemma4", "ddp", freeze=()),
    Case("ovis2", freeze=(), packing=True),
    Case("ernie4_5_vl_moe", "fsdp2_tp:tp=2", packing=True),  # its plan has rules for the tower
]
MORE = [
    *(Case(family, "ddp", freeze=()) for family in more_families.MORE),
    *(Case(family, "fsdp2:cp=2", lora=True, packing=True) for family in more_families.MORE),
    *(Case("qwen2_5_vl", spec, packing=True, rows="films") for spec in ("fsdp2:cp=2", "3d:pp=2", "fsdp2_tp:tp=2")),
    *(Case("internvl", "ddp", rows="films-alike", freeze=(), lora=lora) for lora in (False, True)),
    Case("qwen3_vl", "ddp"),
    *(Case(family, "fsdp2_tp:tp=2", packing=True) for family in ("llava", "qwen3_vl")),
    *(Case(family, "fsdp2:cp=2", packing=True) for family in ("qwen2_5_vl", "llava_onevision", "smolvlm")),
    Case("internvl", "fsdp2:cp=2", lora=True),
    Case("idefics3", "fsdp2:cp=2,cp_attention=ring"),
    Case("qwen3_vl", "fsdp2:cp=2", freeze=()),
    *(Case(family, "3d:pp=2", packing=True) for family in ("qwen2_5_vl", "llava", "smolvlm")),
    *(Case(family, "3d:pp=2") for family in ("internvl", "idefics3")),
    Case("llava", "3d:pp=2", lora=True),
    Case("llava_onevision", "3d:pp=2", lora=True),
    Case("qwen3_vl_moe", "fsdp2:ep=2", lora=True, packing=True),
    Case("qwen3_vl_moe", "fsdp2:ep=2", freeze=()),
    Case("qwen3_5_moe", "fsdp2:ep=2", export=True),
]
ON_FOUR = [Case(family, "fsdp2:cp=2,tp=2", packing=True) for family in ("qwen3_vl", "gemma3")]
ON_FOUR += [Case("llava", spec, packing=True) for spec in ("3d:pp=2,cp=2", "3d:pp=2,tp=2")]
ON_FOUR += [
    Case("llava", "3d:pp=2,dp_shard=2", batch=4),
    Case("qwen3_vl_moe", "3d:pp=2,ep=2", layers=4, batch=4, export=True),
]
ON_FOUR += [
    Case("qwen3_vl_moe", "fsdp2:cp=2,ep=2", packing=True),
    Case("qwen3_vl_moe", "fsdp2:ep=2,tp=2"),
]
REFUSED = [
    ("3d:pp=2", "mllama", "pp=2 does not work with .* its layers see pictures by cross-attention"),
    ("fsdp2_cp:cp=2", "ernie4_5_vl_moe", "tokens of text .* decoder are not reached.* Set cp=1"),
    ("fsdp2_cp:cp=2", "mllama", "cp=2 does not work with .* its layers see pictures by cross-attention"),
]


class Run(NamedTuple):
    """The loss and the gradient norm of every step, and the trained weights at the end."""

    seen: list[tuple[float, float]]
    weights: dict[str, Tensor]


class Steps(pl.Callback):
    """The loss, the gradient norm and the weights of every step."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []
        self.weights: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        metrics = trainer.callback_metrics
        self.seen.append((float(metrics["train_loss"]), float(metrics["grad_norm"])))

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.weights = {n: full(p).detach().clone() for n, p in pl_module.model.named_parameters() if p.requires_grad}


def run(root: Path, case: Case, devices: int = 2) -> Run:
    """Train on rows with and without pictures: a step has either kind on either rank."""
    torch.manual_seed(0)
    steps = Steps()
    path = str(root / f"{case.rows}.jsonl")
    shows_films = case.rows.startswith("films")
    length = 256 if shows_films else 160
    dm = ImageTextDataModule(path, seq_len=length, global_batch_size=case.batch, packing=case.packing, cache=False)
    module = ImageTextModule(
        model_of(case.family, layers=case.layers),
        processor=processor_of(case.family, films=shows_films),
        lr=1e-3,
        scheduler="constant",
        lora=LoRAConfig(rank=2) if case.lora else None,
        freeze=case.freeze,
        optimizer={"args": {"eps": 1e-3}},
    )
    trainer = Trainer(
        **quiet(
            root / str(devices), strategy=case.spec if devices > 1 else "auto", devices=devices, max_steps=STEPS,
            callbacks=[steps], enable_checkpointing=False,
        )
    )  # fmt: skip
    trainer.fit(module, dm)
    if case.export and devices > 1:
        export_pretrained(module.model, root / case.spec)
    return Run(steps.seen, steps.weights)


@once
def alone(root: Path, case: Case) -> Run:
    return run(root, case, devices=1)


def on_ranks(root: Path, cases: list[Case], ranks: int) -> list[Run]:
    """The cases on the ranks of this job, one after the other; then layouts of two ranks that are refused."""
    found = [run(root, case, ranks) for case in cases]
    if ranks > 2:
        return found
    for spec, family, message in REFUSED:
        with pytest.raises(ValueError, match=message):
            run(root, Case(family, spec))
    return found


def written(root: Path) -> None:
    """Rows in an order in which steps of two rows have none, one or two with pictures."""
    made = rows(root, 12)
    (root / "mixed.jsonl").write_text("\n".join(json.dumps(made[i]) for i in (0, 2, 6, 10, 3, 1)))
    for name, alike in (("films", False), ("films-alike", True)):
        made_of = films(root, alike)
        (root / f"{name}.jsonl").write_text("\n".join(json.dumps(made_of[i]) for i in (0, 4, 2, 1, 4, 2)))
    (root / "pictured.jsonl").write_text("\n".join(json.dumps(made[i]) for i in (0, 1, 3, 4, 5, 7)))


def assert_same(got: Run, want: Run, case: Case) -> None:
    for mine, theirs in zip(got.seen, want.seen, strict=True):
        assert mine == pytest.approx(theirs, rel=2e-5), case
    for name, weight in want.weights.items():
        if name not in got.weights:  # of another stage
            assert "pp" in case.spec, (case, name)
            continue
        error = float((got.weights[name] - weight).abs().max())
        assert error <= 2e-6 + 1e-4 * float(weight.abs().max()), f"{case} {name}: {error}"


def assert_exported(folder: Path, trained: dict[str, Tensor], case: Case) -> None:
    """The folder has the names of transformers' own, which reads them whole."""
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.detach(), trained.get(name, weight.detach()), rtol=0, atol=0)
    model_of(case.family, layers=case.layers).save_pretrained(folder / "own")
    files = [load_file(path / "model.safetensors") for path in (folder, folder / "own")]
    got, want = ({name: tensor.shape for name, tensor in file.items()} for file in files)
    assert got == want


@pytest.mark.parametrize(("ranks", "cases"), [(2, CASES), more(2, MORE), more(4, ON_FOUR)], ids=["", "more", "four"])
def test_ranks_are_one_device(ranks: int, cases: list[Case], pool: RankPool, tmp_path: Path) -> None:
    written(tmp_path)
    by_rank = pool.run(ranks, on_ranks, tmp_path, cases, ranks)
    for case, *got in zip(cases, *by_rank):
        want = alone(tmp_path, case._replace(spec="auto"))
        assert {name for run in got for name in run.weights} == want.weights.keys(), case
        for run_of_rank in got:
            assert_same(run_of_rank, want, case)
        if case.export:
            trained = {name: weight for run_of_rank in got for name, weight in run_of_rank.weights.items()}
            assert_exported(tmp_path / case.spec, trained, case)


def test_text_beside_pictures_is_refused_where_it_would_see_them(tmp_path: Path) -> None:
    written(tmp_path)
    dm = ImageTextDataModule(
        str(tmp_path / "mixed.jsonl"), seq_len=160, micro_batch_size=2, packing=False, processor=processor_of("mllama")
    )
    with pytest.raises(ValueError, match=r"train: 3 of 6 rows have no pictures, .*cross_attention_mask"):
        dm.setup("fit")
