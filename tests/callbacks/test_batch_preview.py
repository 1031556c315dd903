from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from automodel_trainer.callbacks import BatchPreview
from tests.tiny import tiny_tokenizer


def micro_batch(text="abc"):
    ids = torch.tensor([tiny_tokenizer()(text)["input_ids"]])
    return {"input_ids": ids, "labels": ids.clone(), "position_ids": torch.arange(ids.shape[1])[None]}


def start(callback, batch, rank=0, tokenizer=True):
    trainer = SimpleNamespace(is_global_zero=rank == 0)
    module = SimpleNamespace(tokenizer=tiny_tokenizer() if tokenizer else None)
    callback.on_train_batch_start(trainer, module, batch, batch_idx=0)


def test_prints_the_first_batch_once(capsys, tmp_path):
    callback = BatchPreview(html=str(tmp_path / "batch.html"))
    start(callback, [micro_batch("first"), micro_batch("other")])
    text = capsys.readouterr().out
    assert "first" in text
    assert "other" not in text
    assert "2 micro-batches" in text
    assert "batch" in (tmp_path / "batch.html").read_text()
    start(callback, [micro_batch("second")])
    assert capsys.readouterr().out == ""


def test_prints_as_many_rows_as_asked(capsys):
    start(BatchPreview(rows=2), [micro_batch("first"), micro_batch("other"), micro_batch("third")])
    text = capsys.readouterr().out
    assert "other" in text
    assert "third" not in text


def test_other_ranks_print_nothing(capsys):
    start(BatchPreview(), [micro_batch()], rank=1)
    assert capsys.readouterr().out == ""


def test_a_single_dict_is_one_micro_batch(capsys):
    start(BatchPreview(), micro_batch("single"))
    assert "single" in capsys.readouterr().out


def test_what_it_cannot_show_it_says(capsys):
    with pytest.warns(UserWarning, match="tokenizer"):
        start(BatchPreview(), [micro_batch()], tokenizer=False)
    with pytest.warns(UserWarning, match="input_ids"):
        start(BatchPreview(), [torch.zeros(2)])
    assert capsys.readouterr().out == ""


def test_no_rows_is_refused():
    with pytest.raises(ValueError, match="rows=0"):
        BatchPreview(rows=0)
