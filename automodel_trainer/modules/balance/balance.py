"""One optimizer step with a balanced mixture: what of the loss is the routers'."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
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
from automodel_trainer.models.routers import probes, uses_sigmoid
from automodel_trainer.models.stage_names import pipeline_of
from automodel_trainer.modules.balance.biases import Biases, check_biases
from automodel_trainer.modules.balance.config import BalanceConfig
from automodel_trainer.modules.balance.losses import DocumentLoss, TokenLosses, load_of, real_tokens
from automodel_trainer.modules.documents import documents_of
from automodel_trainer.strategies import MeshStrategy
from automodel_trainer.strategies.base.objective import MicroBatch, Objective


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
        self._probes = probes(self.routers)
        self._check(adapted)
        asked = self.routers if config.sequence_loss else []
        self._sigmoid = {r.name: uses_sigmoid(r, self._probes.get(r.name)) for r in asked}
        self._layers = 0  # of all stages; not known yet
        self._strategy: MeshStrategy | None = None
        self._batch: _GlobalBatch | None = None
        self._load: Tensor | None = None
        self.biases = Biases(self.routers, config.bias_rate)

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
        for name, probe in self._probes.items():
            if probe.records_probabilities and (self.aux or self.config.sequence_loss or self.config.z_loss):
                raise ValueError(
                    f"balance: its losses need the logits of routers, and transformers records probabilities of {name} "
                    f"in {type(self.model).__name__}. Leave balance out."
                )
            self._check_width(name, probe.logits)
        check_biases(self.model, self.routers, self.config.bias_rate, adapted)

    def _check_width(self, name: str, logits: Tensor) -> None:
        if self.aux and logits.shape[1] != self._experts:
            raise ValueError(
                f"balance: aux_loss counts how often each of the {self._experts} experts is chosen, and the router "
                f"{name} of {type(self.model).__name__} chooses from {logits.shape[1]}: some choices are no experts. "
                "Set aux_loss=0."
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
        self._strategy, self._load = strategy, None
        self.biases.forget()
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
        for router, routing in taken:
            self._check_width(router.name, routing.logits)
            load += load_of(routing.logits, self._k, marks)
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
            self.biases.count(taken, marks)
        total = torch.zeros((), device=marks.device)
        weights = torch.zeros(0)
        if self.aux:
            if self._load is None:
                self._load = self._summed(self._strategy, self._load_of(taken, marks))
            shares = self._load / (batch.size * self._layers)
            weights = self.aux * self._experts * shares * (batch.per_token / self._layers)
        losses = TokenLosses(weights, self.config.z_loss * batch.per_token)
        for _, routing in taken:
            given = (routing.logits, real_tokens(marks))
            total = total + checkpoint(losses.of, *given, use_reentrant=False, preserve_rng_state=False)
        if self.config.sequence_loss:
            weight = self.config.sequence_loss * batch.per_document
            of_documents = DocumentLoss(self._k, weight, batch.most_documents)
            summed = self._strategy.sum_over_sequence
            for router, routing in taken:
                sigmoid = self._sigmoid[router.name]
                total = total + of_documents.of(routing.logits, marks.reshape(-1), sigmoid, summed)
        return total

    def move_biases(self, strategy: MeshStrategy) -> None:
        """After the optimizer step: see `Biases.move`. Collective."""
        self.biases.move(strategy)


@dataclass
class _GlobalBatch:
    """Of a step: tokens that the loss is divided by, for each real token and each document; how many there are."""

    per_token: Tensor
    per_document: Tensor
    size: Tensor
    most_documents: int
