"""A user's own LightningModule: every option of a strategy reaches the models in it, or is refused with the reason."""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.data import DistributedSampler

from automodel_trainer import CausalLMModule, MockDataModule, Trainer
from automodel_trainer.models.kernels import KernelsConfig
from automodel_trainer.models.lora import LoRAConfig, apply_lora
from automodel_trainer.nn.blocks import find_blocks
from automodel_trainer.strategies import FSDP2Strategy, MeshStrategy
from automodel_trainer.strategies.data_parallel import shard
from tests.harness import check_run, full, make_strategy, once, random_rows, widened
from tests.matrix import more
from tests.pool import RankPool
from tests.test_trainer import module, quiet, steps_of
from tests.tiny import tiny_model

COMPILED = "compile=true,compile_backend=aot_eager"


class Wrapped(nn.Module):
    """A Hugging Face model somewhere inside of a user's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_model()
        self.scale = nn.Linear(1, 1)

    def forward(self, **batch: Tensor) -> Tensor:
        return self.inner(**batch, use_cache=False).loss * self.scale(torch.ones(1)).sum()


class Own(pl.LightningModule):
    """A user's module: its own loss, automatic optimization, a head that is not Hugging Face's."""

    def __init__(self, nested: bool = False, late: bool = False) -> None:
        super().__init__()
        self.late = late
        self.wrapped = Wrapped() if nested else None
        self.model = None if nested or late else tiny_model()
        self.scale = nn.Linear(1, 1)
        nn.init.constant_(self.scale.weight, 0.5)

    def configure_model(self) -> None:
        if self.late and self.model is None:
            strategy = self.trainer.strategy
            assert isinstance(strategy, MeshStrategy)
            self.model = strategy.parallelize(tiny_model())

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = self.model(**batch, use_cache=False).loss if self.wrapped is None else self.wrapped(**batch)
        return loss * self.scale(torch.ones(1)).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader_of(batch_size: int, world: int) -> Any:
    """Three global batches of four rows; as many labels in each row, for a rank's loss is its mean.

    One device uses a loader as it is, and several get the sampler of Lightning, which shuffles. So it is given to one.
    """
    ids = [row["input_ids"][0] for row in random_rows(4, 13, 0)]
    rows = [{"input_ids": row, "labels": row.where(torch.arange(13) > 4, -100)} for row in ids] * 3
    sampler = DistributedSampler(rows, num_replicas=1, rank=0) if world == 1 else None  # type: ignore[arg-type]
    return torch.utils.data.DataLoader(rows, batch_size=batch_size, sampler=sampler)  # type: ignore[arg-type]


TOKENS = 4 * 13  # of a step


def fit(spec: str, root: str, dp: int = 1, precision: str = "32-true", **kind: bool) -> dict[str, Any]:
    world = int(os.environ.get("WORLD_SIZE", 1))
    pl.seed_everything(0, verbose=False)
    ours = Own(**kind)
    trainer = Trainer(
        **quiet(root, strategy=spec, devices=world, max_steps=3, gradient_clip_val=1.0, enable_checkpointing=False),
        precision=precision,
    )
    with widened(precision):
        trainer.fit(ours, loader_of(4 // dp, world))
    tuned = trainer.strategy.prepared  # type: ignore[attr-defined]
    meshes = [p.device_mesh.mesh_dim_names or () for p in ours.parameters() if isinstance(p, DTensor)]
    return {
        "weights": {name: full(p).detach().clone() for name, p in ours.named_parameters()},
        "compiled": len(tuned.compiled),
        "checkpointed": sum(switch.mode is not None for switch in tuned.switches.values()),
        "on": {name for names in meshes for name in names},
    }  # fmt: skip


@once
def on_one_device(nested: bool) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as root:
        return [fit("auto", root, precision=precision, nested=nested) for precision in ("64-true", "32-true")]


@pytest.mark.parametrize(
    ("spec", "world", "dp", "kind"),
    [
        ("fsdp2_tp:tp=2", 2, 1, {}),
        (f"fsdp2:tp=2,activation_checkpointing=full,{COMPILED}", 2, 1, {}),
        ("fsdp2:tp=2,sequence_parallel=false", 4, 2, {"nested": True}),
        (f"ddp:activation_checkpointing=selective,{COMPILED}", 2, 2, {"nested": True}),
        more(f"fsdp2:activation_checkpointing=selective,{COMPILED}", 2, 2, {"nested": True}),
        more(f"ddp:activation_checkpointing=full,{COMPILED}", 2, 2, {}),
        ("fsdp2:activation_checkpointing=full", 2, 2, {"late": True}),
        more(f"fsdp2:activation_checkpointing=full,{COMPILED}", 2, 2, {"late": True}),
    ],
)
def test_trains_as_on_one_device(
    pool: RankPool, spec: str, world: int, dp: int, kind: dict[str, bool], tmp_path: Path
) -> None:
    exact, near = on_one_device(nested=kind.get("nested", False))
    for result in pool.run(world, fit, spec, str(tmp_path), dp, **kind):
        check_run(result["weights"], exact["weights"], near["weights"], TOKENS)
        assert result["compiled"] == (2 if "compile" in spec else 0)
        assert result["checkpointed"] == (2 if "activation" in spec else 0)
        assert ("tp" in result["on"]) == ("tp" in spec)


@pytest.mark.parametrize("spec", ["ddp", "fsdp2"])
@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_a_precision_without_master_weights(spec: str, precision: str, tmp_path: Path) -> None:
    """Parameters are held in it; rotary frequencies, which it would ruin, are not."""
    ours = Own()
    before = [p.detach().double().clone() for p in ours.parameters()]
    Trainer(**quiet(tmp_path, strategy=spec, precision=precision, max_steps=1)).fit(ours, loader_of(4, 1))
    assert {full(p).dtype for p in ours.parameters()} == {torch.bfloat16 if "bf16" in precision else torch.float64}
    assert {b.dtype for name, b in ours.named_buffers() if "inv_freq" in name} == {torch.float32}
    moved = [(full(p).double() - old).norm() for p, old in zip(ours.parameters(), before)]
    assert max(moved) > 1e-2


class Mixed(pl.LightningModule):
    """A batch norm, whose statistics are fp32, and a buffer that meets activations in bf16."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
        self.register_buffer("turn", torch.eye(4))
        self.scale = nn.Parameter(torch.ones(4))
        self.dtypes: set[torch.dtype] = set()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        answers = self.body(batch[0]) @ self.turn
        self.dtypes.add(answers.dtype)
        return nn.functional.cross_entropy(answers * self.scale, batch[0].argmax(1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit_mixed(spec: str, root: str, kind: type[pl.Trainer] = Trainer) -> dict[str, Tensor]:
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    rows = torch.randn(24, 4, generator=torch.Generator().manual_seed(1)).repeat_interleave(2, 0)  # one of each a rank
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows[rank::2]), batch_size=8)
    options = {"accelerator": "cpu", "devices": world, "logger": False, "enable_progress_bar": False, "max_epochs": 2}
    more = {"enable_ledger": False, "strategy": spec, "use_distributed_sampler": False} if kind is Trainer else {}
    ours = Mixed()
    trainer = kind(
        **options, **more, enable_checkpointing=False, enable_model_summary=False, precision="bf16-mixed",
        default_root_dir=root,
    )  # fmt: skip
    trainer.fit(ours, loader)
    assert ours.dtypes == {torch.bfloat16}
    return {name: full(tensor).detach().clone() for name, tensor in ours.state_dict().items()}


@pytest.mark.exact
@pytest.mark.parametrize("spec", ["auto", "ddp"])
def test_mixed_precision_is_lightnings(spec: str, tmp_path: Path) -> None:
    """On one device the weights are plain and the steps are autocast, so nothing is rounded otherwise."""
    theirs = fit_mixed(spec, str(tmp_path), pl.Trainer)
    ours = fit_mixed(spec, str(tmp_path))
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_mixed_precision_over_ranks(pool: RankPool, tmp_path: Path) -> None:
    """Two ranks that see the same rows train as one device does, within the rounding of bf16."""
    exact = fit_mixed("auto", str(tmp_path))
    for ours in pool.run(2, fit_mixed, "fsdp2", str(tmp_path)):
        for name, tensor in exact.items():
            assert ours[name].dtype == tensor.dtype, name
            assert (ours[name] - tensor).abs().max() <= 2**-8 * max(1.0, float(tensor.abs().max())), name


def test_a_given_model_keeps_its_rotary_frequencies(tmp_path: Path) -> None:
    ours = module(tiny_model())
    Trainer(**quiet(tmp_path, precision="bf16-true", max_steps=1)).fit(ours, steps_of(8))
    assert {b.dtype for name, b in ours.model.named_buffers() if "inv_freq" in name} == {torch.float32}
    assert {p.dtype for p in ours.model.parameters()} == {torch.bfloat16}


def held_back(option: str, root: str, memory: int | None = None) -> int:
    """How often gradients were told to wait for the end of the step.

    Args:
        memory: bytes of the device; None: nobody counts on it.
    """
    waits = 0
    original = FSDPModule.set_requires_gradient_sync

    def spy(self: Any, sync: bool, **kwargs: Any) -> None:
        nonlocal waits
        waits += not sync
        original(self, sync, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FSDPModule, "set_requires_gradient_sync", spy)
        patch.setattr(shard, "memory_of", lambda device: memory and SimpleNamespace(total=memory))
        options = quiet(root, strategy=f"fsdp2:{option}", devices=2, max_steps=1, accumulate_grad_batches=2)
        Trainer(**options).fit(Own(), loader_of(2, 2))
    return waits


def test_gradients_of_every_micro_batch(pool: RankPool, tmp_path: Path) -> None:
    assert all(count > 0 for count in pool.run(2, held_back, "sync_every_micro_batch=false", str(tmp_path)))
    assert pool.run(2, held_back, "sync_every_micro_batch=true", str(tmp_path)) == [0, 0]


def test_gradients_wait_where_there_is_room(pool: RankPool, tmp_path: Path) -> None:
    """By default: gathered gradients, of 4 bytes, take up to a tenth of the memory."""
    size = 4 * sum(p.numel() for p in Own().parameters())
    assert all(count > 0 for count in pool.run(2, held_back, "dp_shard=2", str(tmp_path)))
    assert all(count > 0 for count in pool.run(2, held_back, "dp_shard=2", str(tmp_path), 10 * size))
    assert pool.run(2, held_back, "dp_shard=2", str(tmp_path), 10 * size - 10) == [0, 0]


class Small(pl.LightningModule):
    """Nothing to compile, to checkpoint or to cut by a plan."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.body(batch[0]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def refusal(spec: str, root: str, **options: Any) -> str:
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 4)), batch_size=2)
    devices = int(os.environ.get("WORLD_SIZE", 1))
    try:
        Trainer(**quiet(root, strategy=spec, devices=devices, max_steps=1), **options).fit(Small(), data)
    except ValueError as error:
        return str(error)
    return "trained"


@pytest.mark.parametrize(
    ("spec", "world", "options", "says"),
    [
        ("ddp", 1, {}, "trained"),
        (f"ddp:{COMPILED}", 1, {}, "Small has no list of blocks"),
        (f"fsdp2:{COMPILED}", 1, {}, "Small has no list of blocks"),
        ("ddp:activation_checkpointing=full", 1, {}, "Small has no list of blocks"),
        ("fsdp2:activation_checkpointing=full", 1, {}, "Small has no list of blocks"),
        ("fsdp2:async_tp=true", 1, {}, "async_tp=True needs tp > 1"),
        ("fsdp2:tp=2", 2, {}, "Small holds none"),
        ("fsdp2:cp=2", 2, {}, "Small calls its model itself"),
        ("3d:pp=2", 2, {}, "Small calls its model itself"),
        ("ddp", 2, {"sync_batchnorm": True}, "SyncBatchNorm"),  # it is there
        ("fsdp2", 2, {"sync_batchnorm": True}, "SyncBatchNorm"),
    ],
)
def test_what_cannot_be_done_is_refused(
    pool: RankPool, spec: str, world: int, options: dict[str, Any], says: str, tmp_path: Path
) -> None:
    for said in pool.run(world, refusal, spec, str(tmp_path), **options):
        assert says in said


# --- options of the Trainer, for an objective -------------------------------------------------------------------------


def mock(**options: Any) -> MockDataModule:
    return MockDataModule(264, seq_len=16, num_samples=16, **options)


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader_of(2, 2)


@pytest.mark.parametrize(
    ("options", "data", "says"),
    [
        ({"gradient_clip_algorithm": "value", "gradient_clip_val": 1.0}, mock, "clips the global norm"),
        (
            {"accumulate_grad_batches": 4},
            lambda: mock(global_batch_size=2),
            "4 rows per step .*batch_size is 2",
        ),
        ({"accumulate_grad_batches": 2}, lambda: steps_of(8), "this is a Steps"),
        ({"accumulate_grad_batches": 2}, Data, "this is a Data"),
        ({"plugins": [AsyncCheckpointIO()]}, mock, "AsyncCheckpointIO was given as a plugin"),
    ],
)
def test_options_of_the_trainer(options: dict[str, Any], data: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        Trainer(**quiet(tmp_path, max_steps=1, **options)).fit(module(tiny_model()), data())


def test_two_training_sets(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data or train_dataloaders=, not both"):
        Trainer(**quiet(tmp_path)).fit(module(tiny_model()), data=steps_of(8), train_dataloaders=steps_of(8))


def test_options_for_a_model_that_is_there_already(tmp_path: Path) -> None:
    for options in ({"revision": "main"}, {"config_overrides": {"hidden_act": "relu"}}):
        with pytest.raises(ValueError, match="this one is an object"):
            CausalLMModule(tiny_model(), **options)  # type: ignore[arg-type]
    adapted = tiny_model()
    apply_lora(adapted, LoRAConfig(rank=2))
    ours = module(adapted, kernels=KernelsConfig(fp8="tensorwise"))
    with pytest.raises(ValueError, match="casts frozen weights while they are read"):
        Trainer(**quiet(tmp_path, max_steps=1)).fit(ours, steps_of(8))
    ours = module(adapted, kernels=KernelsConfig(attention="eager"))
    Trainer(**quiet(tmp_path, max_steps=1)).fit(ours, steps_of(8))
    assert ours.model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("fsdp2:cp_attention=ring", "cp_attention='ring' with cp=1"),
        ("3d:pp=1,schedule=gpipe,split=[2]", "schedule with pp=1.*split with pp=1"),
        ("fsdp2:sequence_parallel=false,forward_prefetch=1", ""),
    ],
)
def test_options_without_effect_are_named(spec: str, says: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_strategy(spec, 1)
    torch.distributed.destroy_process_group()
    said = " ".join(str(w.message) for w in caught if "no effect" in str(w.message))
    assert bool(said) == bool(says)
    if says:
        assert re.search(says, said)
    assert FSDP2Strategy(tp_plan={"a": "colwise"}).ineffective_options() == ["tp_plan with tp=1 (nothing is cut)"]


def test_blocks_are_tuned_once() -> None:
    strategy = make_strategy(f"ddp:activation_checkpointing=full,{COMPILED}", 1)
    model = tiny_model()
    strategy.parallelize(model)
    forwards = [block.forward for block in find_blocks(model)]
    strategy.parallelize(model)
    assert [block.forward for block in find_blocks(model)] == forwards
