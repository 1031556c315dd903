"""transformers' Trainer and TRL's on our sharded models: as on one device, saving included."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, TrainingArguments, set_seed
from transformers.distributed import DistributedConfig

from automodel_trainer import AutoModelForCausalLM, AutoModelForSequenceClassification, LoRAConfig
from tests.matrix import more
from tests.pool import RankPool
from tests.tiny import tiny_model, tiny_tokenizer

trl = pytest.importorskip("trl")

LORA = LoRAConfig(rank=4, init="orthogonal")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainers") / "base"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def chats(count: int) -> list[dict[str, Any]]:
    turn = [
        ({"role": "user", "content": f"{i}+1=?"}, {"role": "assistant", "content": str(i + 1)}) for i in range(count)
    ]
    return [{"messages": list(pair)} for pair in turn]


def trainer_of(kind: str, model: Any, tokenizer: Any, common: dict[str, Any]) -> Any:
    common = {**common, "processing_class": tokenizer}
    arguments = common.pop("arguments")
    if kind in ("hf", "lora", "grown", "smoothed"):
        smoothing = {"label_smoothing_factor": 0.3} if kind == "smoothed" else {}
        rows = Dataset.from_list([{"input_ids": tokenizer(f"{i} plus {i}")["input_ids"]} for i in range(24)])
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        return transformers.Trainer(
            model, TrainingArguments(**arguments, **smoothing), train_dataset=rows, data_collator=collator, **common
        )
    if kind in ("sft", "packed"):
        more = {"packing": True, "packing_strategy": "wrapped"} if kind == "packed" else {}
        args = trl.SFTConfig(**arguments, max_length=48, gradient_checkpointing=kind == "sft", **more)
        return trl.SFTTrainer(model, args=args, train_dataset=Dataset.from_list(chats(24)), **common)
    if kind == "dpo":
        args, reference = trl.DPOConfig(**arguments), common.pop("reference")
        rows = [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": "no"} for i in range(24)]
        return trl.DPOTrainer(model, reference, args=args, train_dataset=Dataset.from_list(rows), **common)
    if kind == "reward":
        rows = [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": "no"} for i in range(24)]
        args = trl.RewardConfig(**arguments, max_length=48)
        return trl.RewardTrainer(model, args=args, train_dataset=Dataset.from_list(rows), **common)
    args = trl.GRPOConfig(**arguments, num_generations=2, max_completion_length=8)
    rows = Dataset.from_list([{"prompt": f"{i}+1="} for i in range(24)])
    return trl.GRPOTrainer(model, reward_funcs=score, args=args, train_dataset=rows, **common)


def grow(model: Any) -> None:
    """Add a trained module to a model that may be sharded already; transformers' Trainer averages its gradients."""
    model.grown = torch.nn.Linear(model.config.hidden_size, model.config.hidden_size, bias=False)
    torch.nn.init.orthogonal_(model.grown.weight)
    grown = model.grown
    model.model.norm.register_forward_hook(lambda module, inputs, output: output + grown(output))


def score(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(map(ord, text)) % 5) for text in completions]


def run(kinds: list[str], spec: str | None, base: Path, out: Path) -> dict[str, Any]:
    """(loss, gradient norm) of three steps of each kind of trainer, and the folder that it saved."""
    seen: dict[str, Any] = {}
    ParallelismConfig._validate_accelerator = lambda *_: None  # type: ignore[method-assign]  # it refuses tp on CPUs
    warnings.simplefilter("ignore")
    for kind in kinds:
        for state in (AcceleratorState, GradientState, PartialState):
            state._shared_state.clear()
        set_seed(1)
        auto = AutoModelForSequenceClassification if kind == "reward" else AutoModelForCausalLM
        options = {"num_labels": 1} if kind == "reward" else {}
        tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        if spec == "transformers":
            sizes = DistributedConfig(fsdp_size=dist.get_world_size() if dist.is_initialized() else 2)
            model = transformers.AutoModelForCausalLM.from_pretrained(base, distributed_config=sizes)
        else:
            model = auto.from_pretrained(base, strategy=spec, lora=LORA if kind == "lora" else None, **options)
        model.config.pad_token_id = tokenizer.pad_token_id
        if kind == "grown":
            grow(model)
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        rows = ranks // (getattr(model, "_tp_size", None) or 1)
        arguments = {
            "max_steps": 3, "per_device_train_batch_size": 4 // rows, "learning_rate": 1e-3, "logging_steps": 1,
            "report_to": [], "save_strategy": "no", "use_cpu": True, "bf16": False, "seed": 1, "disable_tqdm": True,
            "output_dir": str(out / "run"), "adam_epsilon": 1e-3,
        }  # fmt: skip
        more = {"reference": auto.from_pretrained(base, strategy=spec)} if kind == "dpo" else {}
        trainer = trainer_of(kind, model, tokenizer, {"arguments": arguments, **more})
        trainer.train()
        if kind != "grown":
            trainer.save_model(str(out / kind))
        history = [(x["loss"], x["grad_norm"]) for x in trainer.state.log_history if "loss" in x]
        seen[kind] = {"history": history, "wrapped": type(trainer.model_wrapped).__name__.removeprefix("FSDP")}
    return seen


@pytest.mark.parametrize(
    ("spec", "world_size", "kinds"),
    [
        ("fsdp2", 2, ["hf", "smoothed", "grown", "lora", "sft", "packed", "dpo", "reward"]),
        ("fsdp2:tp=2", 2, ["hf", "smoothed", "lora", "sft"]),
        more("fsdp2:tp=2", 4, ["hf", "sft"]),
    ],
)
def test_as_on_one_device(
    pool: RankPool, base: Path, tmp_path: Path, spec: str, world_size: int, kinds: list[str]
) -> None:
    (alone,) = pool.run(1, run, kinds, None, base, tmp_path / "one")
    sharded = pool.run(world_size, run, kinds, spec, base, tmp_path / "many")[0]
    for kind in kinds:
        assert sharded[kind]["wrapped"] != "DistributedDataParallel", kind
        assert len(alone[kind]["history"]) == 3
        ours, one = (torch.tensor(run[kind]["history"]).double() for run in (sharded, alone))
        assert torch.allclose(ours, one, rtol=2e-3, atol=2e-4), f"{kind}: {ours} for {one}"
        if kind == "grown":
            continue
        files = {file.name for file in (tmp_path / "many" / kind).iterdir()}
        assert ("adapter_model.safetensors" in files) == (kind == "lora"), files
        auto = transformers.AutoModelForSequenceClassification if kind == "reward" else AutoModelForCausalLM
        saved, reference = (auto.from_pretrained(tmp_path / place / kind) for place in ("many", "one"))
        ids = torch.arange(6, 18).view(1, 12)
        with torch.no_grad():
            ours, one = (m.eval()(input_ids=ids).logits for m in (saved, reference))
        assert torch.allclose(ours, one, atol=2e-3), kind


def best(spec: str | None, base: Path, out: Path) -> dict[str, Any]:
    """Four steps, with a checkpoint after two; the first is "best", and is read again at the end."""
    ParallelismConfig._validate_accelerator = lambda *_: None  # type: ignore[method-assign]
    warnings.simplefilter("ignore")
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    set_seed(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, strategy=spec)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    arguments = {
        "max_steps": 4, "per_device_train_batch_size": 4 // (ranks // (getattr(model, "_tp_size", None) or 1)),
        "learning_rate": 1e-2, "lr_scheduler_type": "constant", "report_to": [], "use_cpu": True, "seed": 1,
        "disable_tqdm": True, "adam_epsilon": 1e-3, "output_dir": str(out), "eval_strategy": "steps", "eval_steps": 2,
        "save_strategy": "steps", "save_steps": 2, "metric_for_best_model": "eval_loss", "greater_is_better": True,
        "load_best_model_at_end": True, "eval_on_start": True, "save_only_model": True,
    }  # fmt: skip
    rows = Dataset.from_list([{"input_ids": tokenizer(f"{i} plus {i}")["input_ids"]} for i in range(24)])
    common = {
        "train_dataset": rows, "eval_dataset": rows.select(range(8)), "processing_class": tokenizer,
        "data_collator": DataCollatorForLanguageModeling(tokenizer, mlm=False),
    }  # fmt: skip
    trainer = transformers.Trainer(model, TrainingArguments(**arguments), **common)
    trainer.train()
    with torch.no_grad():
        logits: Any = model.eval()(input_ids=torch.arange(6, 18).view(1, 12)).logits
    return {
        "losses": [x["eval_loss"] for x in trainer.state.log_history if "eval_loss" in x],
        "logits": logits.full_tensor() if hasattr(logits, "full_tensor") else logits,
        "best": Path(trainer.state.best_model_checkpoint or "").name,
    }


@pytest.mark.parametrize("spec", ["fsdp2", "fsdp2:tp=2"])
def test_the_best_checkpoint_is_read_into_shards(pool: RankPool, base: Path, tmp_path: Path, spec: str) -> None:
    (alone,) = pool.run(1, best, None, base, tmp_path / "one")
    for seen in pool.run(2, best, spec, base, tmp_path / "many"):
        assert seen["best"] == alone["best"] == "checkpoint-2"
        assert seen["losses"] == pytest.approx(alone["losses"], rel=1e-4)
        assert torch.allclose(seen["logits"], alone["logits"], atol=2e-3)
    (plain, last) = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "many" / f"checkpoint-{step}") for step in (2, 4)
    )
    ids = torch.arange(6, 18).view(1, 12)
    with torch.no_grad():
        assert torch.allclose(plain(input_ids=ids).logits, alone["logits"], atol=2e-3)
        assert not torch.allclose(last(input_ids=ids).logits, alone["logits"], atol=0.1)


def test_grpo_as_transformers_own_sharding(pool: RankPool, base: Path, tmp_path: Path) -> None:
    """Ranks draw their completions with generators of their own, so one device is no reference."""
    theirs = pool.run(2, run, ["grpo"], "transformers", base, tmp_path / "theirs")[0]["grpo"]["history"]
    ours = pool.run(2, run, ["grpo"], "fsdp2", base, tmp_path / "ours")[0]["grpo"]["history"]
    assert torch.allclose(torch.tensor(ours), torch.tensor(theirs), rtol=2e-3, atol=2e-4), f"{ours} for {theirs}"
