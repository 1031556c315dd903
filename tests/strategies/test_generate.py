"""Generation with sharded weights: gathered once, and never older than the last optimizer step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from automodel_trainer.strategies.data_parallel import generate
from tests.harness import make_strategy
from tests.limits import close
from tests.pool import RankPool
from tests.tiny import tiny_model

PROMPT = torch.tensor([[7, 8, 9, 10]])


def answer(model: PreTrainedModel, tokens: int) -> Tensor:
    return model.generate(PROMPT, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=0)  # type: ignore[no-any-return, operator]


def start() -> PreTrainedModel:
    model = tiny_model("llama")
    for parameter in model.parameters():  # a tiny model's own weights hardly tell one token from another
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def steps(model: PreTrainedModel) -> dict[str, Any]:
    """An answer, one between backward and the optimizer step, and one after it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = answer(model, 3)
    model(input_ids=PROMPT, labels=PROMPT).loss.backward()
    between = answer(model, 6)
    optimizer.step()
    with torch.no_grad():
        logits = model(input_ids=PROMPT).logits
    return {"tokens": [first, between, answer(model, 6)], "logits": logits}


class Gathers(TorchDispatchMode):
    """Counts how often FSDP2 gathers."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "all_gather_copy_in" in str(func)
        return func(*args, **(kwargs or {}))


def gathers(model: PreTrainedModel, tokens: int) -> int:
    with Gathers() as mode:
        answer(model, tokens)
    return mode.count


def on_ranks(model: PreTrainedModel) -> dict[str, Any]:
    strategy = make_strategy("fsdp2", 2)
    strategy.parallelize(model)
    seen = steps(model)
    seen["gathers"] = [gathers(model, 2), gathers(model, 6)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "_fits", lambda size, group: False)
        seen["tight"] = [gathers(model, 2), gathers(model, 6), answer(model, 6)]
    return seen


def test_as_on_one_device(pool: RankPool) -> None:
    model = start()
    ranks = pool.run(2, on_ranks, copy.deepcopy(model))
    expected = steps(model)
    for seen in ranks:
        assert all(torch.equal(a, b) for a, b in zip(seen["tokens"], expected["tokens"], strict=True))
        close(seen["logits"], expected["logits"])
        assert seen["gathers"][0] == seen["gathers"][1] > 0
        few, many, tokens = seen["tight"]
        assert few < many
        assert torch.equal(tokens, expected["tokens"][2])
