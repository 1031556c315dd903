"""Tensor parallel as it is used: through the Trainer, from checkpoints, in a user's own module; and its errors."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import AutoConfig

from automodel_trainer import AutoModelForCausalLM, ChatDataModule, Trainer
from automodel_trainer.checkpoint.optimizer import load_optimizers, snapshot_optimizers
from automodel_trainer.distributed._dtensor import local_tensor
from automodel_trainer.distributed.agreement import on_all_ranks
from automodel_trainer.models.lora import LoRAConfig, apply_lora
from automodel_trainer.models.small_copy import small_copy
from automodel_trainer.modules.loss import predictions, token_losses
from automodel_trainer.strategies import FSDP2Strategy
from automodel_trainer.strategies.tensor.check import check_gates
from automodel_trainer.strategies.tensor.plan import expand_plan
from automodel_trainer.strategies.tensor.rehearsal import check_reads, forgotten_rules
from automodel_trainer.strategies.tensor.size import choose_tp
from tests.harness import (
    NextToken,
    adamw_of_dtensors,
    check_decided,
    check_run,
    close,
    full,
    make_strategy,
    once,
    random_rows,
    stack,
    widened,
)
from tests.kept_groups import own_groups
from tests.matrix import more
from tests.pool import RankPool
from tests.strategies.test_tensor import LATENT, MOE
from tests.test_trainer import Curve, chats, module, quiet
from tests.tiny import tiny_config, tiny_model, tiny_tokenizer

# --- through the Trainer --------------------------------------------------------------------------------------------


TOKENS = 4 * 51  # of a step
PROMPT = torch.arange(10, 19)[None]


def fit(spec: Any, root: str, folder: str, precision: str = "32-true") -> dict[str, Any]:
    curve = Curve()
    data = ChatDataModule(chats(), chats(7), seq_len=51, micro_batch_size=2, global_batch_size=4)
    ours = module(folder)
    devices = int(os.environ.get("WORLD_SIZE", 1))
    options = {"strategy": spec, "devices": devices, "max_steps": 3, "callbacks": [curve], "precision": precision}
    trainer = Trainer(**quiet(root, **options))
    with widened(precision):
        trainer.fit(ours, data)
        parameters = list(ours.model.parameters())  # as fit leaves them: an evaluation leaves them gathered
        held = sum(local_tensor(p).numel() for p in parameters) / sum(p.numel() for p in parameters)
        validation = trainer.validate(ours, data, verbose=False)[0]
        tokens = ours.generate(PROMPT, max_new_tokens=4, do_sample=False)
        logits = ours.model(tokens[:, :-1]).logits[0, PROMPT.shape[1] - 1 :].detach() if devices == 1 else None
    weights = {name: full(p).detach().clone() for name, p in ours.model.named_parameters()}
    out = trainer.save_pretrained(Path(root) / "out")
    return {
        "losses": {i: row["train_loss"] for i, row in enumerate(curve.rows)}, "validation": validation,
        "tokens": tokens, "logits": logits, "weights": weights,
        "tp": getattr(trainer.strategy.dims, "tp", 1), "held": held, "out": str(out),
    }  # fmt: skip


@pytest.mark.parametrize(("spec", "world"), [more("fsdp2_tp", 2), ("fsdp2_tp", 4)])
def test_fsdp2_tp_sizes_itself_and_trains_as_one_device(pool: RankPool, spec: str, world: int, tmp_path: Path) -> None:
    """Two kv heads: tp=2, and what is left of four ranks shards."""
    folder = tmp_path / "model"
    tiny_model(tie_word_embeddings=True, vocab_size=263).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    exact = fit("auto", str(tmp_path / "exact"), str(folder), "64-true")
    near = fit("auto", str(tmp_path / "one"), str(folder))
    check_decided(exact["logits"], near["logits"])
    results = pool.run(world, fit, spec, str(tmp_path / "ranks"), str(folder))
    for result in results:
        assert result["tp"] == 2
        assert result["held"] == pytest.approx(1 / world, rel=0.05)
        for key, kind in (("losses", "loss"), ("validation", "gradient norm"), ("weights", "weights")):
            check_run(result[key], exact[key], near[key], TOKENS, kind)
        assert torch.equal(result["tokens"], exact["tokens"])
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "ranks" / "out")
    for name, weight in saved.named_parameters():
        assert torch.equal(weight, results[0]["weights"][name]), name


# --- weights and state ------------------------------------------------------------------------------------------------

FAMILIES = {
    "llama": {"vocab_size": 265, "tie_word_embeddings": True},
    "qwen3_moe": MOE,
    "deepseek_v2": {**LATENT, "topk_method": "greedy"},
    "phi3": {},
}


def build(family: str, folder: str | None) -> dict[str, torch.Tensor]:
    strategy = make_strategy("fsdp2:tp=2", int(os.environ["WORLD_SIZE"]))
    if folder is None:
        model = AutoModelForCausalLM.from_config(tiny_config(family, **FAMILIES[family]), strategy, seed=3)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, strategy)
    assert all(isinstance(p, DTensor) and p.device_mesh.ndim == 2 for p in model.parameters())
    return {name: full(p).detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_stream_into_shards(pool: RankPool, family: str, tmp_path: Path) -> None:
    model = tiny_model(family, **FAMILIES[family])
    model.save_pretrained(tmp_path)
    random = AutoModelForCausalLM.from_config(tiny_config(family, **FAMILIES[family]), dtype=torch.float32, seed=3)
    for folder, wanted in ((str(tmp_path), model), (None, random)):
        for result in pool.run(4, build, family, folder):
            for name, weight in wanted.named_parameters():
                assert torch.equal(result[name], weight), name


def step_and_keep(spec: str, folder: str, save: bool) -> dict[str, torch.Tensor]:
    strategy = make_strategy(spec, int(os.environ["WORLD_SIZE"]))
    model = strategy.parallelize(tiny_model("qwen3_moe", **MOE))
    optimizer = adamw_of_dtensors(model.parameters(), 1e-2, eps=1e-2)
    strategy.forward_backward(NextToken(model), [stack(random_rows(2, 13, seed=int(save)))], torch.tensor(10))
    optimizer.step()
    if save:
        on_all_ranks(lambda: snapshot_optimizers(model, [optimizer]).write(Path(folder)), folder)
    else:
        load_optimizers(model, [optimizer], Path(folder))
    for parameter in model.parameters():  # the next step needs state that is laid out as its parameter
        assert getattr(optimizer.state[parameter]["exp_avg"], "placements", ()) == getattr(parameter, "placements", ())
    return {f"{n}/{k}": full(v).clone() for n, p in model.named_parameters() for k, v in optimizer.state[p].items()}


@pytest.mark.exact
def test_optimizer_state_of_packed_experts_reshards(pool: RankPool, tmp_path: Path) -> None:
    saved = pool.run(4, step_and_keep, "fsdp2:tp=2", str(tmp_path), True)[0]
    for spec in ("fsdp2:tp=2", "fsdp2"):
        for loaded in pool.run(4, step_and_keep, spec, str(tmp_path), False):
            assert all(torch.equal(loaded[name], value) for name, value in saved.items())


# --- the loss ---------------------------------------------------------------------------------------------------------


VOCABS, DTYPES = (32, 33, 5, 3), (torch.float32, torch.bfloat16)  # 5 and 3 leave ranks without a piece


@own_groups
def sharded_losses() -> dict[tuple[int, torch.dtype], Any]:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    return {(size, dtype): sharded_loss(mesh, size, dtype) for size in VOCABS for dtype in DTYPES}


@once
def on_four_ranks(pool: RankPool) -> list[dict[tuple[int, torch.dtype], Any]]:
    return pool.run(4, sharded_losses)


def sharded_loss(mesh: DeviceMesh, vocab_size: int, dtype: torch.dtype) -> Any:
    whole, targets = logits_and_targets(vocab_size, dtype)
    logits = distribute_tensor(whole, mesh, [Shard(2)], src_data_rank=None).requires_grad_()
    losses = token_losses(logits * 2, targets)
    (losses * torch.arange(losses.numel())).sum().backward()
    assert isinstance(logits.grad, DTensor)
    return losses.detach(), logits.grad.full_tensor(), predictions(logits)


def logits_and_targets(vocab_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(2, 7, vocab_size, generator=generator)).to(dtype)
    targets = torch.randint(0, vocab_size, (2, 7), generator=generator)
    targets[0, :3] = -100
    return logits, targets


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", VOCABS)
def test_loss_and_predictions_of_sharded_logits(pool: RankPool, vocab_size: int, dtype: torch.dtype) -> None:
    logits, targets = logits_and_targets(vocab_size, dtype)
    logits.requires_grad_()
    doubled = (logits * 2).float().flatten(0, 1)
    expected = F.cross_entropy(doubled, targets.flatten(), ignore_index=-100, reduction="none")
    (expected * torch.arange(expected.numel())).sum().backward()
    for losses, gradient, tokens in (found[vocab_size, dtype] for found in on_four_ranks(pool)):
        close(losses, expected.detach(), vocab_size)
        close(gradient.float(), logits.grad.float(), vocab_size, dtype=dtype)  # type: ignore[union-attr]
        assert torch.equal(tokens, logits.argmax(-1))


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "size", "plan", "says"),
    [
        ("gpt2", 2, None, "declares none.*tp_plan="),
        ("llama", 4, None, r"tp=4 does not fit.*num_key_value_heads=2.*tp in \[1, 2\]"),
        ("llama", 3, None, r"tp=3 does not fit.*tp in \[1, 2, 4\]"),
        ("llama", 2, {"model.layers.*.mlp.up": "colwise"}, "matches nothing.*Did you mean"),
        ("llama", 2, {"model.layers.*.mlp.up_proj": "columns"}, "unknown style 'columns'"),
        ("llama", 2, {"model.layers.*.input_layernorm": "colwise"}, "no linear layer but LlamaRMSNorm"),
    ],
)
def test_plans_that_do_not_fit(family: str, size: int, plan: dict[str, str] | None, says: str) -> None:
    sizes = {} if family == "gpt2" else {"head_dim": 8}
    with pytest.raises(ValueError, match=says):
        expand_plan(tiny_model(family, **sizes), size, plan)


@pytest.mark.parametrize("adapted", [False, True])
def test_fused_experts_that_are_cut_across_their_gate(adapted: bool) -> None:
    """Some models' own plans say this; nothing but the numbers tells."""
    model = tiny_model("qwen3_moe", **MOE)
    if adapted:
        apply_lora(model, LoRAConfig(rank=2))
    check_gates(model, expand_plan(model, 2), 2)
    rule = "model.layers.*.mlp.experts.gate_up_proj"
    with pytest.raises(ValueError, match="'packed_colwise'"):
        check_gates(model, expand_plan(model, 2, {rule: "colwise"}), 2)
    with pytest.raises(ValueError, match="but not their gate_up_proj, which every rank would add"):
        expand_plan(model, 2, {rule: "replicate"})


def test_weights_that_a_model_reads_outside_of_their_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are DTensors there, which do not mix with plain tensors: refused before the first step, by their names."""
    check_reads(tiny_model())
    config = AutoConfig.for_model("gemma4")
    with pytest.raises(ValueError, match=r"Gemma4\w+ fails \(.*embed_tokens\.weight is read outside of its layer"):
        check_reads(small_copy(config, "AutoModelForCausalLM"))
    kind = type(tiny_model())
    original = kind.forward

    def forward(self: Any, **inputs: Any) -> Any:
        output = original(self, **inputs)
        output.logits = output.logits + self.lm_head.weight[0].mean()
        return output

    monkeypatch.setattr(kind, "forward", forward)
    monkeypatch.setattr("automodel_trainer.models.rehearsal._known", {})
    with pytest.raises(ValueError, match="is read outside of its layer"):
        check_reads(tiny_model())


def test_rules_that_a_plan_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms of heads are found by what they work on; norms beside cut layers that see everything are not."""
    model = tiny_model("qwen3", head_dim=8)
    whole = dict(model.tp_plan)
    norms = {name: style for name, style in whole.items() if name.endswith("_norm")}
    assert len(norms) == 2
    assert forgotten_rules(model) == {}
    monkeypatch.setattr(type(model), "tp_plan", {name: style for name, style in whole.items() if name not in norms})
    assert forgotten_rules(model) == forgotten_rules(model) == norms
    assert forgotten_rules(model, dict.fromkeys(norms, "replicate")) == {}
    assert forgotten_rules(tiny_model("deepseek_v3", **LATENT)) == {}


def test_tied_weights_that_are_cut_in_two_ways() -> None:
    with pytest.raises(ValueError, match="a tied weight, in two ways"):
        expand_plan(tiny_model(tie_word_embeddings=True), 2, {"model.embed_tokens": "embedding_colwise"})


@pytest.mark.parametrize(
    ("make", "devices", "chosen"),
    [
        (lambda: tiny_model(), 8, 2),
        (lambda: tiny_model(num_key_value_heads=4), 8, 4),
        (lambda: tiny_model(num_key_value_heads=1), 8, 1),
        (lambda: tiny_model(num_attention_heads=16, num_key_value_heads=8, head_dim=2), 12, 4),
        (lambda: tiny_model(num_attention_heads=16, num_key_value_heads=16, head_dim=2), 16, 8),
    ],
)
def test_sizes_chosen(make: Callable[[], Any], devices: int, chosen: int) -> None:
    assert choose_tp(module(make()), devices) == chosen


def test_a_size_cannot_be_chosen_without_a_model() -> None:
    with pytest.raises(ValueError, match="fsdp2_tp:tp=2"):
        choose_tp(torch.nn.Linear(2, 2), 8)


def wrong_plan(spec: str, plan: dict[str, str]) -> str:
    strategy = make_strategy(spec, int(os.environ["WORLD_SIZE"]))
    assert isinstance(strategy, FSDP2Strategy)
    strategy.tp_plan = plan
    model = strategy.parallelize(tiny_model("qwen3"))
    try:
        strategy.forward_backward(NextToken(model), [stack(random_rows(2, 13, seed=0))], torch.tensor(10))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("spec", "world"), [("fsdp2:tp=2", 2), ("fsdp2:tp=2,sequence_parallel=false", 4)])
def test_a_plan_that_forgets_a_sum_is_found(pool: RankPool, spec: str, world: int) -> None:
    for said in pool.run(world, wrong_plan, spec, {"model.layers.*.self_attn.q_norm": "replicate"}):
        assert "gradients of model.layers.*.self_attn.q_norm: the plan of Qwen3ForCausalLM" in said
    assert pool.run(world, wrong_plan, spec, {}) == [""] * world


def shapes_that_do_not_match() -> str:
    strategy = make_strategy("fsdp2:tp=2", 2)
    model = strategy.parallelize(tiny_model("doge"))
    try:
        strategy.forward_backward(NextToken(model), [stack(random_rows(2, 13, seed=0))], torch.tensor(10))
    except ValueError as error:
        return str(error)
    return ""


def test_a_plan_with_shapes_that_do_not_match_is_refused(pool: RankPool) -> None:
    """The model's own plan cuts heads, and not what it makes for each of them."""
    for said in pool.run(2, shapes_that_do_not_match):
        assert "tp > 1 cuts DogeForCausalLM by its tp_plan" in said
        assert "set tp=1 and shard with fsdp2" in said


def packed_plan() -> None:
    """A fused projection cut half by half, by the user's own rule."""
    plan = {"model.layers.*.mlp.gate_up_proj": "packed_colwise", "model.layers.*.mlp.down_proj": "rowwise"}
    strategy = FSDP2Strategy(tp=2, tp_plan=plan)
    default = make_strategy("fsdp2:tp=2", 4)
    for name in ("parallel_devices", "cluster_environment", "accelerator", "precision_plugin"):
        setattr(strategy, name, getattr(default, name))
    strategy._device_mesh = default.device_mesh
    model = tiny_model("phi3")
    plain = NextToken(tiny_model("phi3"))
    batches = [stack(random_rows(4, 13, seed=0))]
    expected = plain.loss(plain.model(**plain.split(batches[0])[0]), plain.split(batches[0])[1])
    (expected / 10).backward()
    strategy.parallelize(model)
    mine = [stack(random_rows(4, 13, seed=0)[strategy.dp_rank :: 2])]
    strategy.forward_backward(NextToken(model), mine, torch.tensor(10))
    wanted = dict(plain.model.named_parameters())
    for name, parameter in model.named_parameters():
        close(full(parameter.grad), wanted[name].grad, 4 * 13, name)  # type: ignore[arg-type]


def test_fused_projections_can_be_cut_in_halves(pool: RankPool) -> None:
    pool.run(4, packed_plan)
