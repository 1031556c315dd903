from __future__ import annotations

from html.parser import HTMLParser

import pytest
import torch
from rich.console import Console

from automodel_trainer.data.preview import Preview, preview, render_html
from automodel_trainer.data.preview_rows import PARTIAL, read_rows, summarize, token_texts
from automodel_trainer.data.preview_text import render_terminal
from tests.tiny import tiny_tokenizer

IGNORED = -100


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def packed(tokenizer, documents, width):
    """A one-row micro-batch of (prompt, answer) texts."""
    ids, labels, positions = [], [], []
    for prompt, answer in documents:
        prompt_ids, answer_ids = tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]
        ids += prompt_ids + answer_ids
        labels += [IGNORED] * len(prompt_ids) + answer_ids
        positions += range(len(prompt_ids) + len(answer_ids))
    padding = width - len(ids)
    ids += [tokenizer.pad_token_id] * padding
    labels += [IGNORED] * padding
    positions += range(padding)
    tensors = {"input_ids": ids, "labels": labels, "position_ids": positions}
    return {**{key: torch.tensor([values]) for key, values in tensors.items()}, "sample_ids": [0, 1]}


@pytest.fixture
def batch(tokenizer):
    documents = [("<|im_start|>a b\n", "yes<|im_end|>"), ("<|im_start|>c", "no<|im_end|>")]
    return [packed(tokenizer, documents, 24), packed(tokenizer, documents[:1], 24)]


def test_counts(batch):
    counts = summarize(batch)
    assert (counts.micro_batches, counts.rows, counts.documents, counts.tokens) == (2, 2, 3, 48)
    assert counts.supervised == 4 + 3 + 4
    assert counts.padding == 48 - (9 + 5) - 9
    assert counts.supervised_share == pytest.approx(11 / 23)
    assert counts.padding_share == pytest.approx(25 / 48)
    assert "11 trained" in counts.describe()


def test_documents_and_kinds_of_a_packed_row(batch, tokenizer):
    row = next(read_rows(batch, tokenizer))
    assert ["".join(token.text for token in document.tokens) for document in row.documents[:2]] == [
        "<|im_start|>a b\nyes<|im_end|>",
        "<|im_start|>cno<|im_end|>",
    ]
    assert [document.is_padding for document in row.documents] == [False, False, True]
    trained = [token.text for token in row.tokens if token.kind == "trained"]
    assert trained == ["y", "e", "s", "<|im_end|>", "n", "o", "<|im_end|>"]
    assert [token.index for token in row.tokens] == list(range(24))


def test_padding_is_told_from_an_end_token_that_is_the_pad_token(tokenizer):
    """Many tokenizers pad with the end token; only the run after the last document is padding."""
    same = tiny_tokenizer(pad_token="<|im_end|>")
    counts = summarize([packed(same, [("a", "b<|im_end|>")], 8)])
    assert (counts.documents, counts.supervised, counts.padding) == (1, 2, 5)


def test_padded_rows_go_by_the_attention_mask(tokenizer):
    batch = packed(tokenizer, [("a", "b<|im_end|>")], 8)
    batch["position_ids"] = torch.arange(8)[None]
    batch["attention_mask"] = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0]])
    counts = summarize([batch])
    assert (counts.documents, counts.supervised, counts.padding) == (1, 2, 5)


def test_a_row_without_padding_and_a_filler_row(tokenizer):
    assert summarize([packed(tokenizer, [("a", "b")], 2)]).padding == 0
    filler = packed(tokenizer, [], 8)
    counts = summarize([filler])
    assert (counts.documents, counts.supervised, counts.padding) == (0, 0, 8)
    assert "padding" in render(render_terminal([filler], tokenizer))
    assert "padding" in render_html([filler], tokenizer)


@pytest.mark.parametrize("text", ["plain text", "é 中文 🎉🎊!", "a\u200bb", " lead  and\ttabs\n\n"])
def test_token_texts_lose_nothing(tokenizer, text):
    texts = token_texts(tokenizer(text)["input_ids"], tokenizer)
    assert "".join(part for part in texts if part != PARTIAL) == text
    assert len(texts) == len(text.encode())  # this tokenizer has one token for each byte


def test_bytes_that_are_no_character_do_not_break(tokenizer):
    half = tokenizer("🎉")["input_ids"][:2]
    texts = token_texts([*half, *tokenizer("abcdef")["input_ids"], *half], tokenizer)
    assert len(texts) == 10
    assert "def" in "".join(texts)


def test_token_texts_keep_the_space_that_decoding_alone_loses():
    """A tokenizer with "▁" for the space drops it from the first token it decodes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"▁the": 0, "▁cat": 1, "<unk>": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert tokenizer.decode([1]) == "cat"
    assert token_texts([0, 1, 0], tokenizer) == ["the", " cat", " the"]


def render(renderable, **options):
    console = Console(width=100, record=True, force_terminal=True, color_system="truecolor", file=_Sink(), **options)
    console.print(renderable)
    return console.export_text(styles=False)


class _Sink:
    def write(self, text):
        pass

    def flush(self):
        pass


def test_the_terminal_shows_tokens_boundaries_and_blanks(batch, tokenizer):
    text = render(render_terminal(batch, tokenizer))
    for shown in ("document 1: 9 tokens, 4 trained", "document 2: 5 tokens, 3 trained", "padding: 10 × <pad>"):
        assert shown in text
    assert "<|im_start|>a·b↵" in text
    assert "yes<|im_end|>" in text
    assert "micro-batch 1" not in text
    assert "micro-batch 1, row 0" in render(render_terminal(batch, tokenizer, max_rows=2))


def test_trained_and_masked_tokens_have_different_colours(batch, tokenizer):
    console = Console(width=100, force_terminal=True, color_system="truecolor")
    parts = [segment for line in console.render_lines(render_terminal(batch, tokenizer)) for segment in line]
    colours = {part.text: part.style.bgcolor.triplet for part in parts if part.style and part.style.bgcolor}
    assert len({colours[name] for name in (" trained ", " masked ", " special ", " special, masked ")}) == 4
    # Neighbours differ, and every other token has the shade of the legend.
    assert colours["y"] == colours["s"] != colours["e"]
    assert colours[" trained "] in (colours["y"], colours["e"])
    assert colours["a"] not in (colours["y"], colours["e"])


def test_without_colour_brackets_mark_what_is_trained(batch, tokenizer, capsys):
    preview(batch, tokenizer, console=Console(width=100, color_system=None))
    text = capsys.readouterr().out
    assert "⟦yes<|im_end|>⟧" in text
    assert "⟦no<|im_end|>⟧" in text
    assert "\x1b[" not in text


class Page(HTMLParser):
    """Collects the tokens of a page as (classes, data, text) and every tag name."""

    def __init__(self):
        super().__init__()
        self.tokens, self.tags, self._open = [], set(), False

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        attributes = dict(attributes)
        if "data-t" in attributes:
            self.tokens.append([attributes["class"].split(), attributes["data-t"].split(), ""])
            self._open = True

    def handle_endtag(self, tag):
        self._open = self._open and tag != "span"

    def handle_data(self, data):
        if self._open:
            self.tokens[-1][2] += data


def test_html_holds_every_token_with_its_id_position_and_label(batch, tokenizer):
    page = Page()
    page.feed(render_html(batch, tokenizer))
    shown = [token for row in read_rows(batch, tokenizer) for token in row.tokens if token.kind != "padding"]
    assert len(page.tokens) == len(shown)
    for (classes, data, text), token in zip(page.tokens, shown):
        assert data == [str(value) for value in (token.index, token.id, token.position, token.label)]
        assert token.kind in classes
        assert ("special" in classes) == token.special
        assert text == token.visible


def test_a_notebook_shows_the_same_tokens_and_runs_nothing(batch, tokenizer):
    hostile = packed(tokenizer, [("<b>\"'&", "</span><script>alert(1)</script><img src=x onerror=alert(1)>")], 96)
    shown = Preview([*batch, hostile], tokenizer, rows=3)
    part, page = Page(), Page()
    part.feed(shown._repr_html_())
    page.feed(render_html([*batch, hostile], tokenizer))
    assert part.tokens == page.tokens
    assert not part.tags & {"script", "img", "html", "body"}
    assert shown.counts == summarize([*batch, hostile])
    assert "⟦yes<|im_end|>⟧" in repr(shown)
    assert "\x1b[" not in repr(shown)
    one = Page()
    one.feed(Preview(batch, tokenizer)._repr_html_())
    assert one.tokens == page.tokens[: len(one.tokens)]
    assert 0 < len(one.tokens) < len(page.tokens)
    with pytest.raises(ValueError, match="rows=0"):
        Preview(batch, tokenizer, rows=0)


def test_html_escapes_everything_and_needs_nothing_else(tokenizer):
    batch = [packed(tokenizer, [("<i-am-a-tag>\"'&", "</span><script>alert(1)</script>")], 64)]
    html = render_html(batch, tokenizer)
    page = Page()
    page.feed(html)
    assert html.count("<script>") == 1  # the page's own
    assert "i-am-a-tag" not in page.tags
    assert "".join(text for _, _, text in page.tokens) == "<i-am-a-tag>\"'&</span><script>alert(1)</script>"
    assert not [word for word in ("http:", "https:", "src=", "@import", "url(") if word in html]


def test_preview_writes_the_page_and_returns_the_counts(batch, tokenizer, tmp_path, capsys):
    counts = preview(batch, tokenizer, html=tmp_path / "new" / "batch.html")
    assert counts == summarize(batch)
    assert (tmp_path / "new" / "batch.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "batch.html" in capsys.readouterr().out.replace("\n", "")
