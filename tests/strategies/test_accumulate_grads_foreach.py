"""Gradients of several backwards, added at once, against autograd, which adds them one by one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from automodel_trainer.strategies.data_parallel.accumulate_grads_foreach import accumulate_grads_foreach
from tests.harness import close


def backward(layers: nn.ModuleList, seed: int, used: slice = slice(None)) -> None:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
    for layer in layers[used]:
        x = layer(x).tanh()
    x.square().sum().backward()


def layers() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(4, 4) for _ in range(3))


def test_sums_are_autograd_s() -> None:
    """Some parameters have no gradient in some of the backwards."""
    uses = [slice(1), slice(None), slice(1, None), slice(None)]
    plain, model = layers(), layers()
    parameters = list(model.parameters())
    for seed, used in enumerate(uses):
        backward(plain, seed, used)
        with accumulate_grads_foreach(parameters):
            backward(model, seed, used)
    for expected, parameter in zip(plain.parameters(), parameters):
        assert parameter.grad is not None
        close(parameter.grad, expected.grad)


def test_each_backward_writes_gradients_of_its_own() -> None:
    model = layers()
    seen: list[torch.Tensor] = []
    with accumulate_grads_foreach(list(model.parameters())):
        backward(model, 0)
    before = model[0].weight.grad
    model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    with accumulate_grads_foreach(list(model.parameters())):
        backward(model, 0)
    close(seen[0] * 2, model[0].weight.grad)  # the hook saw the second alone
    assert model[0].weight.grad is before


def test_what_was_there_survives_a_backward_that_fails() -> None:
    model = layers()
    backward(model, 0)
    wanted = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    with pytest.raises(RuntimeError, match="out of memory"), accumulate_grads_foreach(list(model.parameters())):
        raise RuntimeError("out of memory")
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), wanted) if p.grad is not None)
