"""LoRA on 2 and 4 ranks against one, and through the Trainer: checkpoints, resume, export, merge."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import peft
import pytest
import torch
import transformers
from lightning.pytorch.callbacks import Callback
from torch.distributed.tensor import DTensor

from automodel_trainer import AutoModelForCausalLM, CausalLMModule, MockDataModule, Trainer
from automodel_trainer.callbacks.ledger_text import ledger_rows
from automodel_trainer.distributed._dtensor import local_tensor
from automodel_trainer.models.kernels.choose import KernelsConfig
from automodel_trainer.models.lora import LoRAConfig
from automodel_trainer.models.lora.adapter_files import trained_tensors
from automodel_trainer.models.lora.initialize import whole
from tests.beside import use
from tests.harness import (
    NextToken,
    Stop,
    adamw,
    check_run,
    close,
    make_strategy,
    once,
    random_rows,
    relative_error,
    stack,
)
from tests.limits import SAFETY, check_within, computing, exactly, recast_share, run_error
from tests.matrix import more
from tests.pool import RankPool
from tests.routers import decided, separated
from tests.tiny import tiny_model, tiny_tokenizer

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
ADAPTED = [*(f"{n}_proj" for n in "qkvo"), "gate_proj", "up_proj", "down_proj"]
IDS = torch.arange(6, 70).view(2, 32)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    tiny_model("llama").save_pretrained(folder / "dense")
    tiny_tokenizer().save_pretrained(folder / "dense")
    tiny_model("llama", num_hidden_layers=1).save_pretrained(folder / "block")
    separated(tiny_model("qwen3_moe", **MOE), seed=0).save_pretrained(folder / "moe")
    return folder


def train(
    spec: str,
    world_size: int,
    precision: str,
    base: Path,
    lora: dict[str, Any],
    kernels: KernelsConfig | None = None,
) -> dict[str, Any]:
    """Three steps on this rank."""
    torch.manual_seed(world_size)  # nothing may depend on it
    strategy = make_strategy(spec, world_size, precision)
    model = AutoModelForCausalLM.from_pretrained(
        base, strategy, lora=LoRAConfig(rank=4, **lora), kernels=kernels
    ).train()
    if spec == "ddp" and world_size > 1:
        strategy._wrapped = strategy._wrap(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw(parameters, 1e-2, eps=1e-3)
    losses, norms = [], []
    seen: list[torch.Tensor | None] = []  # what each backward writes a gradient to
    parameters[0].register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))
    with computing(model):
        for step in range(3):
            mine = random_rows(8, 24, seed=step)[strategy.dp_rank :: strategy.dp_size]
            micro_batches = [stack(mine[i : i + 1]) for i in range(len(mine))]
            counts = torch.stack([(m["labels"][:, 1:] != -100).sum() for m in micro_batches])
            tokens = strategy.sum_over_rows(counts.sum())
            with decided(model) if (world_size, precision) == (1, "fp32") else nullcontext():
                loss = strategy.forward_backward(NextToken(model), micro_batches, tokens)
            norms.append(strategy.clip_grad_norm_(parameters, 1.0).item())
            optimizer.step()
            optimizer.zero_grad()
            losses.append((strategy.sum_over_tokens(loss) / tokens).item())
    return {
        "losses": losses,
        "norms": norms,
        "trained": {name: whole(p).clone() for name, p in trained_tensors(model).items()},
        "held": sum(local_tensor(p).numel() for p in model.parameters()) / sum(p.numel() for p in model.parameters()),
        "accumulate_grads_foreach": all(a is not b for a, b in itertools.pairwise(seen)),
        "sharded": any(isinstance(p, DTensor) for p in parameters),
        "dtypes": {(p.requires_grad, str(p.dtype)) for p in model.parameters()},
    }


def in_fp64(*args: Any) -> dict[str, Any]:
    with exactly():
        return train(*args)


@pytest.fixture(scope="module")
def alone(pool: RankPool, bases: Path) -> Callable[[str], dict[str, Any]]:
    """The fp32 run of a kind on one device."""

    @once
    def run(kind: str) -> dict[str, Any]:
        family, lora = (KINDS | OTHER_KINDS)[kind]
        return pool.run(1, train, "ddp", 1, "fp32", bases / family, lora)[0]

    return run


TOKENS = 8 * 24  # of a step
LAYOUTS = [("ddp", 2), ("fsdp2", 2), ("fsdp2", 4), ("hsdp:dp_replicate=2", 4), ("fsdp2:cp=2", 2)]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("dense", {}),
    "dora-head": ("dense", {"use_dora": True, "modules_to_save": ["lm_head"]}),
    "pissa": ("dense", {"init": "pissa", "use_rslora": True}),
    "experts": ("moe", {}),
}


@pytest.mark.parametrize(
    ("kind", "layouts"),
    [
        ("plain", [LAYOUTS[0], LAYOUTS[2], LAYOUTS[4]]),
        ("dora-head", [LAYOUTS[1], LAYOUTS[3]]),
        ("pissa", [LAYOUTS[0], LAYOUTS[2]]),
        ("experts", [LAYOUTS[1], LAYOUTS[4]]),
        more("plain", [LAYOUTS[1], LAYOUTS[3]]),
        more("dora-head", [LAYOUTS[2]]),
        more("experts", [LAYOUTS[3]]),
    ],
)
def test_ranks(
    pool: RankPool,
    bases: Path,
    alone: Callable[[str], dict[str, Any]],
    kind: str,
    layouts: list[tuple[str, int]],
) -> None:
    family, lora = KINDS[kind]
    near = alone(kind)
    (exact,) = pool.run(1, in_fp64, "ddp", 1, "fp32", bases / family, lora)
    for spec, world_size in layouts:
        for result in pool.run(world_size, train, spec, world_size, "fp32", bases / family, lora):
            for kind_of, key in (("loss", "losses"), ("gradient norm", "norms")):
                check_run(*(dict(enumerate(r[key])) for r in (result, exact, near)), TOKENS, kind_of)
            check_run(result["trained"], exact["trained"], near["trained"], TOKENS)
            shards = {"ddp": 1, "hsdp:dp_replicate=2": 2}.get(spec, world_size)
            assert result["held"] == pytest.approx(1 / shards, rel=0.1)


OTHER_KINDS: dict[str, Any] = {
    "dora": ("dense", {"use_dora": True}),
    "block": ("block", {}),  # one, where a second takes the compiler as long again
    "block-head": ("block", {"modules_to_save": ["lm_head"]}),
}
COMPILED = "fsdp2:compile=true,compile_backend=aot_eager"


@pytest.mark.parametrize(
    ("spec", "world_size", "kernel", "kind"),
    [
        ("fsdp2", 1, "separate", "plain"),
        ("fsdp2", 1, "separate", "experts"),
        more("fsdp2", 1, "separate", "dora"),
        ("fsdp2", 1, "separate", "dora-head"),
        ("fsdp2", 2, "separate", "plain"),
        more(COMPILED, 1, "widened", "block"),
        more(COMPILED, 1, "widened", "block-head"),
        (f"{COMPILED},activation_checkpointing=full", 1, "widened", "block"),
    ],
)
def test_bf16_holds_the_base_in_bf16_and_adapters_in_fp32(
    pool: RankPool,
    bases: Path,
    alone: Callable[[str], dict[str, Any]],
    spec: str,
    world_size: int,
    kernel: str,
    kind: str,
) -> None:
    """On one device nobody but the adapters themselves casts them. Unless other parameters are trained too: then copies
    in bf16 live for an optimizer step, and the next step's must be others."""
    family, lora = (KINDS | OTHER_KINDS)[kind]
    exact, kernels = alone(kind), KernelsConfig(lora=kernel)
    result = pool.run(world_size, train, spec, world_size, "bf16", bases / family, lora, kernels)[0]
    unsharded = world_size == 1 and "modules_to_save" not in lora
    assert result["sharded"] is not unsharded
    assert result["accumulate_grads_foreach"] or not unsharded
    assert result["dtypes"] == {(True, "torch.float32"), (False, "torch.bfloat16")}
    assert result["losses"] == pytest.approx(exact["losses"], rel=5e-3)
    together = [torch.cat([t.flatten() for t in run["trained"].values()]) for run in (result, exact)]
    assert relative_error(*together) < (0.03 if kind == "experts" else 0.02)  # some tokens are routed otherwise


# --- through the Trainer ----------------------------------------------------------------------------------------------


class Losses(Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.values.append(float(trainer.callback_metrics["train_loss"]))


def fit(
    base: Path,
    root: Path,
    steps: int,
    stop: int,
    ckpt: Path | None = None,
    precision: Any = "fp32",
    batch: dict[str, Any] | None = None,
    **lora: Any,
) -> dict[str, Any]:
    """Train up to step `stop` of a run of `steps`."""
    losses = Losses()
    torch.manual_seed(0)  # of dropout
    trainer = Trainer(
        accelerator="cpu",
        devices=1 if not torch.distributed.is_torchelastic_launched() else "auto",
        strategy="fsdp2",
        precision=precision,
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        log_every_n_steps=1,
        default_root_dir=root,
        callbacks=[losses, Stop(stop)],
    )
    chosen = {"rank": 4, "dropout": 0.1, "modules_to_save": ["norm"], **lora}
    module = CausalLMModule(base, lora=LoRAConfig(**chosen), lr=1e-2)
    data = MockDataModule(vocab_size=264, seq_len=32, num_samples=64, **(batch or {"micro_batch_size": 2}))
    checkpoint = trainer.fit(module, data, ckpt_path=ckpt)
    return {"trainer": trainer, "module": module, "checkpoint": checkpoint, "losses": losses.values}


def test_bf16_trains_as_fp32_does(bases: Path, tmp_path: Path) -> None:
    runs = [fit(bases / "dense", tmp_path / precision, 6, 6, precision=precision) for precision in ("bf16", "fp32")]
    assert runs[0]["losses"] == pytest.approx(runs[1]["losses"], rel=5e-3)
    trained = [
        torch.cat([whole(p).flatten() for name, p in trained_tensors(run["module"].model).items() if "lora_B" in name])
        for run in runs
    ]
    assert relative_error(*trained) < 0.1  # Adam makes much of the smallest gradients' signs


@pytest.mark.parametrize("lora", [{}, {"init": "pissa"}, {"quantize": "nf4"}], ids=["plain", "pissa", "nf4"])
@pytest.mark.exact
def test_resume_is_exact_and_writes_no_base(bases: Path, tmp_path: Path, lora: dict[str, Any]) -> None:
    if "quantize" in lora:
        use("torchao")
    straight = fit(bases / "dense", tmp_path / "a", 6, 6, **lora)
    half = fit(bases / "dense", tmp_path / "b", 6, 3, **lora)
    rest = fit(bases / "dense", tmp_path / "c", 6, 6, half["checkpoint"], **lora)
    assert half["losses"] + rest["losses"] == straight["losses"]
    for name, parameter in trained_tensors(straight["module"].model).items():
        assert torch.equal(parameter, trained_tensors(rest["module"].model)[name]), name
    files = {file.name for file in (half["checkpoint"] / "model").glob("*.safetensors*")}
    assert files == {"adapter_model.safetensors"}


def test_checkpoint_export_and_merge_are_what_was_trained(bases: Path, tmp_path: Path) -> None:
    run = fit(bases / "dense", tmp_path / "run", 3, 3)
    model = run["module"].model.eval()
    expected = model(IDS).logits
    run["trainer"].save_pretrained(tmp_path / "export")
    for adapter in (run["checkpoint"] / "model", tmp_path / "export"):
        plain = transformers.AutoModelForCausalLM.from_pretrained(bases / "dense")
        theirs = peft.PeftModel.from_pretrained(plain, str(adapter)).eval()
        close(theirs(IDS).logits, expected)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    assert tokenizer.chat_template == run["module"].tokenizer.chat_template
    merged = run["trainer"].merge_and_save(tmp_path / "merged")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(merged).eval()
    close(loaded(IDS).logits, expected)
    assert transformers.AutoTokenizer.from_pretrained(merged).chat_template
    assert not list(tmp_path.glob(".merged*"))
    facts = json.loads((tmp_path / "run" / "ledger.json").read_text())
    found = [f"2 × {name}" for name in sorted(ADAPTED)]
    assert facts["model"]["lora"].startswith("rank 4 on 14 weights: ")
    assert sorted(facts["model"]["lora"].partition(": ")[2].partition(";")[0].split(", ")) == found
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    text = dict(ledger_rows(facts))["parameters"]
    assert text == f"{trained:,} trained ({trained / total:.2%}), {total - trained:,} frozen"


def on_ranks(base: Path, root: Path) -> list[float]:
    half = fit(base, root / "half", 4, 2)
    rest = fit(base, root / "rest", 4, 4, half["checkpoint"])
    rest["trainer"].save_pretrained(root / "export")
    rest["trainer"].merge_and_save(root / "merged")
    return half["losses"] + rest["losses"]


def test_trainer_on_two_ranks(pool: RankPool, bases: Path, tmp_path: Path) -> None:
    first, second = pool.run(2, on_ranks, bases / "dense", tmp_path)
    assert first == second
    assert len(first) == 4
    plain = transformers.AutoModelForCausalLM.from_pretrained(bases / "dense")
    adapter = peft.PeftModel.from_pretrained(plain, str(tmp_path / "export")).eval()
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    close(merged(IDS).logits, adapter(IDS).logits)


# a row a micro-batch: gradients of the same rows are rounded to bf16, whoever has them
ALONE: dict[str, Any] = {"precision": "bf16", "batch": {"micro_batch_size": 1, "global_batch_size": 4}}
ALONE |= {"dropout": 0.0, "modules_to_save": []}


def half_on_ranks(base: Path, root: Path) -> tuple[Path, list[float]]:
    half = fit(base, root / "ranks", 4, 2, **ALONE)
    return half["checkpoint"], half["losses"]


def test_adapters_that_one_device_trains_alone_go_on_from_shards(pool: RankPool, bases: Path, tmp_path: Path) -> None:
    """In bf16 one device leaves them out of FSDP2, as plain fp32 parameters."""
    straight = fit(bases / "dense", tmp_path / "straight", 4, 4, **ALONE)
    assert not any(isinstance(p, DTensor) for p in straight["module"].model.parameters())
    checkpoint, losses = pool.run(2, half_on_ranks, bases / "dense", tmp_path)[0]
    rest = fit(bases / "dense", tmp_path / "rest", 4, 4, checkpoint, **ALONE)
    exact = fit(bases / "dense", tmp_path / "exact", 4, 4, **{**ALONE, "precision": "fp32"})
    share, because = recast_share(128, bits=7), "what bf16 costs, of numbers that rounding moves to another value"
    cost = max(abs(a - b) for a, b in zip(straight["losses"], exact["losses"]))
    for found, wanted in zip(losses + rest["losses"], straight["losses"], strict=True):
        check_within("loss", abs(found - wanted), SAFETY * cost, "10 times what bf16 costs: it is one number")
    ended, wanted, truth = (trained_tensors(run["module"].model) for run in (rest, straight, exact))
    check_within("weights", run_error(ended, wanted), share * run_error(wanted, truth), because)


def test_a_checkpoint_of_other_targets_is_refused(bases: Path, tmp_path: Path) -> None:
    half = fit(bases / "dense", tmp_path / "a", 4, 2, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"target_modules \['q_proj'\] → \['q_proj', 'k_proj'\]"):
        fit(bases / "dense", tmp_path / "b", 4, 4, half["checkpoint"], target_modules=["q_proj", "k_proj"])


def test_a_model_object_gets_adapters_and_one_that_has_them_keeps_them(bases: Path, tmp_path: Path) -> None:
    plain = transformers.AutoModelForCausalLM.from_pretrained(bases / "dense")
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = Trainer(accelerator="cpu", max_steps=1, default_root_dir=tmp_path, **quiet)
    data = MockDataModule(vocab_size=264, seq_len=32, micro_batch_size=2, num_samples=4)
    trainer.fit(CausalLMModule(plain, lora=LoRAConfig(rank=2)), data)
    values = {name: p.clone() for name, p in trained_tensors(plain).items()}
    assert any((v != 0).any() for name, v in values.items() if "lora_B" in name)
    with pytest.raises(ValueError, match="already has adapters"):
        trainer.validate(CausalLMModule(plain, lora=LoRAConfig(rank=2)), data)
    trainer.validate(CausalLMModule(plain), MockDataModule(vocab_size=264, seq_len=32, num_samples=4, val_samples=4))
    assert all(torch.equal(values[name], p) for name, p in trained_tensors(plain).items())
