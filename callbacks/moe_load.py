"""MoELoad: how evenly a mixture's routers spread tokens over experts."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from automodel_trainer.callbacks.heat_map import heat_map
from automodel_trainer.callbacks.layout import sum_over_ranks, trained_model
from automodel_trainer.models._experts import stacked_experts
from automodel_trainer.models._routers import RecordingRouter, record_routing
from automodel_trainer.models.routers import probes
from automodel_trainer.models.stage_names import from_all_stages
from automodel_trainer.strategies import MeshStrategy


class MoELoad(Callback):
    """Logs how the choices of the last `log_every_n_steps` steps fell on the experts, over all ranks and layers:

    | name | meaning |
    | --- | --- |
    | `moe_max_load` | the load of the busiest expert, as a multiple of its layer's mean: the largest of all layers |
    | `moe_mean_max_load` | the same, mean over layers |
    | `moe_idle_experts` | share of the experts that no token chose |
    | `moe_entropy` | entropy of the choices over the entropy of an even spread: 1 is even; mean over layers |
    | `moe_z_loss` | squared log-sum-exp of the routers' logits, mean over tokens and layers, where these are recorded |
    | `moe_dropped_tokens` | share of the choices that were not computed. It is 0: no token is ever dropped |

    Loads are shares and z is a mean, so recomputed blocks change nothing. Tokens of padding count too. Nothing waits
    for the device between log steps.

    Args:
        picture: also draw the load of every expert and layer into `moe_load.svg` in the run's folder.

    Attributes:
        load: name of a module of experts -> the load of each expert as a multiple of the mean, at the last log step.
    """

    def __init__(self, picture: bool = True) -> None:
        self.picture = picture
        self.load: dict[str, list[float]] = {}
        self._counts: dict[str, Tensor] = {}
        self._z: dict[str, Tensor] = {}  # of each router: the sum of squares, and the number of tokens
        self._hooks: list[RemovableHandle] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start to count. A model without experts gets a warning."""
        device = trainer.strategy.root_device
        model = trained_model(trainer)
        for name, module in model.named_modules():
            if experts := stacked_experts(module):
                self._counts[name] = torch.zeros(experts, dtype=torch.int64, device=device)
                self._hooks.append(module.register_forward_pre_hook(_counting(self._counts[name]), with_kwargs=True))
        routers = record_routing(model)
        no_logits = {name for name, probe in probes(routers).items() if probe.records_probabilities}
        for router in routers:
            if router.name in no_logits:
                continue
            self._z[router.name] = torch.zeros(2, device=device)
            self._hooks.append(router.module.register_forward_hook(_adding_z(self._z[router.name])))
        if not any(from_all_stages(model, len(self._counts))):
            rank_zero_warn(f"MoELoad finds no experts in {type(model).__name__}, so it logs nothing.")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log at log steps."""
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if (
            not every
            or trainer.global_step % every
            or not any(from_all_stages(trained_model(trainer), len(self._counts)))
        ):
            return
        self.load = self._collect(trainer)
        pl_module.log_dict(summary(self.load) | self._mean_z(trainer), batch_size=1)
        if self.picture:
            self._draw(trainer)

    def _draw(self, trainer: pl.Trainer) -> None:
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # collective, so every rank asks for it
        if not trainer.is_global_zero:
            return
        rows = [(_short(name), values) for name, values in self.load.items()]
        title = f"step {trainer.global_step}: load of every expert (white: the mean; red: twice; blue: none)"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "moe_load.svg").write_text(heat_map(rows, title))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop counting."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._counts, self._z = [], {}, {}

    def _mean_z(self, trainer: pl.Trainer) -> dict[str, float]:
        """The z-loss since the last log step; empty if no router records its logits. Collective, as `_collect`."""
        own = [_sum(trainer, z).tolist() for z in self._z.values()]
        for z in self._z.values():
            z.zero_()
        every = [z for stage in from_all_stages(trained_model(trainer), own) for z in stage]
        return {"moe_z_loss": sum(total / max(tokens, 1) for total, tokens in every) / len(every)} if every else {}

    def _collect(self, trainer: pl.Trainer) -> dict[str, list[float]]:
        """The loads since the last log step, over all ranks and stages. Collective; waits for the device."""
        own: dict[str, list[float]] = {}
        for name, counts in self._counts.items():
            summed = _sum(trainer, counts).double()
            own[name] = (summed / summed.mean().clamp(min=1e-9)).tolist()
            counts.zero_()
        stages = from_all_stages(trained_model(trainer), own)
        merged = {name: load for stage in stages for name, load in stage.items()}
        return dict(sorted(merged.items(), key=lambda item: _order(item[0])))


def summary(load: dict[str, list[float]]) -> dict[str, float]:
    """The metrics of `MoELoad` for the load of every expert as a multiple of its layer's mean."""
    layers = [torch.tensor(values, dtype=torch.float64) for values in load.values()]
    most = [float(layer.max()) for layer in layers]
    shares = [layer / len(layer) for layer in layers]
    entropy = [float(-(s * s.clamp(min=1e-30).log()).sum() / torch.tensor(float(len(s))).log()) for s in shares]
    every = torch.cat(layers)
    return {
        "moe_max_load": max(most),
        "moe_mean_max_load": sum(most) / len(most),
        "moe_idle_experts": float((every == 0).double().mean()),
        "moe_entropy": sum(entropy) / len(entropy),
        "moe_dropped_tokens": 0.0,
    }


def _counting(counts: Tensor) -> Callable[..., None]:
    """A hook that counts the choices that a module of experts is called with: its argument of integers `[n, k]`."""

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training:
            given = (*args, *kwargs.values())
            chosen = next(t for t in given if isinstance(t, Tensor) and not t.is_floating_point()).reshape(-1)
            counts.scatter_add_(0, chosen, torch.ones_like(chosen))

    return count


def _adding_z(sums: Tensor) -> Callable[..., None]:
    """A hook that adds to `sums` the squared log-sum-exp of a router's logits, and the number of its tokens."""

    def add(module: RecordingRouter, args: Any, output: Any) -> None:
        if module.training:
            squares = module.routing_of(output).logits.detach().float().logsumexp(-1).square()
            sums.add_(torch.stack([squares.sum(), squares.new_full((), len(squares))]))

    return add


def _sum(trainer: pl.Trainer, counts: Tensor) -> Tensor:
    """The counts of all ranks that see different tokens, as a new tensor."""
    strategy = trainer.strategy
    if isinstance(strategy, MeshStrategy):
        return strategy.sum_over_tokens(counts.clone())
    return sum_over_ranks(trainer, counts)


def _order(name: str) -> list[int | str]:
    """A key that sorts names by their numbers."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _short(name: str) -> str:
    """The last parts of a module's name: as many as a row of the picture has room for."""
    return name[-26:]
