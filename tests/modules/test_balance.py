"""Balancing losses and biases of routers against plain torch on one device, over the whole global batch at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from automodel_trainer import BalanceConfig, CausalLMModule, MockDataModule, Trainer
from automodel_trainer.callbacks import DCPCheckpoint
from automodel_trainer.modules.balance import balance_of
from automodel_trainer.strategies import DDPStrategy
from tests.harness import (
    Batch,
    Stop,
    about_step,
    check_steps,
    copy_of,
    make_strategy,
    random_rows,
    stack,
    train_steps,
    weights_of,
    with_limits,
)
from tests.limits import computing
from tests.matrix import more
from tests.pool import RankPool
from tests.routers import decided, separated
from tests.strategies.test_tensor import LATENT, MOE, adam
from tests.tiny import tiny_model

STEPS, ROWS, LENGTH, MAX_NORM = 3, 8, 13, 0.5
FAMILIES: dict[str, dict[str, Any]] = {"qwen3_moe": {**MOE, "decoder_sparse_step": 1}, "deepseek_v3": LATENT}
OTHERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "zaya": {"num_experts": 4},
    "gemma4_text": {
        "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32,
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 264,
    },
    "lfm2_moe": {**MOE, "layer_types": ["conv", "full_attention"], "num_dense_layers": 0, "use_expert_bias": True},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 8},
}  # fmt: skip
ALL = {"aux_loss": 0.3, "sequence_loss": 0.2, "z_loss": 0.05}


def rows_of(step: int) -> list[Batch]:
    """Rows without marks of padding in the first step; packed in the second, padded in the third, both with them."""
    rows = random_rows(ROWS, LENGTH, seed=step)
    for index, row in enumerate(rows if step else []):
        place = torch.arange(LENGTH)[None]
        end = 0 if index == 5 else LENGTH - index % 4  # one row is a filler
        start = min(index % 4 + 3, end) if step == 1 else 0
        position = torch.where(place < start, place, place - start)
        row["position_ids"] = torch.where(place < end, position, place - end) if step == 1 else place
        row["labels"] = row["labels"].masked_fill((place == start) | (place >= end), -100)
        row["lengths"] = torch.tensor([end])
        if step == 2:
            row["attention_mask"] = (place < max(end, 1)).long()
    return rows


def build(family: str, **overrides: Any) -> PreTrainedModel:
    seed = 6 if overrides else 4  # of routers without a near tie
    return separated(tiny_model(family, **{**FAMILIES[family], **overrides}), seed)


# --- the reference ----------------------------------------------------------------------------------------------------


def reference(family: str, config: BalanceConfig, coefficient: float, **overrides: Any) -> dict[str, Any]:
    model = build(family, **overrides)
    optimizer = adam(model)

    def run() -> dict[str, Any]:
        own, own_optimizer = copy_of(model, optimizer)
        history = []
        with computing(own):
            for step in range(STEPS):
                history.append(reference_step(own, rows_of(step), own_optimizer, config, coefficient))
                history[-1] |= about_step(own, own_optimizer, rows_of(step))
        return {"history": history, "weights": weights_of(own), "biases": biases_of(own)}

    return with_limits(run)


def reference_step(
    model: PreTrainedModel, rows: list[Batch], optimizer: Any, config: BalanceConfig, coefficient: float
) -> dict[str, Any]:
    batch = stack(rows)
    routed: list[tuple[Tensor, Tensor]] = []
    gates = [m for name, m in model.named_modules() if name.endswith("mlp.gate")]
    hooks = [g.register_forward_hook(lambda m, args, out: routed.append((out[0], out[2]))) for g in gates]
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "lengths")}
    with decided(model):
        logits = model(**inputs, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    lengths = batch.get("lengths", torch.full((ROWS,), LENGTH))
    real = torch.arange(LENGTH) < lengths[:, None]
    k, experts = model.config.num_experts_per_tok, routed[0][0].shape[-1]
    loss = loss + coefficient * load_balancing_loss_func(tuple(r[0] for r in routed), experts, k, real)
    for scores, _ in routed:
        loss = loss + config.z_loss * scores[real.flatten()].logsumexp(-1).square().mean()
        loss = loss + config.sequence_loss * per_document(model, scores, batch, real, k)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    optimizer.zero_grad()
    if config.bias_rate:
        for gate, (_, chosen) in zip(gates, routed):
            counts = chosen[real.flatten()].flatten().bincount(minlength=experts).double()
            gate.e_score_correction_bias += config.bias_rate * torch.sign(counts.mean() - counts)
    return {"loss": loss.item(), "norm": norm.item(), "gradients": gradients}


def per_document(model: PreTrainedModel, scores: Tensor, batch: Batch, real: Tensor, k: int) -> Tensor:
    """DeepSeek-V3, equations 17 to 20, document by document."""
    sigmoid = hasattr(model.config, "n_group")
    affinity = scores.sigmoid() if sigmoid else scores.softmax(-1)
    packed = "attention_mask" not in batch and "position_ids" in batch
    starts = batch["position_ids"] == 0 if packed else (torch.arange(LENGTH) == 0).expand(ROWS, -1)
    document = starts.flatten().cumsum(0)
    losses = []
    for number in document[real.flatten()].unique():
        own = affinity[(document == number) & real.flatten()]
        chosen = F.one_hot(own.topk(k, dim=-1).indices, own.shape[1]).sum(1).to(own.dtype)
        f = own.shape[1] / (k * len(own)) * chosen.sum(0)
        losses.append((f * (own / own.sum(-1, keepdim=True)).mean(0)).sum())
    return torch.stack(losses).mean()


def biases_of(model: Any) -> dict[str, Tensor]:
    return {name: b.detach().clone() for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")}


# --- layouts ----------------------------------------------------------------------------------------------------------


def train(
    spec: str, world_size: int, family: str, options: dict[str, float], accumulation: int, **overrides: Any
) -> Any:
    torch.manual_seed(world_size)
    strategy = make_strategy(spec, world_size)
    module = CausalLMModule(build(family, **overrides), balance=options)
    model = module.model = module.given_model
    strategy.parallelize(model)
    if isinstance(strategy, DDPStrategy):
        strategy._wrapped = strategy._wrap(model)
    module._balance = balance_of(module.balance, model, adapted=False)
    assert module._balance is not None
    optimizer = adam(model)
    optimizer.register_step_post_hook(lambda *_: module._balance.move_biases(strategy))  # type: ignore[union-attr]
    size = ROWS // strategy.dp_size // accumulation
    result = train_steps(strategy, module, optimizer, rows_of, size, steps=STEPS, max_norm=MAX_NORM)
    return {**result, "biases": biases_of(model)}


def check(pool: RankPool, spec: str, ranks: int, family: str, options: dict[str, float], cut: int, **over: Any) -> None:
    coefficient = options.get("aux_loss", 0.0)
    expected = reference(family, BalanceConfig(**options), coefficient, **over)
    got = pool.run(ranks, train, spec, ranks, family, options, cut, **over)
    check_steps(got, expected)
    for rank in got:
        for name, bias in rank["biases"].items():
            torch.testing.assert_close(bias, expected["biases"][name].float(), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("spec", "ranks", "cut"),
    [
        ("auto", 1, 1),
        ("auto", 1, 4),
        ("fsdp2", 2, 2),
        more("ddp", 2, 2),
        more("fsdp2:activation_checkpointing=full", 2, 1),
        ("fsdp2:ep=2,activation_checkpointing=full", 2, 2),
        more("fsdp2:tp=2", 2, 1),
        ("fsdp2:cp=2", 2, 2),
        ("fsdp2:tp=2,cp=2", 4, 1),
        ("3d:pp=2", 2, 4),
        ("3d:pp=2,ep=2,activation_checkpointing=full", 4, 2),
        more("3d:pp=2,schedule=zbv", 2, 4),
        ("fsdp2:compile=true,compile_backend=aot_eager", 2, 2),
    ],
)
def test_losses(pool: RankPool, spec: str, ranks: int, cut: int) -> None:
    over = {"num_hidden_layers": 4} if "zbv" in spec else {}
    check(pool, spec, ranks, "qwen3_moe", ALL, cut, **over)


@pytest.mark.parametrize(
    ("spec", "ranks", "cut"),
    [
        ("auto", 1, 2),
        ("fsdp2:ep=2,activation_checkpointing=full", 2, 4),
        more("fsdp2:tp=2", 2, 1),
        ("fsdp2:cp=2", 2, 1),
        ("3d:pp=2", 2, 2),
    ],
)
def test_biases_and_scores_by_sigmoid(pool: RankPool, spec: str, ranks: int, cut: int) -> None:
    check(pool, spec, ranks, "deepseek_v3", {"bias_rate": 0.01, "sequence_loss": 0.2, "z_loss": 0.05}, cut)


# --- the Trainer ------------------------------------------------------------------------------------------------------


def fit(root: Path, model: PreTrainedModel, *callbacks: Any, resume: str | None = None, **options: Any) -> Any:
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=3, default_root_dir=root, callbacks=list(callbacks), logger=False,
        enable_progress_bar=False, enable_checkpointing=bool(callbacks), enable_ledger=False, log_every_n_steps=1,
    )  # fmt: skip
    module = CausalLMModule(model, lr=1e-3, **options)
    trainer.fit(module, MockDataModule(264, seq_len=16, micro_batch_size=1, global_batch_size=4), ckpt_path=resume)
    return trainer


def test_resume_is_exact(tmp_path: Path) -> None:
    """The biases are in the checkpoint, and nothing else of the balance lasts longer than a step."""
    options = {"balance": {"bias_rate": 0.01, "sequence_loss": 0.1, "aux_loss": 0.1}}
    straight = fit(tmp_path / "straight", build("deepseek_v3"), **options).lightning_module.model.state_dict()
    save = DCPCheckpoint(every_n_steps=2)
    fit(tmp_path / "cut", build("deepseek_v3"), save, Stop(2), **options)
    resumed = fit(tmp_path / "cut", build("deepseek_v3"), DCPCheckpoint(), resume="last", **options)
    assert resumed.global_step == 3
    found = resumed.lightning_module.model.state_dict()
    assert found.keys() == straight.keys()
    assert all(torch.equal(found[name], straight[name]) for name in straight)
    moved = [found[name] for name in found if name.endswith("e_score_correction_bias")]
    assert moved
    assert all(len(b.unique()) > 1 for b in moved)


def test_the_configs_coefficient_is_used_where_the_config_says_so(tmp_path: Path) -> None:
    def weights(**config: Any) -> dict[str, Tensor]:
        asked = config.pop("balance", {})
        return fit(tmp_path, build("qwen3_moe", **config), balance=asked).lightning_module.model.state_dict()

    def differ(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
        return not all(torch.equal(a[name], b[name]) for name in a)

    silent = weights(router_aux_loss_coef=0.5)
    on = weights(router_aux_loss_coef=0.5, output_router_logits=True)
    assert differ(on, silent)
    assert not differ(on, weights(router_aux_loss_coef=0.5, balance={"aux_loss": 0.5}))
    assert not differ(silent, weights(router_aux_loss_coef=0.5, output_router_logits=True, balance={"aux_loss": 0}))


def test_a_router_that_is_not_a_number_ends_the_run(tmp_path: Path) -> None:
    model = build("qwen3_moe")
    model.model.layers[1].mlp.gate.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="The loss or the gradient of step 1 was not finite"):
        fit(tmp_path, model, balance={"aux_loss": 0.1})


@pytest.mark.parametrize("family", ["lfm2_moe", "minimax_m2"])
def test_a_bias_that_the_block_hands_to_its_router(tmp_path: Path, family: str) -> None:
    found = fit(tmp_path, tiny_model(family, **OTHERS[family]), balance={"bias_rate": 0.5, "sequence_loss": 0.1})
    moved = [b for name, b in found.lightning_module.model.named_buffers() if name.endswith("bias")]
    assert moved
    assert all(b.abs().max() >= 0.5 for b in moved)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options", "said"),
    [
        (
            "llama",
            {"balance": {"aux_loss": 0.1}},
            "records no router in LlamaForCausalLM, so there is nothing to balance",
        ),
        (
            "qwen3_moe",
            {"balance": {"bias_rate": 0.1}},
            r"router model.layers.0.mlp.gate of Qwen3MoeForCausalLM has none",
        ),
        (
            "deepseek_v3",
            {"balance": {"bias_rate": 0.1}, "lora": {}},
            "adapters are saved without them. Set bias_rate=0",
        ),
        ("zaya", {"balance": {"aux_loss": 0.1}}, "each of the 4 experts .* chooses from 5: some choices are no"),
        ("zaya", {"balance": {"sequence_loss": 0.1}}, r"layers.0.mlp.gate \(ZayaRouter\) does something else"),
        ("gemma4_text", {"balance": {"z_loss": 0.1}}, "transformers records probabilities of model.layers.0.router"),
    ],
)
def test_models_that_cannot_be_balanced(tmp_path: Path, family: str, options: dict[str, Any], said: str) -> None:
    model = tiny_model(family, **OTHERS[family]) if family in OTHERS else build(family)
    with pytest.raises(ValueError, match=said):
        fit(tmp_path, model, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"aux_loss": -1}, r"aux_loss=-1 is not allowed. Give a number ≥ 0, or 'auto'"),
        ({"z_loss": "auto"}, r"z_loss='auto' is not allowed. Give a number ≥ 0\."),
        ({"bias_rate": float("nan")}, "bias_rate=nan is not allowed"),
        ({"aux": 1}, "'aux' is not an option of BalanceConfig"),
    ],
)
def test_numbers_that_are_not_allowed(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        CausalLMModule(build("qwen3_moe"), balance=options)
