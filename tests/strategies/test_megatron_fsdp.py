"""Megatron-FSDP: options and mesh, and the package itself on gloo ranks against plain torch on one device."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

pytest.importorskip("megatron_fsdp")

from transformers import AutoModelForCausalLM

from automodel_trainer import CausalLMModule, LoRAConfig, MockDataModule, Trainer
from automodel_trainer.models.lora import apply_lora, finish_lora
from automodel_trainer.models.lora.initialize import whole
from automodel_trainer.nn.uneven import is_uneven, placed_like
from automodel_trainer.strategies import MegatronFSDPStrategy, StrategyRegistry
from automodel_trainer.strategies.megatron import _megatron_fsdp as package
from tests.callbacks import runs
from tests.harness import (
    NextToken,
    check_steps,
    make_strategy,
    once,
    random_rows,
    reference_steps,
    relative_error,
    stack,
    train_steps,
    with_limits,
)
from tests.pool import RankPool
from tests.strategies.gloo import streams_on_cpu
from tests.strategies.test_parity import EPS, LR, MAX_NORM, STEPS, rows_of
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("zero_stage=4", "Allowed: 0, 1, 2, 3"),
        ("zero_stage=1,outer_zero_stage=1,dp_replicate=2", "needs zero_stage=3"),
        ("outer_zero_stage=1", "dp_replicate > 1"),
        ("zero_stage=0,dp_replicate=2", "leave dp_replicate at 1"),
        ("overlap_grad_reduce=false", "zero_stage 0 and 1"),
        ("zero_stage=3,overlap_param_gather=false", "zero_stage 1 and 2"),
        ("zero_stage=2,double_buffer=true", "zero_stage=3"),
        ("grad_reduce_dtype=fp8", "Allowed: auto, fp32, bf16"),
        ("cpu_offload=true", "not an option"),
    ],
)
def test_options_that_cannot_be(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StrategyRegistry.get(f"megatron_fsdp:{spec}")


def test_without_cuda_or_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"NVIDIA GPUs only.*fsdp2"):
        make_strategy("megatron_fsdp", 1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"automodel-trainer\[megatron\].*fsdp2"):
        make_strategy("megatron_fsdp", 1)
    with pytest.raises(ValueError, match="nccl_allocator"):
        package.check_nccl_ub()


@pytest.mark.parametrize(
    ("precision", "spec", "dtypes"),
    [
        ("fp32", "", (torch.float32, None, torch.float32, None)),
        ("bf16", "", (torch.bfloat16, torch.float32, torch.float32, None)),
        ("bf16", ":grad_reduce_dtype=bf16", (torch.bfloat16, torch.float32, torch.float32, torch.bfloat16)),
        ("bf16-true", "", (torch.bfloat16, None, torch.bfloat16, torch.float32)),
        ("bf16-true", ":main_params_dtype=fp32", (torch.bfloat16, torch.float32, torch.float32, None)),
    ],
)
def test_dtypes(precision: str, spec: str, dtypes: tuple[Any, ...]) -> None:
    with streams_on_cpu():
        strategy = make_strategy(f"megatron_fsdp{spec}", 1, precision)
        assert isinstance(strategy, MegatronFSDPStrategy)
        options = strategy.options
        assert (options.compute_dtype, options.main_dtype, options.grads_dtype, options.reduce_dtype) == dtypes
        policy = options.arguments(strategy.buffer_mesh)["mixed_precision_policy"]
        # nothing travels on one rank
        assert (policy.main_params_dtype, policy.main_grads_dtype, policy.grad_comm_dtype) == (*dtypes[1:3], None)
    torch.distributed.destroy_process_group()


def test_fp64_is_refused() -> None:
    with streams_on_cpu(), pytest.raises(ValueError, match="64-true"):
        make_strategy("megatron_fsdp", 1, "64-true")


def arguments(spec: str) -> Any:
    with streams_on_cpu():
        strategy: Any = make_strategy(spec, 4)
        mesh = strategy.buffer_mesh
        given = strategy.options.arguments(mesh)
        hybrid = given["hybrid_fsdp_group"]
        names = ("zero_dp_strategy", "outer_dp_sharding_strategy", "dp_outer_dim")
        ranks = torch.distributed.get_process_group_ranks(hybrid) if hybrid is not None else None
        assert given["mixed_precision_policy"].grad_comm_dtype == strategy.options.reduce_dtype
        return dict(zip(mesh.mesh_dim_names, mesh.shape)), mesh.mesh.tolist(), ranks, [given[name] for name in names]


def test_mesh(pool: RankPool) -> None:
    sizes, ranks, hybrid, given = pool.run(4, arguments, "megatron_fsdp:cp=2,tp=2,grad_reduce_dtype=bf16")[0]
    assert sizes == {"dp_shard_cp": 2, "tp": 2}
    assert ranks == [[0, 1], [2, 3]]
    assert (hybrid, given) == (None, [3, 0, None])
    sizes, _, hybrid, given = pool.run(4, arguments, "megatron_fsdp:dp_replicate=2")[0]
    assert sizes == {"dp_outer": 2, "dp_shard_cp": 2, "tp": 1}
    assert (hybrid, given) == ([0, 1, 2, 3], [3, 1, "dp_outer"])


# --- the package itself ---------------------------------------------------------------------------------------------


TIED = {"tie_word_embeddings": True}


def gradient(parameter: Any) -> torch.Tensor:
    if parameter.grad is None:  # this rank's shard is empty
        return whole(placed_like(torch.zeros_like(parameter), parameter))
    return whole(placed_like(parameter.grad, parameter)).clone()


def train(spec: str, world_size: int, micro: int, family: str, lora: dict[str, Any] | None = None, **sizes: Any) -> Any:
    """Three optimizer steps on this rank; full gradients and weights come back."""
    torch.manual_seed(world_size)
    with streams_on_cpu():
        strategy = make_strategy(spec, world_size)
        model = tiny_model(family, **sizes)
        if lora is not None:
            apply_lora(model, LoRAConfig(rank=4, **lora))
        strategy.parallelize(model)
        if lora is not None:
            finish_lora(model)
        strategy.finalize_parameters(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, eps=EPS)
        if world_size == 1:
            return train_steps(strategy, NextToken(model), optimizer, rows_of, micro, steps=STEPS, max_norm=MAX_NORM)
        if package.wrapper_of(model) is not None:
            before = {name: whole(p).clone() for name, p in model.named_parameters()}
            package.shard_optimizer(optimizer)
            assert not optimizer.state
            assert all(torch.equal(whole(p), before[name]) for name, p in model.named_parameters())
        history = []
        for step in range(STEPS):
            mine = rows_of(step)[strategy.dp_rank :: strategy.dp_size]
            micro_batches = [stack(mine[i : i + micro]) for i in range(0, len(mine), micro)]
            count = torch.stack([(m["labels"][:, 1:] != -100).sum() for m in micro_batches]).sum()
            tokens = strategy.sum_over_rows(count)
            loss = strategy.forward_backward(NextToken(model), micro_batches, tokens)
            norm = strategy.clip_grad_norm_(model.parameters(), MAX_NORM)
            gradients = {name: gradient(p) for name, p in model.named_parameters() if p.requires_grad}
            optimizer.step()
            optimizer.zero_grad()
            total = strategy.sum_over_tokens(loss.clone()) / tokens
            history.append({"loss": total.item(), "norm": norm.item(), "gradients": gradients})
        return {"history": history, "weights": {n: whole(p).clone() for n, p in model.named_parameters()}}


@once
def reference(family: str, **sizes: Any) -> Any:
    model = tiny_model(family, **sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, eps=EPS)
    return reference_steps(model, optimizer, rows_of, steps=STEPS, max_norm=MAX_NORM)


@pytest.mark.parametrize(
    ("spec", "world_size", "micro", "family", "sizes"),
    [
        ("megatron_fsdp", 2, 2, "llama", {"vocab_size": 265, "hidden_size": 36}),  # no shard ends where a matrix does
        ("megatron_fsdp:zero_stage=0", 2, 4, "llama", {}),
        ("megatron_fsdp:zero_stage=1,overlap_grad_reduce=false,overlap_param_gather=false", 2, 2, "llama", TIED),
        ("megatron_fsdp:zero_stage=2,cp=2", 4, 2, "llama", {}),
        ("megatron_fsdp:activation_checkpointing=full", 2, 2, "qwen3", TIED),
        ("megatron_fsdp:dp_replicate=2", 4, 1, "llama", TIED),
        ("megatron_fsdp:dp_replicate=2", 2, 2, "llama", {}),
        ("megatron_fsdp:tp=2", 4, 2, "llama", TIED),
    ],
)
def test_parity(pool: RankPool, spec: str, world_size: int, micro: int, family: str, sizes: dict[str, Any]) -> None:
    expected = reference(family, **sizes)
    for result in pool.run(world_size, train, spec, world_size, micro, family, **sizes):
        check_steps(result, expected)


@pytest.mark.parametrize(("stage", "world_size"), [(3, 1), (3, 2)])
def test_gradients_that_travel_in_bf16(pool: RankPool, stage: int, world_size: int) -> None:
    """The same but for rounding: none is lost, and none counted twice."""
    expected = reference("llama")["history"][0]
    spec = f"megatron_fsdp:zero_stage={stage},grad_reduce_dtype=bf16"
    got = pool.run(world_size, train, spec, world_size, 2, "llama")[0]["history"][0]
    for name, gradient in expected["gradients"].items():
        assert relative_error(got["gradients"][name], gradient) < 1e-2, name


@pytest.mark.parametrize(("spec", "world_size"), [("megatron_fsdp", 2), ("megatron_fsdp:tp=2", 4)])
def test_lora(pool: RankPool, spec: str, world_size: int) -> None:
    """Held against the same adapters on one device."""
    expected = with_limits(lambda: train("auto", 1, 2, "llama", lora={"init": "orthogonal"}))
    for result in pool.run(world_size, train, spec, world_size, 2, "llama", lora={"init": "orthogonal"}):
        check_steps(result, expected)


def wrong_plan() -> str:
    with streams_on_cpu():
        strategy = make_strategy("megatron_fsdp:tp=2", 2)
        strategy.tp_plan = {"model.layers.*.self_attn.q_norm": "replicate"}
        model = strategy.parallelize(tiny_model("qwen3"))
        strategy.finalize_parameters(model)
        try:
            strategy.forward_backward(NextToken(model), [stack(random_rows(2, 12, seed=0))], torch.tensor(20))
        except ValueError as error:
            return str(error)
        return ""


def test_a_tensor_parallel_plan_that_forgets_a_sum(pool: RankPool) -> None:
    for said in pool.run(2, wrong_plan):
        assert "gradients of model.layers.*.self_attn.q_norm" in said


# --- with a Trainer -------------------------------------------------------------------------------------------------


def attached(trainer: Any) -> dict[str, bool]:
    """Whether the optimizer still finds the model it trains: by the parameters that it was given."""
    model = trainer.lightning_module.model
    trained = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
    named = {id(p) for p in model.parameters() if p.requires_grad}
    wrapper = package.wrapper_of(model)
    return {
        "stamped": all(p._megatron_fsdp_model is wrapper for p in trained),
        "in the model": all(id(p) in named for p in trained) and len(named) == len(trained),
        "sharded": all(isinstance(p, DTensor) and is_uneven(p) for p in trained),
    }


def fit(root: Path, base: Path, strategy: str, max_steps: int, resume: bool, lora: bool) -> Any:
    """Train a model of a folder (built on meta, its weights streamed in), with validation; export it at the end."""
    with streams_on_cpu():
        trainer = Trainer(
            accelerator="cpu",
            strategy=strategy,
            devices=2,
            max_steps=max_steps,
            val_check_interval=2,
            log_every_n_steps=1,
            num_sanity_val_steps=0,
            default_root_dir=root,
            logger=False,
            enable_progress_bar=False,
            callbacks=[journal := runs.Journal()],
        )
        module = CausalLMModule(
            base,
            tokenizer=tiny_tokenizer(),
            lr=1e-2,
            scheduler="constant",
            optimizer=runs.ADAM,
            lora=LoRAConfig(rank=4) if lora else None,
        )
        data = MockDataModule(264, seq_len=16, micro_batch_size=2, global_batch_size=8, num_samples=64, val_samples=4)
        trainer.fit(module, data, ckpt_path="last" if resume else None)
        trainer.save_pretrained(root / f"export-{max_steps}")
        found = attached(trainer) if package.wrapper_of(module.model) is not None else {}
        losses = {entry[:2]: entry[3 if entry[0] == "train" else 2] for entry in journal.entries}
        return {
            "losses": losses,
            "attached": found,
            "weights": {n: whole(p) for n, p in module.model.named_parameters()},
        }


@pytest.mark.parametrize(
    ("first", "second", "lora"),
    [
        ("megatron_fsdp", "fsdp2", False),
        ("fsdp2", "megatron_fsdp:zero_stage=1", True),
    ],
)
def test_saved_under_one_resumed_under_the_other(
    pool: RankPool, tmp_path: Path, first: str, second: str, lora: bool
) -> None:
    """Weights streamed from safetensors, validation, checkpoint, resume, export: as FSDP2 in one go."""
    tiny_model("llama", hidden_size=36).save_pretrained(tmp_path / "base")
    base, mixed = tmp_path / "base", tmp_path / "mixed"
    whole_run = pool.run(2, fit, tmp_path / "whole", base, "fsdp2", 4, False, lora)[0]
    start = pool.run(2, fit, mixed, base, first, 2, False, lora)[0]
    rest = pool.run(2, fit, mixed, base, second, 4, True, lora)[0]
    losses = {**start["losses"], **rest["losses"]}
    assert {("train", 1), ("train", 4), ("val", 4)} <= losses.keys()
    assert losses == pytest.approx({key: whole_run["losses"][key] for key in losses}, rel=1e-5)
    for name, weight in whole_run["weights"].items():
        assert relative_error(rest["weights"][name], weight) < 1e-4, name
    for result in (start, rest):
        assert all(result["attached"].values())
    if not lora:
        exported = AutoModelForCausalLM.from_pretrained(mixed / "export-4")
        for name, weight in exported.named_parameters():
            assert torch.equal(weight.detach(), rest["weights"][name]), name


def test_a_rebuilt_parameter_is_no_longer_the_packages(pool: RankPool) -> None:
    assert pool.run(1, rebuilt) == ["lost"]


def rebuilt() -> str:
    with streams_on_cpu():
        strategy = make_strategy("megatron_fsdp", 1)
        model = strategy.parallelize(tiny_model("llama"))
        strategy.finalize_parameters(model)
        optimizer = torch.optim.AdamW([torch.nn.Parameter(p.detach()) for p in model.parameters()])
        try:
            package.shard_optimizer(optimizer)
        except ValueError as error:
            return "lost" if "Could not retrieve" in str(error) else str(error)
        return "kept"
