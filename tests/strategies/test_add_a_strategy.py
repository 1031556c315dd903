"""The strategy of docs/add_a_strategy.md, as a package of its own that is found by its entry point."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from automodel_trainer.strategies import FSDP2Strategy, MeshStrategy, StrategyRegistry, registry
from tests.harness import NextToken, check_steps, make_strategy, random_rows, reference_steps, train_steps
from tests.pool import RankPool
from tests.tiny import tiny_model

PAGE = (Path(__file__).parents[2] / "docs/add_a_strategy.md").read_text()
(CODE,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
(TOML,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """What `pip install` would leave: the module, and its entry point."""
    (tmp_path / "flat_ddp.py").write_text(CODE)
    about = tmp_path / "flat_ddp-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: flat_ddp\nVersion: 1.0\n")
    (group,) = re.findall(r'entry-points\."([\w.]+)"', TOML)
    (entry,) = re.findall(r'^(\w+) = "(.*)"$', TOML, re.MULTILINE)
    (about / "entry_points.txt").write_text(f"[{group}]\n{entry[0]} = {entry[1]}\n")
    return tmp_path


def rows_of(step: int) -> Any:
    return random_rows(8, 24, seed=step)


def train(spec: str, world_size: int, package: Path) -> Any:
    """Three optimizer steps of two micro-batches on this rank."""
    before = dict(registry._FACTORIES)
    sys.path.insert(0, str(package))
    try:
        torch.manual_seed(world_size)
        strategy = make_strategy(spec, world_size)
        assert type(strategy).__name__ == "FlatDDPStrategy"
        model = strategy.parallelize(tiny_model())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-2)
        return train_steps(strategy, NextToken(model), optimizer, rows_of, 2)
    finally:
        sys.path.remove(str(package))
        sys.modules.pop("flat_ddp", None)
        registry._FACTORIES.clear()
        registry._FACTORIES.update(before)


@pytest.mark.parametrize("spec", ["flat_ddp", "flat_ddp:buffer_mb=0,compile=false"])
def test_same_as_one_device(pool: RankPool, package: Path, spec: str) -> None:
    model = tiny_model()
    expected = reference_steps(model, torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-2), rows_of)
    for result in pool.run(2, train, spec, 2, package):
        check_steps(result, expected)


def test_it_is_short() -> None:
    assert len(CODE.splitlines()) <= 60


# --- the contract -----------------------------------------------------------------------------------------------------


def overridable() -> set[str]:
    """Members of a strategy that are this project's and not final."""
    bases = [base for base in MeshStrategy.__mro__ if base.__module__.startswith("automodel_trainer.")]
    names = {name for base in bases for name in vars(base) if not name.startswith("_")}
    members = {name: inspect.getattr_static(MeshStrategy, name) for name in names}
    functions = {name: getattr(member, "fget", member) for name, member in members.items()}
    return {name for name, f in functions.items() if callable(f) and not getattr(f, "__final__", False)}


def test_the_page_lists_the_contract() -> None:
    """Lightning's own hooks aside, whatever is not final is on the page."""
    from lightning.pytorch.strategies import ParallelStrategy

    named = set(re.findall(r"`(\w+)(?:\([^)]*\))?`", PAGE))
    assert overridable() - set(dir(ParallelStrategy)) - named == set()


def test_no_strategy_overrides_what_is_final_or_private() -> None:
    ours = [cls for cls in subclasses(MeshStrategy) if cls.__module__.startswith("automodel_trainer.")]
    assert len(ours) >= 5
    for cls in ours:
        for base in cls.__mro__[1:]:
            if not base.__module__.startswith("automodel_trainer."):
                continue
            for name in vars(cls).keys() & vars(base).keys():
                member = getattr(vars(base)[name], "fget", vars(base)[name])
                assert not getattr(member, "__final__", False), (cls, name)
                assert not name.startswith("_") or name.startswith("__") or name == "_abc_impl", (cls, name)


def subclasses(cls: type) -> list[type]:
    return [found for child in cls.__subclasses__() for found in (child, *subclasses(child))]


def test_a_factory_function_passes_on_the_options_of_what_it_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_FACTORIES", dict(registry._FACTORIES))
    StrategyRegistry.register("mine", annotated)
    strategy: Any = StrategyRegistry.get("mine:tp=2,compile=false,extra=3")
    assert strategy.requested_dims.tp == 2
    assert strategy.compile is False
    with pytest.raises(ValueError, match="Did you mean 'tp_plan'"):
        StrategyRegistry.get("mine:tp_plam=1")
    StrategyRegistry.register("loose", lambda **kwargs: annotated(**kwargs))
    assert StrategyRegistry.get("loose:tp=2").requested_dims.tp == 2  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="unexpected keyword argument 'nonsense'"):
        StrategyRegistry.get("loose:nonsense=2")


def annotated(extra: int = 1, **kwargs: Any) -> FSDP2Strategy:
    return FSDP2Strategy(**kwargs)
