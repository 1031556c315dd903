"""Decoding steps that are recorded and replayed. A CPU has no graphs: a stand-in runs what a graph would replay."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from automodel_trainer.models._decode import can_record, recorded_decoding
from automodel_trainer.nn._torch import pytree
from automodel_trainer.nn.recorded_call import Call, RecordedCall, Replay
from tests.tiny import tiny_model

PROMPT = torch.tensor([[7, 8, 9, 10], [0, 0, 11, 12]])


class StandIn:
    """Records as a GPU does: recording runs nothing, and a replay reads and writes the same tensors each time."""

    def __init__(self) -> None:
        self.records = self.replays = 0
        self.made: list[RecordedCall] = []

    def make(self, function: Any, held: Any) -> RecordedCall:
        self.held = held
        self.made.append(RecordedCall(function, held, warm_up=lambda call: (call(), True), record=self.record))
        return self.made[-1]

    def record(self, call: Call) -> tuple[Any, Replay]:
        self.records += 1
        before = [tensor.clone() for tensor in self.held()]
        output = call()
        for tensor, value in zip(self.held(), before, strict=True):
            tensor.copy_(value)
        tensors = [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor)]
        for tensor in tensors:
            tensor.fill_(float("nan"))

        def replay() -> None:
            self.replays += 1
            for tensor, value in zip(tensors, pytree.tree_leaves(call()), strict=False):
                tensor.copy_(value)

        return output, replay


def start() -> PreTrainedModel:
    model = tiny_model("llama")
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def answer(model: PreTrainedModel, **options: Any) -> Any:
    torch.manual_seed(1)
    options = {"cache_implementation": "static", "output_logits": True, "return_dict_in_generate": True, **options}
    sizes = {"min_new_tokens": 8, "max_new_tokens": 8, "pad_token_id": 0}
    mask = (PROMPT != 0).long()
    return model.generate(PROMPT, attention_mask=mask, **sizes, **options)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("options", "replays"),
    [
        ({}, 6),  # of eight tokens, one comes from the prompt and one from the call that runs as it is
        ({"do_sample": True}, 6),
        ({"num_beams": 2}, 0),  # beams are reordered into another cache
        ({"cache_implementation": "dynamic"}, 0),
        ({"output_hidden_states": True}, 0),
    ],
)
def test_replayed_steps_are_transformers_own(options: dict[str, Any], replays: int) -> None:
    model, stand_in = start(), StandIn()
    expected = answer(model, **options)
    with recorded_decoding(model, stand_in.make):
        for _ in range(2):  # a second answer has another cache
            found = answer(model, **options)
            assert torch.equal(found.sequences, expected.sequences)
            assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))
    assert stand_in.replays == 2 * replays
    assert stand_in.records == (2 if replays else 0)
    assert "forward" not in vars(model)
    assert can_record(model)


def test_caches_that_count_in_python_are_not_recorded() -> None:
    model, stand_in = tiny_model("mistral", sliding_window=4), StandIn()
    expected = answer(model)
    with recorded_decoding(model, stand_in.make):
        assert torch.equal(answer(model).sequences, expected.sequences)
    assert stand_in.records == 0
    assert [call.given_up for call in stand_in.made] == [True]


def test_a_model_that_cannot_be_recorded_is_not_tried_again() -> None:
    model = start()
    expected = answer(model)
    with recorded_decoding(model, partial(RecordedCall, warm_up=lambda call: (call(), False))):
        assert torch.equal(answer(model).sequences, expected.sequences)
    assert not can_record(model)


def test_calls_that_differ_run_as_they_are() -> None:
    def double(x: Tensor, factor: int) -> Tensor:
        return x * factor

    def fails(call: Call) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    made = partial(RecordedCall, double, list, warm_up=lambda call: (call(), True))
    refused = made(record=fails)
    assert [int(refused(x=torch.tensor(i), factor=2)) for i in range(4)] == [0, 2, 4, 6]
    assert refused.given_up
    assert refused.refused
    stand_in = StandIn()
    stand_in.held = list
    for other in ({"x": torch.ones(2), "factor": 2}, {"x": torch.ones(()), "factor": 3}):
        recorded = made(record=stand_in.record)
        assert [int(recorded(x=torch.tensor(float(i)), factor=2)) for i in range(4)] == [0, 2, 4, 6]
        assert torch.equal(recorded(**other), double(**other))
        assert recorded.given_up
    assert stand_in.replays == 6
