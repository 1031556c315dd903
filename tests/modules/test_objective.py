"""What an objective cannot do is refused by name. The objective is the one of docs/add_an_objective.md."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from automodel_trainer import ChatDataModule, FSDP2Strategy, HuggingFaceModule, KernelsConfig, Trainer
from automodel_trainer.connect import connect
from automodel_trainer.strategies import ParallelDims
from automodel_trainer.tools.generate import generate
from tests.test_add_an_objective import home, micro_batches, tags
from tests.test_trainer import quiet
from tests.tiny import tiny_model, tiny_tokenizer

__all__ = ["home"]  # a fixture


def test_other_data_is_refused(home: Path) -> None:
    """Chat data labels tokens with token ids, of which a tagger knows none."""
    module = tags(home).TokenClassification(str(home / "start"))
    with pytest.raises(ValueError, match="learns other labels"):
        connect(module, ChatDataModule([{"messages": [{"role": "user", "content": "a"}]}]), None)


def test_another_kind_of_model_is_refused(home: Path, tmp_path: Path) -> None:
    module = tags(home).TokenClassification(tiny_model("qwen3"))
    with pytest.raises(ValueError, match="AutoModelForCausalLM builds a Qwen3ForCausalLM"):
        Trainer(**quiet(tmp_path, max_steps=1)).fit(module, [micro_batches(home, 0)])


def test_a_loss_kernel_without_effect_is_refused(home: Path, tmp_path: Path) -> None:
    module = tags(home).TokenClassification(str(home / "start"), kernels=KernelsConfig(loss="chunked"))
    with pytest.raises(ValueError, match="has a loss of its own"):
        Trainer(**quiet(tmp_path, max_steps=1)).fit(module, [micro_batches(home, 0)])


def test_an_objective_without_an_auto_class() -> None:
    with pytest.raises(ValueError, match="set auto_class"):
        HuggingFaceModule("anything")


def test_split_sequences_need_targets_per_token(home: Path, tmp_path: Path) -> None:
    class Whole(tags(home).TokenClassification):  # type: ignore[misc]
        targets_per_token = False

    class Split(FSDP2Strategy):
        dims = ParallelDims(cp=2)  # type: ignore[assignment]

    module = Whole(str(home / "start"))
    module.__dict__["_trainer"] = SimpleNamespace(strategy=Split())
    with pytest.raises(ValueError, match="targets_per_token=False"):
        module._check_options()


def test_generate_is_refused(home: Path) -> None:
    """A tagger's folder has no text to give."""
    tiny_tokenizer().save_pretrained(home / "start")
    with pytest.raises(ValueError, match="does not generate text"):
        generate(home / "start", prompt="hello", device="cpu")
