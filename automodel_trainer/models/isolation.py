"""Does a model keep the documents of a packed row apart, and does padding leave a row as it is? Proved, not assumed.

`position_ids` that start again tell transformers' attention where documents begin. Other layers (convolutions, linear
attention, state spaces) carry state along the row and want more, or cannot be told. No list of families says which. So
a small copy of the model with random weights runs a few short rows, and its logits answer:

- packed: one document is changed, and those of the others in the row must stay; each is as in a row of its own;
- padded: a row with padding at its end, masked, is as the row without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from automodel_trainer.models.packed_inputs import lengths_of
from automodel_trainer.models.small_copy import ordinary_tokens, small_copy
from automodel_trainer.nn.text import first_line

InputsOf = Callable[[dict[str, Any], bool], dict[str, Any]]
"""Keyword arguments of a forward, of a micro-batch; True: with the lengths of its documents."""
ROWS = ((19, 29), (27, 21))
"""Lengths of the documents of two packed rows. They end at other places, so one row's mask would not fit the other."""
SEEDS = 2
"""Weights that are tried: a router may choose otherwise where two scores are equal but for rounding."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3}
"""Of the logits' spread. In fp32 the copy rounds a hundred times less; a leak is as large as the spread itself."""


@dataclass(frozen=True)
class Isolation:
    """What was proved of a model.

    Args:
        model: name of the model's class.
        packed: how documents of a packed row are kept apart: "positions" (`position_ids` are enough), "lengths" (the
            layers also get the lengths of the documents); None: they are not.
        packed_obstacle: why they are not.
        padded_obstacle: why rows with padding are not what they are without; None: they are.
        causal_obstacle: why a token's logits are not made of it and earlier tokens alone; None: they are.
        checked: False: nothing could be proved, for the reason in `packed_obstacle`.
        error: the largest difference found in packed rows, as a part of the logits' spread.
    """

    model: str
    packed: str | None = None
    packed_obstacle: str | None = None
    padded_obstacle: str | None = None
    causal_obstacle: str | None = None
    checked: bool = True
    error: float = 0.0

    def __str__(self) -> str:
        if self.packed is None:
            return f"packed documents are not kept apart: {self.packed_obstacle}"
        how = {"positions": "position_ids", "lengths": "position_ids and document lengths"}[self.packed]
        return f"packed documents are kept apart by {how}, checked on a small copy of the model"


def prove_isolation(
    config: PreTrainedConfig,
    auto_class: str,
    inputs_of: InputsOf,
    *,
    by_length: bool = True,
    attention: str | None = None,
    trust_remote_code: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Isolation:
    """Run a small copy of a model and see whether documents of a row, and padding, change what a document gives.

    Args:
        config: the model's.
        auto_class: the transformers auto class that builds it.
        inputs_of: keyword arguments of the model's forward for a micro-batch, as the objective makes them; True: with
            the lengths of documents.
        by_length: the objective can give layers the lengths of documents, where their kernels take them.
        attention: transformers' name of the attention kernel; None: the model's default.
        device, dtype: what the copy runs on and in.
    """
    found = Isolation(auto_class, None, "it was not tried")
    for seed in range(SEEDS):
        try:
            model = small_copy(
                config,
                auto_class,
                attention=attention,
                trust_remote_code=trust_remote_code,
                device=torch.device(device),
                dtype=dtype,
                seed=seed,
            )
        except ValueError as error:
            return Isolation(auto_class, None, str(error), checked=False)
        found = _Proof(model, inputs_of, by_length, seed).run()
        if found.packed and not found.padded_obstacle:
            break  # one proof is enough; a failure may be a router's near tie
    return found


class _Proof:
    def __init__(
        self,
        model: PreTrainedModel,
        inputs_of: InputsOf,
        by_length: bool,
        seed: int,
    ) -> None:
        self.model, self.inputs_of, self.name = model, inputs_of, type(model).__name__
        self.ways = ("positions", "lengths") if by_length else ("positions",)
        parameter = next(model.parameters())
        self.device, self.tolerance = parameter.device, TOLERANCE[parameter.dtype]
        self.generator = torch.Generator().manual_seed(seed)
        self.tokens = ordinary_tokens(model.config)
        self.documents = [[self._draw(length) for length in row] for row in ROWS]

    def run(self) -> Isolation:
        try:
            self.alone = [
                [self._logits({"input_ids": d[None], "packed": False})[0] for d in row] for row in self.documents
            ]
        except Exception as error:
            text = f"{self.name} does not run on rows of text alone ({first_line(error)})"
            return Isolation(self.name, None, text, checked=False)
        self.spread = float(torch.cat([d for row in self.alone for d in row]).float().std())
        # Random weights can make logits that are all equal, or that overflow. Then nothing follows from them.
        if not 1e-6 < self.spread < 1e6:
            text = f"the logits of a small copy of {self.name} are no numbers to compare"
            return Isolation(self.name, None, text, checked=False)
        padded, causal = self._padded(), self._causal()
        obstacles: list[str] = []
        for how in self.ways:
            self.error = 0.0
            found = self._packed(how)
            if found is not None and how == "lengths" and _leak(found) == _leak(obstacles[0]):
                break  # the lengths are of no use to this model
            if found is None:
                return Isolation(self.name, how, None, padded, causal, error=self.error)
            obstacles.append(found)
        obstacle = "; ".join(dict.fromkeys(obstacles))
        return Isolation(self.name, None, obstacle, padded, causal, error=self.error)

    def _packed(self, how: str) -> str | None:
        """Why packed rows are not right; None if they are."""
        try:
            logits = self._packed_logits(self.documents, how)
            changed = {
                which: self._packed_logits([[self._draw(len(d)) if i == which else d for i, d in enumerate(row)]
                                            for row in self.documents], how)
                for which in range(len(ROWS[0]))
            }  # fmt: skip
        except Exception as error:
            what = "packed rows" if how == "positions" else "the lengths of packed documents"
            return f"{self.name} does not take {what} ({first_line(error)})"
        for which, others in changed.items():
            moved = max(self._apart(a[i], b[i]) for a, b in zip(logits, others) for i in range(len(a)) if i != which)
            self.error = max(self.error, moved)
            if moved > self.tolerance:
                layers = ", ".join(self._leaking(how)) or "its layers"
                return (
                    f"in {self.name} a document changes the logits of the next in its row by {moved:.2g} of their "
                    f"spread ({layers})"
                )
        # Documents that do not see each other may still be wrong: positions that count on, for one.
        apart = max(self._apart(a, b) for x, y in zip(logits, self.alone) for a, b in zip(x, y))
        self.error = max(self.error, apart)
        if apart > self.tolerance:
            return f"in {self.name} a packed document's logits are {apart:.2g} of their spread from those of it alone"
        return None

    def _packed_logits(self, documents: list[list[Tensor]], how: str) -> list[list[Tensor]]:
        logits = self._logits(self._packed_batch(documents), how)
        return [list(row.split([len(d) for d in docs])) for row, docs in zip(logits, documents)]

    def _packed_batch(self, documents: list[list[Tensor]]) -> dict[str, Any]:
        positions = torch.stack([torch.cat([torch.arange(len(d)) for d in row]) for row in documents])
        ids = torch.stack([torch.cat(row) for row in documents])
        return {"input_ids": ids, "position_ids": positions, "packed": True}

    def _padded(self) -> str | None:
        """Why padded rows are not right; None if they are."""
        documents = [d for row in self.documents for d in row]
        width = max(map(len, documents)) + 3  # so that the longest row is padded too
        ids = torch.stack([nn.functional.pad(d, (0, width - len(d)), value=int(self.tokens[0])) for d in documents])
        mask = torch.stack([(torch.arange(width) < len(d)).long() for d in documents])
        positions = torch.arange(width).expand(len(documents), -1)
        try:
            logits = self._logits(
                {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "packed": False}
            )
        except Exception as error:
            return f"{self.name} does not take padded rows ({first_line(error)})"
        alone = [d for row in self.alone for d in row]
        apart = max(self._apart(row[: len(d)], d) for row, d in zip(logits, alone))
        if apart > self.tolerance:
            return f"in {self.name} the logits of a row with padding are {apart:.2g} of their spread from those without"
        return None

    def _causal(self) -> str | None:
        """Why a token sees later ones; None if it does not."""
        document = self.documents[0][0]
        changed = torch.cat([document[:-1], self._draw(1)])
        changed[-1] = next(t for t in self.tokens if t != document[-1])
        moved = self._apart(self.alone[0][0][:-1], self._logits(_one_row(changed))[0][:-1])
        if moved > self.tolerance:
            return f"in {self.name} a token changes the logits of earlier ones by {moved:.2g} of their spread"
        return None

    @torch.no_grad()
    def _logits(self, batch: dict[str, Any], how: str = "positions") -> Tensor:
        shape = batch["input_ids"].shape
        if how == "lengths":
            batch = {**batch, "document_lengths": lengths_of(batch["position_ids"])}
        batch = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        inputs = self.inputs_of(batch, how == "lengths")
        outputs = self.model(**inputs)
        logits: Tensor = outputs["logits"] if "logits" in outputs else outputs[0]
        if logits.shape[:-1].numel() != shape.numel():
            raise ValueError(f"its outputs {list(logits.shape)} are not one for each of {list(shape)} tokens")
        return logits.detach().view(*shape, -1)

    def _leaking(self, how: str) -> list[str]:
        """Class names of the innermost modules whose input of the last document stays and whose output moves."""
        seen = []
        changed = [[self._draw(len(row[0])), *row[1:]] for row in self.documents]
        start = ROWS[0][0]
        for documents in (self.documents, changed):
            with _recorded(self.model, sum(ROWS[0]), start) as calls:
                self._packed_logits(documents[:1], how)
            seen.append(calls)
        before, after = seen
        culprits = [
            name
            for name, (given, made) in before.items()
            if name in after and self._apart(given, after[name][0]) < self.tolerance < self._apart(made, after[name][1])
        ]
        inner = [n for n in culprits if not any(other.startswith(f"{n}.") for other in culprits)]
        return sorted({type(self.model.get_submodule(n)).__name__ for n in inner})

    def _draw(self, length: int) -> Tensor:
        return self.tokens[torch.randint(len(self.tokens), (length,), generator=self.generator)]

    def _apart(self, a: Tensor, b: Tensor) -> float:
        # A number that is none counts as a difference: a row whose tokens see nothing has such logits.
        return float((a.float() - b.float()).abs().nan_to_num(nan=torch.inf).max()) / self.spread


@contextmanager
def _recorded(model: nn.Module, length: int, start: int) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """What modules get and make `[1, length, …]`, from token `start` on, by their names."""
    calls: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        given: Any = args[0] if args else kwargs.get("hidden_states")
        made: Any = output[0] if isinstance(output, tuple) else output
        if all(isinstance(t, Tensor) and t.is_floating_point() and t.shape[1:2] == (length,) for t in (given, made)):
            calls[name] = given[:, start:].clone(), made[:, start:].clone()

    handles = [
        m.register_forward_hook(lambda _, args, kwargs, out, n=n: note(n, args, kwargs, out), with_kwargs=True)
        for n, m in model.named_modules()
        if n
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _one_row(document: Tensor) -> dict[str, Any]:
    return {"input_ids": document[None], "packed": False}


def _leak(obstacle: str) -> str:
    return obstacle.partition("(")[0].partition(" by ")[0]
