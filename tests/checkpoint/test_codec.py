from __future__ import annotations

import json
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from automodel_trainer.checkpoint.codec import decode, encode


def through_json(value: Any) -> Any:
    return decode(json.loads(json.dumps(encode(value), allow_nan=False)))


_LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
_STATE = st.recursive(
    _LEAVES,
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.just("__tuple__"), inner)
        | st.dictionaries(st.integers(), inner)
    ),
    max_leaves=20,
)


@given(_STATE)
def test_state_comes_back_as_it_was(value: Any) -> None:
    back = through_json(value)
    assert back == value
    assert repr(back) == repr(value)  # tuples stay tuples, 1 stays an int, -0.0 its sign


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8])
@pytest.mark.parametrize("shape", [(), (0,), (2, 3), (1, 0, 2)])
def test_tensors_come_back_exactly(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.randn(shape) * 100).to(dtype)
    back = through_json({"score": tensor})["score"]
    assert back.dtype == dtype
    assert back.shape == tensor.shape
    assert torch.equal(back, tensor)


def test_what_json_lacks() -> None:
    value = {"inf": -math.inf, "path": Path("a/b"), "dtype": torch.bfloat16, "device": torch.device("cpu"), "s": {1, 2}}
    assert through_json(value) == value
    assert math.isnan(through_json(math.nan))
    assert torch.isnan(through_json(torch.tensor(math.nan)))
    assert through_json(np.float32(0.5)) == 0.5
    assert through_json(OrderedDict(a=1)) == {"a": 1}


@pytest.mark.parametrize("value", [object(), lambda: 0, torch.nn.Linear(1, 1), b"bytes", torch.zeros(1_000_001)])
def test_other_values_are_refused_by_name(value: Any) -> None:
    with pytest.raises(ValueError, match=r"callbacks.EarlyStopping\[1\] is a "):
        encode({"EarlyStopping": [0, value]}, "callbacks")
