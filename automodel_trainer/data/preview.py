"""Show what the model really sees: the first batch, token by token, in a terminal, in a notebook or as an HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from automodel_trainer.data.preview_html import PicturesOf, render_page, render_part
from automodel_trainer.data.preview_rows import PreviewCounts, read_rows, summarize
from automodel_trainer.data.preview_text import render_terminal

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase


class Preview:
    """A batch as the model sees it. A notebook shows it in colour, and `print` as text with ⟦ ⟧ around what is trained.

    Args:
        micro_batches: the micro-batches of one optimizer step.
        tokenizer: decodes the ids.
        rows: the number of rows to show.
        pictures_of: the pictures of a row of the data, by its number: a notebook shows them small.

    Attributes:
        counts: of the whole batch: rows, documents, and tokens of each kind.

    Raises:
        ValueError: `rows` is less than 1.
    """

    def __init__(
        self,
        micro_batches: Sequence[dict[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        rows: int = 1,
        pictures_of: PicturesOf | None = None,
    ) -> None:
        if rows < 1:
            raise ValueError(f"rows={rows} must be at least 1: the number of rows to show.")
        self.counts: PreviewCounts = summarize(micro_batches)
        self._micro_batches = micro_batches
        self._tokenizer = tokenizer
        self._rows = rows
        self._pictures_of = pictures_of

    def _repr_html_(self) -> str:
        rows = list(islice(read_rows(self._micro_batches, self._tokenizer), self._rows))
        return render_part(rows, self.counts, self._pictures_of)

    def __repr__(self) -> str:
        from rich.console import Console as RichConsole

        console = RichConsole(width=120, color_system=None, force_jupyter=False)
        with console.capture() as captured:
            console.print(render_terminal(self._micro_batches, self._tokenizer, max_rows=self._rows, marks=True))
        return captured.get()


def preview(
    micro_batches: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_rows: int = 1,
    html: str | Path | None = None,
    console: Console | None = None,
    pictures_of: PicturesOf | None = None,
) -> PreviewCounts:
    """Print the first rows of a batch, and write the whole batch as an HTML page if `html` is given.

    Args:
        micro_batches: the micro-batches of one optimizer step.
        tokenizer: decodes the ids.
        max_rows: number of rows to print.
        html: path of the page to write.
        console: the rich console to print to. None: standard output.
        pictures_of: the pictures of a row of the data, by its number: the page shows them small.

    Returns:
        The counts of the whole batch.
    """
    from rich.console import Console as RichConsole

    console = console or RichConsole()
    console.print(render_terminal(micro_batches, tokenizer, max_rows=max_rows, marks=console.color_system is None))
    if html is not None:
        Path(html).parent.mkdir(parents=True, exist_ok=True)
        Path(html).write_text(render_html(micro_batches, tokenizer, pictures_of), encoding="utf-8")
        console.print(f"The whole batch: {html}", style="dim", highlight=False)
    return summarize(micro_batches)


def render_html(
    micro_batches: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    pictures_of: PicturesOf | None = None,
) -> str:
    """The whole batch as one self-contained HTML page, with a legend, counts, and the id of each token on hover."""
    return render_page(list(read_rows(micro_batches, tokenizer)), summarize(micro_batches), pictures_of)
