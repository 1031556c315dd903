"""Strategy names: `fsdp2`, `hsdp:dp_replicate=2`, `auto`, and the names that other packages register."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, Literal, get_type_hints

import yaml
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.strategies import StrategyRegistry as LightningStrategies

from automodel_trainer.nn.text import did_you_mean
from automodel_trainer.strategies.base.mesh_strategy import MeshStrategy
from automodel_trainer.strategies.data_parallel.ddp import DDPStrategy
from automodel_trainer.strategies.data_parallel.fsdp2 import FSDP2Strategy
from automodel_trainer.strategies.fault_tolerant.strategy import FaultTolerantStrategy
from automodel_trainer.strategies.megatron.megatron_fsdp import MegatronFSDPStrategy
from automodel_trainer.strategies.pipeline.parallel_3d import Parallel3DStrategy

ENTRY_POINT_GROUP = "automodel_trainer.strategies"


def _hsdp(
    dp_replicate: int = 2,
    fault_tolerant: bool = False,
    min_replicas: int | None = None,
    lighthouse: str | None = None,
    replica_timeout: float | None = None,
    **kwargs: Any,
) -> FSDP2Strategy:
    asked = {"min_replicas": min_replicas, "lighthouse": lighthouse, "replica_timeout": replica_timeout}
    given = {name: value for name, value in asked.items() if value is not None}
    if fault_tolerant:
        return FaultTolerantStrategy(dp_replicate, **given, **kwargs)  # type: ignore[arg-type]
    if given:
        raise ValueError(f"{', '.join(given)} is for replicas that come and go: add fault_tolerant=true.")
    return FSDP2Strategy(dp_replicate=dp_replicate, **kwargs)


def _fsdp2_cp(cp: int | Literal["auto"] = "auto", **kwargs: Any) -> FSDP2Strategy:
    return FSDP2Strategy(cp=cp, **kwargs)


def _fsdp2_ep(ep: int | Literal["auto"] = "auto", **kwargs: Any) -> FSDP2Strategy:
    return FSDP2Strategy(ep=ep, **kwargs)


def _fsdp2_tp(tp: int | Literal["auto"] = "auto", **kwargs: Any) -> FSDP2Strategy:
    return FSDP2Strategy(tp=tp, **kwargs)


# `auto` is FSDP2 for any number of devices. On one device FSDP2Strategy leaves the model unsharded.
_FACTORIES: dict[str, Callable[..., Strategy]] = {
    "3d": Parallel3DStrategy,
    "pp_tp_dp": Parallel3DStrategy,
    "auto": FSDP2Strategy,
    "ddp": DDPStrategy,
    "fsdp2": FSDP2Strategy,
    "fsdp2_cp": _fsdp2_cp,
    "fsdp2_ep": _fsdp2_ep,
    "fsdp2_tp": _fsdp2_tp,
    "hsdp": _hsdp,
    "megatron_fsdp": MegatronFSDPStrategy,
}


class StrategyRegistry:
    """The names that `Trainer(strategy=...)` accepts, besides strategy objects."""

    @staticmethod
    def register(name: str, factory: Callable[..., Strategy]) -> None:
        """Make `strategy="name:key=value,…"` call `factory(key=value, …)`.

        If `factory` takes `**kwargs`, annotate its return type: the registry then also accepts the options of the
        strategy class that it returns, and can suggest a name when an option is misspelled.
        """
        _FACTORIES[name] = factory

    @staticmethod
    def names() -> list[str]:
        """All registered names, including the entry points of installed packages."""
        _load_entry_points()
        return sorted(_FACTORIES)

    @staticmethod
    def get(spec: str) -> Strategy:
        """Build a strategy from a string such as `"hsdp:dp_replicate=2,cpu_offload=true"`.

        Raises:
            ValueError: the name or an option is unknown, or an option has no value.
        """
        name, _, options = spec.partition(":")
        name = name.lower()  # as Lightning has it
        if name not in _FACTORIES:
            _load_entry_points()  # which looks at every installed package
        if name not in _FACTORIES:
            raise ValueError(
                f"strategy={spec!r} is unknown.{did_you_mean(name, _FACTORIES)} "
                f"Allowed: {', '.join(sorted(_FACTORIES))}, each with optional sizes (fsdp2:dp_shard=2), "
                "or a Strategy object."
            )
        factory = _FACTORIES[name]
        accepted = _accepted(factory)
        given = _parse_options(spec, options, accepted)
        try:
            return factory(**given)
        except TypeError as error:
            # `_parse_options` has checked the names unless the factory does not state them. In that case this
            # TypeError is how the factory reports an unknown option.
            if accepted is not None or "unexpected keyword" not in str(error):
                raise
            raise ValueError(f"strategy={spec!r}: {error}.") from error

    @staticmethod
    def resolve(strategy: str | Strategy) -> str | Strategy:
        """Turn one of this project's names into a strategy object. Lightning's own names and objects pass through.

        Where both know a name (`ddp`, and its forms such as `ddp_spawn`), this project's strategy is used.

        Raises:
            ValueError: the name or an option is unknown.
        """
        if not isinstance(strategy, str):
            return strategy
        own = _lightnings_ddp(strategy.lower())
        if own is not None:
            return own
        lightnings = strategy.lower() in LightningStrategies.available_strategies()
        if lightnings and strategy.lower() not in StrategyRegistry.names():
            return strategy.lower()
        return StrategyRegistry.get(strategy)


def _lightnings_ddp(name: str) -> DDPStrategy | None:
    """The DDP strategy of a name such as `ddp_spawn` or `ddp_find_unused_parameters_true`; None for other names."""
    form = re.fullmatch(r"ddp(?:_(spawn|fork|notebook))?(?:_find_unused_parameters_(true|false))?", name)
    if form is None or name == "ddp":
        return None
    launcher = {None: "auto", "notebook": "fork"}.get(form[1], form[1])
    return DDPStrategy(launcher=launcher, find_unused_parameters=form[2] == "true")


def _load_entry_points() -> None:
    """Add the strategies of installed packages. They cannot replace a name that exists already."""
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        _FACTORIES.setdefault(entry.name, entry.load())


def _parse_options(spec: str, text: str, accepted: list[str] | None) -> dict[str, Any]:
    """Parse `key=value,…`. Values are YAML scalars (`2`, `true`, `auto`); `accepted=None` allows any key."""
    options: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"strategy={spec!r}: option {item!r} has no value. Write {item}=<value>.")
        if accepted is not None and key not in accepted:
            raise ValueError(
                f"strategy={spec!r}: {key!r} is not an option.{did_you_mean(key, accepted)} "
                f"Allowed: {', '.join(accepted)}."
            )
        options[key] = yaml.safe_load(value)
    return options


def _accepted(factory: Callable[..., Any]) -> list[str] | None:
    """The option names that `factory` takes, or None if it forwards any option and checks it itself.

    A class forwards its `**kwargs` to its base classes. A function forwards them to the strategy class that it is
    annotated to return.
    """
    parameters = inspect.signature(factory).parameters.values()
    names = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    if len(names) == len(parameters):
        return names  # there is no **kwargs, so nothing is forwarded
    if not isinstance(factory, type):
        made = _returned(factory)
        return None if made is None else [*names, *(n for n in _accepted(made) or [] if n not in names)]
    for base in factory.__mro__[1:]:
        if issubclass(base, MeshStrategy):
            names += [n for n in inspect.signature(base).parameters if n not in (*names, "dims", "kwargs", "options")]
    return names


def _returned(factory: Callable[..., Any]) -> type[MeshStrategy] | None:
    """The strategy class that a function is annotated to return."""
    try:
        made = get_type_hints(factory).get("return")
    except (NameError, TypeError):  # an annotation that cannot be resolved counts as missing
        return None
    return made if isinstance(made, type) and issubclass(made, MeshStrategy) else None
