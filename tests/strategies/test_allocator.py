"""A GPU's memory is handed out in segments that grow, unless the user has said otherwise to torch."""

from __future__ import annotations

import pytest
import torch

from automodel_trainer.callbacks import Ledger
from automodel_trainer.callbacks.ledger_text import ledger_rows
from automodel_trainer.nn._torch import set_allocator
from automodel_trainer.strategies.base import allocator
from automodel_trainer.strategies.base.allocator import EXPANDABLE, VARIABLES, allocator_of, configure_allocator
from tests.callbacks.test_ledger import fit, tiny_model

GPU = torch.device("cuda", 0)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    settings: list[str] = []
    monkeypatch.setattr(allocator, "set_allocator", settings.append)
    return settings


def test_segments_grow_on_a_gpu(given: list[str]) -> None:
    configure_allocator(torch.device("cpu"))
    assert given == []
    configure_allocator(GPU)
    assert given == [EXPANDABLE]
    assert allocator_of(torch.device("cpu")) is None


@pytest.mark.parametrize("name", VARIABLES)
def test_what_the_user_told_torch_stays(name: str, given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:512")
    configure_allocator(GPU)
    assert given == []
    assert allocator_of(GPU) == "max_split_size_mb:512"


def test_torch_knows_the_setting() -> None:
    set_allocator(EXPANDABLE)
    with pytest.raises(ValueError, match="'True' or 'False'"):
        set_allocator("expandable_segments:perhaps")


def test_the_ledger_says_so(tmp_path: object) -> None:
    facts = fit(tiny_model(), Ledger(), tmp_path).facts
    assert "memory" not in dict(ledger_rows(facts))  # on a CPU there is nothing to say
    facts["run"]["allocator"] = EXPANDABLE
    assert dict(ledger_rows(facts))["memory"] == (
        "expandable_segments:True; garbage collected every 10 steps, on all ranks at once"
    )
