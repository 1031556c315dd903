"""Generation with sharded weights: gathered once, and never older than the last optimizer step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from automodel_trainer.strategies.data_parallel import generate
from tests.harness import make_strategy
from tests.limits import close
from tests.pool import RankPool
from tests.test_overhead import counted
from tests.tiny import tiny_model

PROMPT = torch.tensor([[7, 8, 9, 10]])


def answer(model: PreTrainedModel, tokens: int, **options: Any) -> Any:
    options = {"do_sample": False, "pad_token_id": 0, **options}
    return model.generate(PROMPT, min_new_tokens=tokens, max_new_tokens=tokens, **options)  # type: ignore[operator]


def sampled(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Tokens that were drawn, in training mode as TRL's trainers draw them, and their logits."""
    torch.manual_seed(1)
    with torch.no_grad():
        out = answer(model.train(), 6, do_sample=True, output_logits=True, return_dict_in_generate=True)
    return out.sequences, torch.stack(out.logits)


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


def calls_of_a_token(model: PreTrainedModel) -> float:
    """Function calls, Python's and C's."""
    seen = []
    for tokens in (2, 10):
        answer(model, tokens)
        with counted() as calls:
            answer(model, tokens)
        seen.append(calls[0])
    return (seen[1] - seen[0]) / 8


def on_ranks(model: PreTrainedModel) -> dict[str, Any]:
    strategy = make_strategy("fsdp2", 2)
    strategy.parallelize(model)
    seen = steps(model)
    own_length = 2 + 3 * dist.get_rank()
    seen["gathers"] = [gathers(model, 2), gathers(model, 6)]
    seen["sampled"], seen["uneven"] = sampled(model), [answer(model, own_length)]
    seen["calls"] = calls_of_a_token(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "_fits", lambda size, group: False)
        seen["tight"] = [gathers(model, 2), gathers(model, 6), answer(model, 6)]
        seen["uneven"].append(answer(model, own_length))
    return seen


def test_as_on_one_device(pool: RankPool) -> None:
    model = start()
    ranks = pool.run(2, on_ranks, copy.deepcopy(model))
    expected = steps(model)
    expected_sample, calls = sampled(model), calls_of_a_token(model)
    for seen in ranks:
        assert all(torch.equal(a, b) for a, b in zip(seen["tokens"], expected["tokens"], strict=True))
        close(seen["logits"], expected["logits"])
        assert seen["gathers"][0] == seen["gathers"][1] > 0
        few, many, tokens = seen["tight"]
        assert few < many
        assert torch.equal(tokens, expected["tokens"][2])
        assert torch.equal(seen["sampled"][0], expected_sample[0])
        close(seen["sampled"][1], expected_sample[1])
        assert seen["calls"] < calls + 5 * len(list(model.modules()))
    for rank, seen in enumerate(ranks):
        for tokens in seen["uneven"]:
            assert torch.equal(tokens, answer(model, 2 + 3 * rank))


def mixed(model: PreTrainedModel) -> list[tuple[Tensor, Tensor]]:
    """Samples in mixed precision, without FSDP2's hooks after the first token and with them."""
    model.model.rotary_emb.register_forward_hook(lambda module, args, output: tuple(x.double() for x in output))
    make_strategy("fsdp2", 2, "bf16-mixed").parallelize(model)
    seen = [sampled(model)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "_fits", lambda size, group: False)
        return [*seen, sampled(model)]


def test_inputs_are_cast_without_fsdp2_s_hooks(pool: RankPool) -> None:
    """Bit for bit. (The positions come in fp64, and blocks would compute in it.)"""
    for without, by_hooks in pool.run(2, mixed, start()):
        assert torch.equal(without[0], by_hooks[0])
        assert torch.equal(without[1], by_hooks[1])
