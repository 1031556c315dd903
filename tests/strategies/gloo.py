"""Megatron-FSDP on CPU ranks: the package itself, buffers and collectives on gloo; only CUDA's streams are made up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch

from automodel_trainer.strategies.megatron import _megatron_fsdp


class Event:
    """What was recorded is over already: the CPU runs one thing after another."""

    def wait(self) -> None: ...


class Stream:
    def wait_stream(self, other: Any) -> None: ...

    def record_event(self) -> Event:
        return Event()


@contextmanager
def streams_on_cpu() -> Iterator[None]:
    """CUDA streams that do nothing, tensors that stay where they are, and no look for CUDA."""
    one = Stream()
    with (
        patch.object(torch.cuda, "Stream", Stream),
        patch.object(torch.cuda, "current_stream", lambda *_: one),
        patch.object(torch.cuda, "stream", lambda _: nullcontext()),
        patch.object(torch.cuda, "current_device", lambda: 0),
        patch.object(torch.Tensor, "cuda", lambda self: self),
        patch.object(_megatron_fsdp, "check_available", lambda _: None),
    ):
        yield
