"""Losses and biases that keep the load of a mixture's experts even. They do not depend on how a batch is cut.

Sources: Switch Transformers, arXiv 2101.03961 (balancing loss); its load over the global batch, arXiv 2501.11873;
arXiv 2412.19437 (loss of a sequence, bias); ST-MoE, arXiv 2202.08906 (z-loss).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from automodel_trainer.distributed.phase import enter_phase
from automodel_trainer.models._routers import (
    Router,
    Routing,
    choices_per_token,
    configured_coefficient,
    expert_count,
    record_routing,
)
from automodel_trainer.models.record import record_of
from automodel_trainer.models.routers import uses_sigmoid
from automodel_trainer.models.stage_names import pipeline_of
from automodel_trainer.modules.documents import documents_of
from automodel_trainer.strategies import MeshStrategy
from automodel_trainer.strategies.base.objective import MicroBatch, Objective


@dataclass(frozen=True)
class BalanceConfig:
    """What keeps the load of a mixture's experts even.

    Tokens of padding never count, and neither accumulation nor the layout changes the result.

    Args:
        aux_loss: coefficient of transformers' balancing loss, computed from the load of the global batch. "auto" is the
            config's `router_aux_loss_coef` where the config says `output_router_logits`, and 0 elsewhere.
        sequence_loss: coefficient of a balancing loss of each document (arXiv 2412.19437): summed over layers, mean
            over the documents of the global batch.
        z_loss: coefficient of the squared log-sum-exp of router logits: summed over layers, mean over tokens.
        bias_rate: how far an optimizer step moves the bias of each expert towards an even load, without any loss
            (`e_score_correction_bias`; 0.001 in arXiv 2412.19437).

    Raises:
        ValueError: a number is negative, or `aux_loss` is another word.
    """

    aux_loss: float | Literal["auto"] = "auto"
    sequence_loss: float = 0.0
    z_loss: float = 0.0
    bias_rate: float = 0.0

    def __post_init__(self) -> None:
        for name in ("aux_loss", "sequence_loss", "z_loss", "bias_rate"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and 0 <= value < float("inf")) and (name, value) != ("aux_loss", "auto"):
                also = ", or 'auto'" if name == "aux_loss" else ""
                raise ValueError(f"balance: {name}={value!r} is not allowed. Give a number ≥ 0{also}.")


def balance_of(config: BalanceConfig, model: nn.Module, adapted: bool) -> Balance | None:
    """What balances a model that is built and laid out; None: nothing was asked for.

    Args:
        adapted: whether adapters are trained, whose files hold no bias.

    Raises:
        ValueError: the model cannot be balanced as asked.
    """
    aux = configured_coefficient(model.config) if config.aux_loss == "auto" else config.aux_loss
    if not (aux or config.sequence_loss or config.z_loss or config.bias_rate):
        return None
    balance = Balance(config, float(aux), model, adapted)
    record_of(model).keep(Balanced(str(balance)))
    return balance


@dataclass(frozen=True)
class Balanced:
    """In a model's record: what balances it, in words."""

    text: str


class Balance:
    """Balances one model: the routers' part of the loss, and their biases.

    A router keeps its logits in each forward, and `side_loss` reads them right after it. The balancing loss multiplies
    the load of each expert over the global batch with the router's probabilities. If the global batch has several
    micro-batches here, or runs through a pipeline, a forward without gradients counts the load first.

    Args:
        config: what the user asked for.
        aux: the coefficient of the balancing loss.
        model: laid out; its blocks have not run yet if they are compiled.
        adapted: see `balance_of`.

    Raises:
        ValueError: see `balance_of`.
    """

    def __init__(self, config: BalanceConfig, aux: float, model: nn.Module, adapted: bool) -> None:
        self.config, self.aux, self.model = config, aux, model
        self.routers = record_routing(model)
        self._experts, self._k = expert_count(model.config), choices_per_token(model.config)
        self._sigmoid = {r.name: uses_sigmoid(r) for r in self.routers} if config.sequence_loss else {}
        self._check(adapted)
        self._layers = 0  # of all stages; not known yet
        self._strategy: MeshStrategy | None = None
        self._batch: _GlobalBatch | None = None
        self._load: Tensor | None = None
        self._chosen: dict[str, Tensor] = {}

    def _check(self, adapted: bool) -> None:
        if not self.routers and pipeline_of(self.model) is None:
            raise ValueError(
                f"balance: transformers records no router in {type(self.model).__name__}, so there is nothing to "
                "balance. Leave balance out, and set output_router_logits=False in the config (config_overrides)."
            )
        if not self._experts or not self._k:
            raise ValueError(
                f"balance: the config of {type(self.model).__name__} does not say how many experts there are and how "
                "many a token chooses (num_experts, num_experts_per_tok). Leave balance out."
            )
        if not self.config.bias_rate:
            return
        if adapted:
            raise ValueError(
                "balance: bias_rate moves the routers' biases, and adapters are saved without them. Set bias_rate=0, "
                "or train the model without lora."
            )
        for router in self.routers:
            bias = router.bias
            if bias is None:
                raise ValueError(
                    f"balance: bias_rate={self.config.bias_rate:g} moves a bias of the choice of experts, and the "
                    f"router {router.name} of {type(self.model).__name__} has none. Set bias_rate=0; aux_loss balances "
                    "any router."
                )
            if isinstance(bias, DTensor) or bias.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"balance: bias_rate needs the biases of the choice of experts whole and in fp32, and those of "
                    f"{router.name} are {'sharded' if isinstance(bias, DTensor) else bias.dtype}. Set bias_rate=0."
                )

    def __str__(self) -> str:
        """What is used, for the ledger."""
        of = (
            ("aux_loss {:g} over the global batch", self.aux),
            ("sequence_loss {:g}", self.config.sequence_loss),
            ("z_loss {:g}", self.config.z_loss),
            ("bias_rate {:g}", self.config.bias_rate),
        )
        return ", ".join(text.format(value) for text, value in of if value)

    # --- one optimizer step -------------------------------------------------------------------------------------------

    @contextmanager
    def step(
        self, strategy: MeshStrategy, objective: Objective, micro_batches: Sequence[MicroBatch], tokens: Tensor
    ) -> Iterator[None]:
        """A context around forward and backward of one optimizer step. Collective.

        Args:
            strategy, objective, micro_batches: see `StepRunner.forward_backward`.
            tokens: what the summed loss is divided by.
        """
        self._strategy, self._load, self._chosen = strategy, None, {}
        documents = [documents_of(micro_batch) for micro_batch in micro_batches]
        sizes = strategy.sum_over_rows(torch.stack([d.sizes for d in documents]).sum(0)).clamp(min=1)
        most = max(d.at_most for d in documents)
        self._batch = _GlobalBatch(tokens / sizes[0], tokens / sizes[1], sizes[0], most)
        if not self._layers:
            count = torch.tensor(len(self.routers), device=strategy.root_device)
            self._layers = int(strategy.sum_over_stages(count))
        hook = self.model.register_forward_pre_hook(lambda *_: self._record(True))
        try:
            if self.aux and (len(micro_batches) > 1 or strategy.dims.pp > 1):
                self._load = self._counted(strategy, objective, micro_batches)
            yield
        finally:
            hook.remove()
            self._record(False)
            self._strategy = self._batch = self._load = None

    def _record(self, on: bool) -> None:
        for router in self.routers:
            router.module.records, router.module.routing = on, None

    def _take(self) -> list[tuple[Router, Routing]]:
        """What the routers of the last forward recorded. They stop recording: a recomputation must not count."""
        taken = [(r, r.module.routing) for r in self.routers if r.module.routing is not None]
        self._record(False)
        return taken

    @torch.no_grad()
    def _counted(self, strategy: MeshStrategy, objective: Objective, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """The load of the global batch, from forwards without gradients that draw the same random numbers."""
        device = strategy.root_device
        load = torch.zeros(self._experts, device=device)
        enter_phase("forward that counts the load of experts")
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for micro_batch in micro_batches:
                inputs, _ = objective.split(micro_batch)
                marks = objective.token_marks(micro_batch)
                with strategy.split_sequence(inputs, marks) as (part, own):
                    strategy.forward(objective.model, part)
                load = load + self._load_of(self._take(), own)
        return self._summed(strategy, load)

    def _load_of(self, taken: Sequence[tuple[Router, Routing]], marks: Tensor) -> Tensor:
        """How often each expert is among the k largest logits of a token, in all layers together: fp32 `[experts]`."""
        load = torch.zeros(self._experts, device=marks.device)
        real = _real(marks).float()
        for _, routing in taken:
            best = routing.logits.detach().topk(self._k, dim=-1).indices
            load.scatter_add_(0, best.reshape(-1), real.repeat_interleave(self._k))
        return load

    def _summed(self, strategy: MeshStrategy, load: Tensor) -> Tensor:
        return strategy.sum_over_stages(strategy.sum_over_tokens(load))

    def side_loss(self, marks: Tensor) -> Tensor:
        """The routers' part of the loss of the forward that just ended, summed as the objective's loss is: 0-dim fp32.

        Args:
            marks: int64, see `Documents.marks`; this rank's part of them.
        """
        taken, batch = self._take(), self._batch
        assert self._strategy is not None
        assert batch is not None
        if self.config.bias_rate:
            self._count_choices(taken, marks)
        total = torch.zeros((), device=marks.device)
        weights = torch.zeros(0)
        if self.aux:
            if self._load is None:
                self._load = self._summed(self._strategy, self._load_of(taken, marks))
            shares = self._load / (batch.size * self._layers)
            weights = self.aux * self._experts * shares * (batch.per_token / self._layers)
        losses = _Losses(weights, self.config.z_loss * batch.per_token)
        for _, routing in taken:
            given = (routing.logits, _real(marks))
            total = total + checkpoint(losses.of, *given, use_reentrant=False, preserve_rng_state=False)
        if self.config.sequence_loss:
            for router, routing in taken:
                total = total + self._sequence_loss(router, routing.logits, marks.reshape(-1), batch)
        return total

    def _sequence_loss(self, router: Router, logits: Tensor, marks: Tensor, batch: _GlobalBatch) -> Tensor:
        """The balancing loss of each document in one layer, times the coefficient: 0-dim."""
        assert self._strategy is not None
        experts = logits.shape[1]
        real, document = marks >= 0, marks.clamp(min=0)
        with torch.no_grad():
            best = logits.topk(self._k, dim=-1).indices
            flat = (document[:, None] * experts + best).reshape(-1)
            counts = torch.zeros(batch.most_documents * experts, device=logits.device)
            counts.scatter_add_(0, flat, real.float().repeat_interleave(self._k))
            counts = self._strategy.sum_over_sequence(counts).view(-1, experts)
            length = counts.sum(1, keepdim=True) / self._k
            weights = counts * experts / (self._k * length.clamp(min=1).square())
            weights = weights * (self.config.sequence_loss * batch.per_document)
        scores = logits.float().sigmoid() if self._sigmoid[router.name] else logits.float().softmax(-1)
        shares = scores / scores.sum(-1, keepdim=True)
        return (shares * weights[document] * real[:, None]).sum()

    # --- biases -------------------------------------------------------------------------------------------------------

    def _count_choices(self, taken: Sequence[tuple[Router, Routing]], marks: Tensor) -> None:
        real = _real(marks).to(torch.int64)
        for router, routing in taken:
            chosen = routing.chosen
            if chosen is None:
                raise ValueError(
                    f"balance: bias_rate counts the experts that tokens choose, and the router {router.name} does not "
                    "return them. Set bias_rate=0."
                )
            counts = self._chosen.setdefault(router.name, _zeros(routing.logits))
            counts.scatter_add_(0, chosen.reshape(-1), real.repeat_interleave(chosen.shape[-1]))

    @torch.no_grad()
    def move_biases(self, strategy: MeshStrategy) -> None:
        """After the optimizer step: move each bias by `bias_rate` towards an even load. Collective."""
        if not self.config.bias_rate or not self._chosen:
            return
        names = sorted(self._chosen)
        counts = strategy.sum_over_tokens(torch.stack([self._chosen[name] for name in names])).double()
        self._chosen = {}
        for router in self.routers:
            if router.name in names:
                own = counts[names.index(router.name)]
                bias = router.bias
                assert bias is not None
                bias += self.config.bias_rate * (own.mean() - own).sign().to(bias.dtype)


@dataclass
class _GlobalBatch:
    """Of a step: tokens that the loss is divided by, for each real token and each document; how many there are."""

    per_token: Tensor
    per_document: Tensor
    size: Tensor
    most_documents: int


@dataclass
class _Losses:
    """The losses of one layer that add up over tokens.

    Args:
        weights: `[experts]` on the probabilities; empty: no balancing loss.
        z: on the squared log-sum-exp.
    """

    weights: Tensor
    z: Tensor

    def of(self, logits: Tensor, real: Tensor) -> Tensor:
        """Of logits `[n, experts]` where `real` `[n]` is true: 0-dim fp32."""
        logits = logits.float()
        lse = logits.logsumexp(-1)
        loss = (self.z * lse.square() * real).sum()
        if len(self.weights):
            loss = loss + ((logits - lse[:, None]).exp() @ self.weights * real).sum()
        return loss


def _real(marks: Tensor) -> Tensor:
    return marks.reshape(-1) >= 0


def _zeros(logits: Tensor) -> Tensor:
    return torch.zeros(logits.shape[1], dtype=torch.int64, device=logits.device)
