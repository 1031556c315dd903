"""SampleGenerations: show what the model answers before and after training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from rich import box
from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from automodel_trainer.callbacks.console import show_rich
from automodel_trainer.callbacks.layout import tokenizer_of
from automodel_trainer.models.generation import encode, generation_config


class SampleGenerations(Callback):
    """Lets the model answer the same prompts before the first step and after the last, and prints both side by side.

    Decoding is greedy, so it does not change the state of the random generators. Every rank decodes the same prompts,
    because the forward passes of a sharded model are collective. Rank 0 prints the answers and sends them to each
    logger that accepts text.

    Args:
        prompts: the prompts. None: the first `num_prompts` from the data module's `sample_prompts(n)`.
        every_n_steps: also answer every this many optimizer steps; None: only before and after training.
        max_new_tokens: maximum number of tokens per answer.
        num_prompts: number of prompts to take from the data module.

    Raises:
        ValueError: a number is less than 1, or `prompts` is a string.
    """

    def __init__(
        self,
        prompts: list[str] | None = None,
        every_n_steps: int | None = None,
        max_new_tokens: int = 48,
        num_prompts: int = 2,
    ) -> None:
        for name, value in {"every_n_steps": every_n_steps, "max_new_tokens": max_new_tokens}.items():
            if value is not None and value < 1:
                raise ValueError(f"SampleGenerations({name}={value}): {name} must be at least 1.")
        if isinstance(prompts, str):
            raise ValueError(f"SampleGenerations(prompts={prompts!r}): give a list of prompts, not one string.")
        self.prompts = prompts
        self.every_n_steps = every_n_steps
        self.max_new_tokens = max_new_tokens
        self.num_prompts = num_prompts
        self._asked: list[str] = []
        self._before: list[str] = []
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the prompts and answer them before training."""
        self._asked = self._find_prompts(trainer, pl_module)
        self._last_step = trainer.global_step
        self._before = self._answer_all(trainer, pl_module)
        self._log(trainer, self._before)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Answer the prompts if it is time to."""
        step = trainer.global_step
        # If Lightning accumulates gradients, several batches end at the same optimizer step.
        if not self._asked or self.every_n_steps is None or step % self.every_n_steps or step == self._last_step:
            return
        self._last_step = step
        answers = self._answer_all(trainer, pl_module)
        self._log(trainer, answers)
        if trainer.is_global_zero:
            answered = side_by_side(self._asked, {f"step {step}": answers})
            show_rich(trainer, lambda console: console.print(answered))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answer the prompts again, and print all answers."""
        if not self._asked:
            return
        after = self._answer_all(trainer, pl_module)
        self._log(trainer, after)
        if trainer.is_global_zero:
            columns = {"before training": self._before, f"after {trainer.global_step} steps": after}
            answered = side_by_side(self._asked, columns)
            show_rich(trainer, lambda console: console.print(answered))

    def _find_prompts(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        if tokenizer_of(pl_module) is None:
            rank_zero_warn("SampleGenerations is off: the module has no `tokenizer`.")
            return []
        if not hasattr(getattr(pl_module, "model", None), "generate"):
            rank_zero_warn("SampleGenerations is off: the module has no `model` with a `generate` method.")
            return []
        if self.prompts is not None:
            return self.prompts
        sample_prompts = getattr(getattr(trainer, "datamodule", None), "sample_prompts", None)
        prompts = list(sample_prompts(self.num_prompts)) if sample_prompts is not None else []
        if not prompts:
            rank_zero_warn(
                "SampleGenerations is off: there are no `prompts`, and the data module has no `sample_prompts(n)` that "
                "returns any. Give `prompts`."
            )
        return prompts

    def _answer_all(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        with _evaluating(pl_module), torch.no_grad():
            return [self._answer(trainer, pl_module, prompt) for prompt in self._asked]

    def _answer(self, trainer: Trainer, pl_module: Any, prompt: str) -> str:
        tokenizer, model = pl_module.tokenizer, pl_module.model
        input_ids = encode(tokenizer, [{"role": "user", "content": prompt}])["input_ids"].to(pl_module.device)
        generate = pl_module.generate if hasattr(pl_module, "generate") else model.generate
        output = generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=generation_config(model, tokenizer, self.max_new_tokens),
            # A rank whose answer is complete must keep running forwards: the others need its shards of the weights.
            synced_gpus=trainer.world_size > 1,
        )
        new_tokens = output[0, input_ids.shape[1] :].tolist()
        text = str(tokenizer.decode(new_tokens, skip_special_tokens=True)).strip()
        return f"{text} …" if len(new_tokens) == self.max_new_tokens else text

    def _log(self, trainer: Trainer, answers: list[str]) -> None:
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            add_text = getattr(getattr(logger, "experiment", None), "add_text", None)  # TensorBoard's method
            for number, (prompt, answer) in enumerate(zip(self._asked, answers)):
                if callable(add_text):
                    add_text(f"samples/{number}", f"**{prompt}**\n\n{answer}", trainer.global_step)


def side_by_side(prompts: list[str], columns: dict[str, list[str]]) -> Panel:
    """A panel with each prompt above its answers.

    Args:
        prompts: the prompts.
        columns: maps the title of each column to one answer per prompt.
    """
    parts: list[Any] = []
    for number, prompt in enumerate(prompts):
        table = Table(box=box.SIMPLE_HEAD, expand=True, show_edge=False, pad_edge=False)
        for name in columns:
            table.add_column(name, style="dim" if name.startswith("before") else "green", ratio=1, overflow="fold")
        # Text instead of str: an answer may contain what looks like rich markup.
        table.add_row(*(Text(answers[number] or "(nothing)") for answers in columns.values()))
        parts += [Text(prompt, style="bold cyan"), table]
    return Panel(Group(*parts), title="sample answers", title_align="left", padding=(1, 2))


@contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Eval mode inside the context. Afterwards every submodule is in its own previous mode again."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
