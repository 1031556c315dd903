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

from automodel_trainer.models._masks import packing_without_sync
from automodel_trainer.models.auto import build_on_meta
from automodel_trainer.models.initialize import initialize_weights
from automodel_trainer.models.packed_inputs import lengths_of
from automodel_trainer.models.shrink import shrink

InputsOf = Callable[[dict[str, Any], bool], dict[str, Any]]
"""Keyword arguments of a forward, of a micro-batch; True: with the lengths of its documents."""
ROWS = ((19, 29), (27, 21))
"""Lengths of the documents of two packed rows. They end at other places, so one row's mask would not fit the other."""
WINDOW = 24
"""Windows and chunks are narrowed for rows of this many tokens, so that they bind inside a document."""
VOCABULARY = 96
RANKS = 4
"""Heads and widths of the copy divide by so many, as some families divide their own."""
LARGEST = 300_000_000
"""Parameters of a copy that is still run: the towers of a composite model are not made narrow."""
SIZES: tuple[dict[str, Any], ...] = (
    {},
    {"layers": 8},  # kinds of layers that alternate
    {"depth": False},
    {"width": False},
    {"width": False, "depth": False},
)
"""How small a copy may be (`shrink`); the first size that a family's own code takes is taken."""
SEEDS = 2
"""Weights that are tried: a router may choose otherwise where two scores are equal but for rounding."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3}
"""Of the logits' spread. Rounding of the copy stays below a hundredth of it, and a leak is at least as large."""


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
    """

    model: str
    packed: str | None = None
    packed_obstacle: str | None = None
    padded_obstacle: str | None = None
    causal_obstacle: str | None = None
    checked: bool = True

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
            model = small_copy(config, auto_class, attention, trust_remote_code, torch.device(device), dtype, seed)
        except ValueError as error:
            return Isolation(auto_class, None, str(error), checked=False)
        found = _Proof(model, inputs_of, by_length, seed).run()
        if found.packed and not found.padded_obstacle:
            break
    return found


def small_copy(
    config: PreTrainedConfig,
    auto_class: str,
    attention: str | None,
    trust_remote_code: bool,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
) -> PreTrainedModel:
    """A small model with a layer of each kind and random weights, none of which is zero or one throughout.

    It is made as small as its family allows: shallow and narrow, or one of both.

    Raises:
        ValueError: it would not be small, or would lack a kind of layer, or does not run.
    """
    whole = build_on_meta(auto_class, config, dtype, attention, trust_remote_code)
    first: Exception | None = None
    for size in SIZES:
        try:
            small = _with_ordinary_ids(shrink(config, RANKS, WINDOW, VOCABULARY, **size))
            model = build_on_meta(auto_class, small, dtype, attention, trust_remote_code)
            if missing := _kinds(whole) - _kinds(model):
                raise ValueError(f"it has no {', '.join(sorted(missing))}")
            if (count := sum(p.numel() for p in model.parameters())) > LARGEST:
                raise ValueError(f"it has {count:,} parameters")
            _draw(model, device, seed)
            packing_without_sync(model)
            with torch.no_grad():
                model(input_ids=ordinary_tokens(small)[:24][None].to(device))
        except Exception as error:  # a family's own code may fail anywhere on sizes that nobody has
            first = first or error
            continue
        return model
    raise ValueError(f"no small copy of {type(whole).__name__} could be made to check it ({_first_line(first)})")


def _draw(model: PreTrainedModel, device: torch.device, seed: int) -> None:
    initialize_weights(model, device, seed, strict=False)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator, device=device)
                spread = min(0.5, parameter.shape[-1] ** -0.5) if parameter.ndim > 1 else 0.1
                parameter.add_((spread * noise).to(parameter.dtype))
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def _with_ordinary_ids(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of a small vocabulary without ids that lie beyond it, where embeddings look at them."""
    for part in {id(c): c for c in (config, config.get_text_config(decoder=True))}.values():
        if isinstance(pad := getattr(part, "pad_token_id", None), int) and pad >= VOCABULARY:
            part.pad_token_id = 0
    return config


def _kinds(model: nn.Module) -> set[str]:
    return {type(module).__name__ for module in model.modules()}


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
            text = f"{self.name} does not run on rows of text alone ({_first_line(error)})"
            return Isolation(self.name, None, text, checked=False)
        self.spread = float(torch.cat([d for row in self.alone for d in row]).float().std())
        if not 1e-6 < self.spread < 1e6:
            text = f"the logits of a small copy of {self.name} are no numbers to compare"
            return Isolation(self.name, None, text, checked=False)
        padded, causal = self._padded(), self._causal()
        obstacles: list[str] = []
        for how in self.ways:
            found = self._packed(how)
            if found is not None and how == "lengths" and _leak(found) == _leak(obstacles[0]):
                break  # the lengths are of no use to this model
            if found is None:
                return Isolation(self.name, how, None, padded, causal)
            obstacles.append(found)
        obstacle = "; ".join(dict.fromkeys(obstacles))
        return Isolation(self.name, None, obstacle, padded, causal)

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
            return f"{self.name} does not take {what} ({_first_line(error)})"
        for which, others in changed.items():
            moved = max(self._apart(a[i], b[i]) for a, b in zip(logits, others) for i in range(len(a)) if i != which)
            if moved > self.tolerance:
                layers = ", ".join(self._leaking(how)) or "its layers"
                return (
                    f"in {self.name} a document changes the logits of the next in its row by {moved:.2g} of their "
                    f"spread ({layers})"
                )
        apart = max(self._apart(a, b) for x, y in zip(logits, self.alone) for a, b in zip(x, y))
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
        width = max(map(len, documents)) + 3
        ids = torch.stack([nn.functional.pad(d, (0, width - len(d)), value=int(self.tokens[0])) for d in documents])
        mask = torch.stack([(torch.arange(width) < len(d)).long() for d in documents])
        positions = torch.arange(width).expand(len(documents), -1)
        try:
            logits = self._logits(
                {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "packed": False}
            )
        except Exception as error:
            return f"{self.name} does not take padded rows ({_first_line(error)})"
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


def ordinary_tokens(config: PreTrainedConfig) -> Tensor:
    """Ids that the config gives no meaning: int64 `[n]`."""
    text = config.get_text_config(decoder=True)
    named = [item for part in (config, text) for item in part.to_dict().items()]
    special = {i for name, i in named if name.endswith(("token_id", "token_index")) and isinstance(i, int)}
    return torch.tensor([i for i in range(3, text.vocab_size) if i not in special])


def _one_row(document: Tensor) -> dict[str, Any]:
    return {"input_ids": document[None], "packed": False}


def _leak(obstacle: str) -> str:
    return obstacle.partition("(")[0].partition(" by ")[0]


def _first_line(error: Exception | None) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
