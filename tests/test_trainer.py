"""Trainer and CausalLMModule, against plain transformers in a bare loop."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers
from datasets import Dataset, DatasetDict
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader
from torchmetrics.text import Perplexity
from transformers import PreTrainedModel

from automodel_trainer import CausalLMModule, ChatDataModule, MockDataModule, OptimizerConfig, SchedulerConfig, Trainer
from automodel_trainer.callbacks import DCPCheckpoint
from tests.harness import check_run, check_steps, random_rows, reference_steps, stack, widened
from tests.pool import RankPool
from tests.tiny import tiny_model, tiny_tokenizer

STEPS, LR, MAX_NORM = 4, 1e-2, 1.0
EPS = 1e-3  # far above the rounding of a gradient, as in `amt verify`: with less, Adam makes whole steps of it
TOKENS = 8 * 24  # of a step


class Curve(Callback):
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.rows.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def quiet(root: Path | str, **kwargs: Any) -> dict[str, Any]:
    """Arguments of a Trainer that says and writes as little as may be."""
    defaults = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    return {**defaults, "log_every_n_steps": 1, "default_root_dir": str(root), **kwargs}


def module(model: Any, **kwargs: Any) -> CausalLMModule:
    optimizer = OptimizerConfig(weight_decay=0.0, args={"eps": EPS})
    return CausalLMModule(model, lr=LR, optimizer=optimizer, scheduler="constant", **kwargs)


def steps_of(micro: int) -> list[list[dict[str, Any]]]:
    """STEPS global batches of 8 rows as lists of micro-batches."""
    made = []
    for step in range(STEPS):
        rows = random_rows(8, 24, seed=step)
        made.append([stack(rows[i : i + micro]) for i in range(0, 8, micro)])
    return made


def chats(count: int = 60) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"what is {i} plus {i}?"},
                {"role": "assistant", "content": f"it is {2 * i}"},
            ]
        }
        for i in range(count)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    tiny_model(tie_word_embeddings=True).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    (path / "README.md").write_text("# a model card\n")
    return path


@pytest.mark.parametrize("micro", [8, 3, 2])
def test_against_a_bare_loop(micro: int, tmp_path: Path) -> None:
    """Loss, gradient norm and weights do not depend on how a global batch is cut."""
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, eps=EPS)
    expected = reference_steps(
        model, optimizer, lambda step: random_rows(8, 24, seed=step), steps=STEPS, max_norm=MAX_NORM
    )
    curve = Curve()
    ours = module(tiny_model())
    Trainer(**quiet(tmp_path, max_steps=STEPS, callbacks=[curve])).fit(ours, steps_of(micro))
    history = [{"loss": row["train_loss"], "norm": row["grad_norm"]} for row in curve.rows]
    weights = {name: p.detach() for name, p in ours.model.named_parameters()}
    check_steps({"history": history, "weights": weights}, expected)


def fit_curve(spec: str, root: str, precision: str = "32-true") -> Any:
    """Fit on this rank's share, through the whole Trainer."""
    curve = Curve()
    world, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0)))
    size = 2 if world == 1 else 1
    data = MockDataModule(vocab_size=260, seq_len=24, micro_batch_size=size, global_batch_size=8, num_samples=40)
    ours = module(tiny_model(seed=rank))  # rank 0's weights count, not each rank's own
    options = {"strategy": spec, "devices": world, "max_steps": STEPS, "callbacks": [curve], "precision": precision}
    trainer = Trainer(**quiet(root, **options))
    with widened(precision):
        path = trainer.fit(ours, data)
    losses, norms = ({i: row[key] for i, row in enumerate(curve.rows)} for key in ("train_loss", "grad_norm"))
    return (losses, norms), str(path), trainer.strategy.dp_size  # type: ignore[attr-defined]


@pytest.mark.parametrize(("spec", "world"), [("ddp", 2), ("fsdp2", 2), ("hsdp", 4)])
def test_ranks_against_one_device(pool: RankPool, spec: str, world: int, tmp_path: Path) -> None:
    exact, _, _ = fit_curve("auto", str(tmp_path / "exact"), "64-true")
    near, _, _ = fit_curve("auto", str(tmp_path / "one"))
    for found, path, dp_size in pool.run(world, fit_curve, spec, str(tmp_path / "ranks")):
        assert dp_size == world
        assert Path(path).name == f"step-{STEPS:08d}"
        for kind, *numbers in zip(("loss", "gradient norm"), found, exact, near):
            check_run(*numbers, TOKENS, kind)


@pytest.mark.parametrize("kind", ["path", "dataset", "datasetdict", "rows", "datamodule", "jsonl of a folder"])
def test_what_data_may_be(kind: str, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in chats(20)))
    data: Any = {
        "path": str(file),
        "dataset": Dataset.from_list(chats(20)),
        "datasetdict": DatasetDict(train=Dataset.from_list(chats(20)), validation=Dataset.from_list(chats(5))),
        "rows": chats(20),
        "datamodule": ChatDataModule(str(file), seq_len=64, val_split=0.2),
        "jsonl of a folder": file,
    }[kind]
    trainer = Trainer(**quiet(tmp_path, max_epochs=1, enable_checkpointing=False))
    trainer.fit(str(folder), data)
    assert trainer.global_step == trainer.planned_steps()
    assert ("val_loss" in trainer.callback_metrics) == (kind in ("datasetdict", "datamodule"))


def test_what_a_model_may_be(folder: Path, tmp_path: Path) -> None:
    with torch.device("meta"):
        meta = transformers.AutoModelForCausalLM.from_config(tiny_model(tie_word_embeddings=True).config)
    meta.config.name_or_path = str(folder)
    meta.name_or_path = str(folder)
    losses = []
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for model in (str(folder), folder, loaded, meta, CausalLMModule(str(folder))):
        trainer = Trainer(**quiet(tmp_path, max_steps=1, enable_checkpointing=False))
        trainer.fit(model, chats())
        losses.append(float(trainer.callback_metrics["train_loss"]))
    assert losses == pytest.approx([losses[0]] * 5, rel=1e-6)


def test_a_model_s_folder_without_a_tokenizer(tmp_path: Path) -> None:
    """Trains on tokens that are there already; text is refused, and how to go on is said."""
    tiny_model().save_pretrained(tmp_path / "model")
    trainer = Trainer(**quiet(tmp_path, max_steps=1, enable_checkpointing=True))
    trainer.fit(tmp_path / "model", MockDataModule(vocab_size=200, seq_len=16, num_samples=8))
    trainer.save_pretrained(tmp_path / "tuned")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    with pytest.raises(ValueError, match="no tokenizer"):
        Trainer(**quiet(tmp_path, max_steps=1)).fit(tmp_path / "model", ChatDataModule(Dataset.from_list(chats(4))))


def test_plain_dataloader_and_accumulation(tmp_path: Path) -> None:
    rows = [{key: value[0] for key, value in row.items()} for row in random_rows(12, 16, seed=0)]
    loader = DataLoader(rows, batch_size=2)  # type: ignore[arg-type]
    trainer = Trainer(**quiet(tmp_path, max_epochs=1, enable_checkpointing=False, accumulate_grad_batches=3))
    trainer.fit(module(tiny_model()), loader)
    assert trainer.global_step == trainer.planned_steps() == 2


def test_save_pretrained_round_trip(folder: Path, tmp_path: Path) -> None:
    trainer = Trainer(**quiet(tmp_path, max_steps=2, enable_checkpointing=False))
    trainer.fit(CausalLMModule(str(folder), lr=1e-2), chats())
    out = trainer.save_pretrained(tmp_path / "out")
    back = transformers.AutoModelForCausalLM.from_pretrained(out)
    trained: PreTrainedModel = trainer.lightning_module.model
    assert back.lm_head.weight is back.model.embed_tokens.weight
    for name, weight in back.named_parameters():
        assert torch.equal(weight, trained.get_parameter(name)), name
    assert not torch.equal(back.model.norm.weight, torch.ones_like(back.model.norm.weight))
    assert (out / "README.md").read_text() == "# a model card\n"
    assert transformers.AutoTokenizer.from_pretrained(out).chat_template == tiny_tokenizer().chat_template


def test_validation_against_torchmetrics(folder: Path, tmp_path: Path) -> None:
    data = ChatDataModule(chats(), chats(7), seq_len=96, micro_batch_size=2)
    trainer = Trainer(**quiet(tmp_path))
    (metrics,) = trainer.validate(str(folder), data, verbose=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    perplexity, hits, tokens = Perplexity(ignore_index=-100), 0, 0
    for step in data.val_dataloader():
        for batch in step:
            with torch.no_grad():
                logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
            targets = batch["labels"][:, 1:]
            perplexity.update(logits[:, :-1], targets)
            hits += ((logits[:, :-1].argmax(-1) == targets) & (targets != -100)).sum().item()
            tokens += (targets != -100).sum().item()
    assert metrics["val_perplexity"] == pytest.approx(perplexity.compute().item(), rel=1e-4)
    assert metrics["val_token_accuracy"] == pytest.approx(hits / tokens)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.exact
def test_training_after_an_evaluation(precision: str, folder: Path, tmp_path: Path) -> None:
    """An evaluation leaves parameters gathered; the optimizer of a later fit must still get the shards."""
    curves = []
    for evaluate in (False, True):
        curve = Curve()
        ours = module(str(folder))
        if evaluate:
            Trainer(**quiet(tmp_path, precision=precision)).validate(ours, chats(5), verbose=False)
        trainer = Trainer(**quiet(tmp_path, precision=precision, max_steps=3, callbacks=[curve]))
        trainer.fit(ours, ChatDataModule(chats(), chats(4), seq_len=64, micro_batch_size=4))
        curves.append([row["train_loss"] for row in curve.rows])
    assert curves[0] == curves[1]


def test_predict_scores(folder: Path, tmp_path: Path) -> None:
    data = ChatDataModule(chats(6), chats(6), seq_len=64, packing=False)
    scored = Trainer(**quiet(tmp_path)).predict(str(folder), data)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for step, batches in zip(scored, data.predict_dataloader(), strict=True):
        for result, batch in zip(step, batches, strict=True):
            with torch.no_grad():
                logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            wanted = logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
            trained = batch["labels"][:, 1:] != -100
            assert torch.allclose(result["log_probs"][:, 1:][trained], wanted[trained], atol=1e-5)
            assert (result["log_probs"][:, 1:][~trained] == 0).all()


ALONE: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {},
    "gpt_oss": {"num_local_experts": 4, "sliding_window": 16},  # its code makes masks without position_ids
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 2},
}
PACKED = ("llama", "gemma3_text", "gpt_oss")  # the others carry state over documents


@pytest.mark.parametrize(("family", "packing"), [(f, p) for f in ALONE for p in ("auto", False)])
def test_rows_are_one_document_at_a_time(
    family: str, packing: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step over all chats, against plain transformers that sees each chat alone."""
    options = ALONE[family]
    model, tokenizer = tiny_model(family, **options), tiny_tokenizer()
    total, tokens = torch.zeros(()), 0
    for chat in chats(20):
        text = tokenizer.apply_chat_template(chat["messages"], tokenize=False)
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        prompt = tokenizer.apply_chat_template(chat["messages"][:1], tokenize=False, add_generation_prompt=True)
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        answer = slice(start, ids.shape[1] - 1)  # the line feed after the end-of-turn token is not the model's
        logits = model(input_ids=ids).logits[0, answer.start - 1 : answer.stop - 1]
        total = total + torch.nn.functional.cross_entropy(logits, ids[0, answer], reduction="sum")
        tokens += answer.stop - answer.start
    (total / tokens).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])

    def waits(*_: Any) -> None:
        raise AssertionError("transformers asked the device for document boundaries")

    monkeypatch.setattr(transformers.masking_utils, "find_packed_sequence_indices", waits)
    data = ChatDataModule(chats(20), tokenizer=tokenizer, seq_len=256, packing=packing, global_batch_size=20)
    curve = Curve()
    trainer = Trainer(**quiet(tmp_path, max_steps=1, callbacks=[curve], enable_checkpointing=False))
    trainer.fit(module(tiny_model(family, **options), tokenizer=tokenizer), data)
    assert data.packs is (packing == "auto" and family in PACKED)
    assert curve.rows[0]["train_loss"] == pytest.approx((total / tokens).item(), rel=1e-5)
    assert curve.rows[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    rows = json.loads((tmp_path / "ledger.json").read_text())["run"]["rows"]
    if packing is False:
        assert rows == "padded, by length; checked: a row with padding is as the row alone"
    elif data.packs:
        assert "packed documents are kept apart by position_ids, checked" in rows
    else:
        assert "not packed, because in" in rows


@pytest.mark.exact
def test_a_resumed_run_logs_the_same_losses(tmp_path: Path) -> None:
    """Also where the log step averages over steps before and after the stop."""
    curves = []
    for stop in (None, 4):
        data = MockDataModule(vocab_size=260, seq_len=24, global_batch_size=4, num_samples=40)
        root = tmp_path / str(stop)
        common = {"log_every_n_steps": 3, "callbacks": [DCPCheckpoint(every_n_steps=4)]}
        if stop:
            Trainer(**quiet(root, max_steps=stop, **common)).fit(module(tiny_model()), data)
        curve = Curve()
        trainer = Trainer(**quiet(root, max_steps=6, **{**common, "callbacks": [DCPCheckpoint(), curve]}))
        trainer.fit(module(tiny_model()), data, ckpt_path="last" if stop else None)
        curves.append(curve.rows[-1]["train_loss"])
    assert curves[0] == curves[1]


def test_nan_names_step_and_samples(tmp_path: Path) -> None:
    class Poisoned(CausalLMModule):
        def loss(self, outputs: Any, targets: Any) -> Any:
            return super().loss(outputs, targets) * (float("nan") if self.trainer.global_step == 2 else 1.0)

    steps = steps_of(4)
    for index, step in enumerate(steps):
        for half, batch in enumerate(step):
            batch["sample_ids"] = [10 * index + half]
    callback = DCPCheckpoint(every_n_steps=1)
    trainer = Trainer(**quiet(tmp_path, max_steps=STEPS, callbacks=[callback]))
    with pytest.raises(ValueError, match=r"step 3 was not finite .* Samples of that step: \[20, 21\]"):
        trainer.fit(Poisoned(tiny_model(), lr=1e-3), steps)
    assert Path(callback.last_model_path).name == "step-00000002"


def test_neftune_only_in_training(folder: Path, tmp_path: Path) -> None:
    plain, noisy = Curve(), Curve()
    for curve, alpha in ((plain, 0.0), (noisy, 20.0)):
        trainer = Trainer(**quiet(tmp_path, max_steps=1, callbacks=[curve], enable_checkpointing=False))
        trainer.fit(CausalLMModule(str(folder), neftune_alpha=alpha), chats())
        ids = torch.arange(10, 20)[None]
        model = trainer.lightning_module.model.eval()
        assert torch.equal(model(ids).logits, model(ids).logits)
    assert abs(plain.rows[0]["train_loss"] - noisy.rows[0]["train_loss"]) > 1e-4


def test_schedule_and_clipping_reach_the_optimizer(tmp_path: Path) -> None:
    curve, sgd = Curve(), OptimizerConfig("SGD", weight_decay=0.0)
    ours = CausalLMModule(tiny_model(), lr=1.0, optimizer=sgd, scheduler=SchedulerConfig("linear", warmup_steps=2))
    before = torch.cat([p.detach().flatten() for p in ours._reference[0].parameters()])
    trainer = Trainer(**quiet(tmp_path, max_steps=STEPS, callbacks=[curve], gradient_clip_val=1e-3))
    trainer.fit(ours, steps_of(8))
    assert [row["lr"] for row in curve.rows] == pytest.approx([0.5, 1.0, 1.0, 0.5])
    after = torch.cat([p.detach().flatten() for p in ours.model.parameters()])
    assert (after - before).norm() <= 1e-3 * 3.0 * 1.01
    assert curve.rows[0]["grad_norm"] > 1e-2


def test_a_learning_rate_in_a_tensor_is_logged_as_it_was_used(tmp_path: Path) -> None:
    """torchao's optimizers keep it so, and schedules then change it in place."""
    curve = Curve()
    ours = CausalLMModule(
        tiny_model(),
        optimizer=lambda groups: torch.optim.SGD(groups, lr=torch.tensor(1.0), foreach=False),
        scheduler=SchedulerConfig("linear", warmup_steps=2),
    )
    Trainer(**quiet(tmp_path, max_steps=STEPS, callbacks=[curve], enable_checkpointing=False)).fit(ours, steps_of(8))
    assert [float(row["lr"]) for row in curve.rows] == pytest.approx([0.5, 1.0, 1.0, 0.5])


class Regression(pl.LightningModule):
    """A user's own module with automatic optimization."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.body = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
        self.scale = torch.nn.Parameter(torch.ones(4))
        for parameter in self.parameters():
            parameter.data.uniform_(-0.5, 0.5, generator=generator)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = torch.nn.functional.mse_loss(self.body(x) * self.scale, y)
        self.log("loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def own_module(spec: str, root: str, world: int) -> Any:
    generator = torch.Generator().manual_seed(1)
    pairs = [(torch.randn(8, generator=generator), torch.randn(4, generator=generator)) for _ in range(32)]
    rank, share = int(os.environ.get("RANK", "0")) % world, 8 // world
    mine = [pairs[8 * batch + share * rank + i] for batch in range(4) for i in range(share)]
    curve = Curve()
    trainer = Trainer(
        **quiet(root, strategy=spec, devices=world, max_steps=3, callbacks=[curve], gradient_clip_val=0.1),
        accumulate_grad_batches=2,
        use_distributed_sampler=False,  # Lightning's shuffles
    )
    trainer.fit(Regression(), DataLoader(mine, batch_size=share))  # type: ignore[arg-type]
    return [row["loss"] for row in curve.rows], str(trainer.checkpoint_callback.last_model_path)  # type: ignore


@pytest.mark.parametrize(("spec", "world"), [("ddp", 2), ("fsdp2", 2), ("hsdp", 4)])
def test_own_lightning_module(pool: RankPool, spec: str, world: int, tmp_path: Path) -> None:
    """The mean over ranks of every batch's loss is one device's: gradients are averaged, not summed, also those of a
    parameter that stands on the module itself, and clipping sees all shards."""
    expected, _ = own_module("auto", str(tmp_path / "one"), 1)
    for losses, last in pool.run(world, own_module, spec, str(tmp_path / "ranks"), world):
        assert losses == pytest.approx(expected, rel=1e-5)
        assert Path(last).name == "step-00000003"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t, f: t.fit(str(f), 3), "data is a int"),
        (lambda t, f: t.fit(str(f) + "x", chats()), "neither a folder here nor"),
        (lambda t, f: t.fit(tiny_model(), chats()), "tokenizer"),
        (lambda t, f: t.fit(str(f), chats(), datamodule=MockDataModule(9)), "not both"),
        (lambda t, f: t.fit(str(f), chats(), ckpt_path="last"), "there is no checkpoint under"),
        (lambda t, f: t.validate(), "Give a model"),
        (lambda t, f: t.save_pretrained("x"), "no model in this process"),
        (lambda t, f: t.fit(str(f), []), "empty"),
    ],
)
def test_bad_input(call: Any, message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        call(Trainer(**quiet(tmp_path, max_steps=1)), folder)


def test_every_lightning_argument_is_here() -> None:
    import inspect

    theirs = inspect.signature(pl.Trainer.__init__).parameters
    ours = inspect.signature(Trainer.__init__).parameters
    assert theirs.keys() <= ours.keys()


def test_environment_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_TRAINER_MAX_STEPS", "7")
    assert Trainer(accelerator="cpu", devices=1, logger=False).max_steps == 7
