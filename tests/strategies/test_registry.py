from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from automodel_trainer.strategies import DDPStrategy, FSDP2Strategy, ParallelDims, StrategyRegistry, registry
from tests.harness import make_strategy


def test_names_with_sizes() -> None:
    strategy = StrategyRegistry.get("hsdp:dp_replicate=4,cpu_offload=true,reshard_after_forward=no")
    assert isinstance(strategy, FSDP2Strategy)
    assert strategy.requested_dims.dp_replicate == 4
    assert strategy.cpu_offload is True
    assert strategy.reshard_after_forward is False
    assert isinstance(StrategyRegistry.get("ddp:bucket_cap_mb=10"), DDPStrategy)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fdsp2", "Did you mean 'fsdp2'"),
        ("fsdp2:dp_shards=2", "Did you mean 'dp_shard'"),
        ("fsdp2:dp_shard", "has no value"),
        ("fsdp2:dp_shard=0", "not a size"),
    ],
)
def test_bad_specs(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StrategyRegistry.get(spec)


def test_lightnings_own_names_pass_through() -> None:
    assert StrategyRegistry.resolve("fsdp") == "fsdp"
    assert isinstance(StrategyRegistry.resolve("ddp_spawn"), DDPStrategy)
    assert isinstance(StrategyRegistry.resolve("ddp"), DDPStrategy)


class Third(FSDP2Strategy):
    pass


def test_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    found = EntryPoint("third", "tests.strategies.test_registry:Third", registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [found])
    monkeypatch.setattr(registry, "_FACTORIES", dict(registry._FACTORIES))
    assert type(StrategyRegistry.get("third:dp_shard=1")).__name__ == "Third"


@pytest.mark.parametrize(
    ("dims", "world_size"),
    [(ParallelDims(dp_replicate=3), 4), (ParallelDims(dp_shard=2), 4), (ParallelDims(2, 4), 4)],
)
def test_sizes_that_do_not_fit(dims: ParallelDims, world_size: int) -> None:
    with pytest.raises(ValueError, match=f"{world_size} rank"):
        dims.resolve(world_size)


def test_sizes_that_fit() -> None:
    assert ParallelDims(dp_replicate=2).resolve(8) == ParallelDims(2, 4)
    assert ParallelDims(dp_replicate=2).resolve(8).describe() == "dp_replicate 2 × dp_shard 4"


def test_precision_that_is_not_offered() -> None:
    with pytest.raises(ValueError, match="fp16 would need loss scaling"):
        make_strategy("fsdp2", 1, precision="16-mixed")
