"""The loss in chunks against plain logits and `F.cross_entropy`: values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

from automodel_trainer.modules import linear_cross_entropy as chunks
from automodel_trainer.modules.linear_cross_entropy import linear_cross_entropy
from automodel_trainer.modules.loss import losses_and_predictions, summed_loss, token_losses
from automodel_trainer.nn.deferred_logits import DeferredLogits, defer_logits, deferred_logits
from tests.harness import close

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"vocab_size": 300, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    def seven(*_: Any) -> int:
        return 7

    monkeypatch.setattr(chunks, "chunk_rows", seven)
    monkeypatch.setattr("automodel_trainer.modules.loss.chunk_rows", seven)


def _relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 23])
def test_linear_cross_entropy(dtype: torch.dtype, bound: float, bias: bool, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    shapes = [(rows, 32), (50, 32), (50,)]
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]
    targets = torch.randint(50, (rows,), generator=generator)
    targets[1::3] = -100
    hidden, weight, offset = inputs
    loss = linear_cross_entropy(hidden, weight, offset if bias else None, targets)
    ours = torch.autograd.grad(loss * 0.5, inputs[: 2 + bias])

    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    logits = F.linear(exact[0], exact[1], exact[2] if bias else None)
    wanted = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    reference = torch.autograd.grad(wanted * 0.5, exact[: 2 + bias])
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert _relative(loss, wanted) < bound
    for got, want in zip(ours, reference):
        assert got.dtype == dtype
        assert _relative(got, want) < bound


def test_nothing_is_trained() -> None:
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, None, torch.full((5,), -100))
    loss.backward()
    assert loss == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_certain_prediction_keeps_its_gradient_in_bf16() -> None:
    """p rounds to 1 in bf16; p − 1 must not round to 0."""
    hidden = torch.tensor([[7.0]], dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]], dtype=torch.bfloat16)
    linear_cross_entropy(hidden, weight, None, torch.tensor([0])).backward()
    assert hidden.grad is not None
    assert float(hidden.grad) == pytest.approx(-1 / (1 + torch.e**7), rel=1e-2)


def test_frozen_head_gets_no_gradient() -> None:
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8)
    linear_cross_entropy(hidden, weight, None, torch.arange(5)).backward()
    assert weight.grad is None
    assert hidden.grad is not None


MODELS: dict[str, Callable[[], Any]] = {
    "plain": lambda: LlamaConfig(**SIZES, tie_word_embeddings=False),
    "tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "soft cap": lambda: Gemma2Config(**SIZES, final_logit_softcapping=2.0),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    """The same loss and gradients as with whole logits, whatever the model does to them."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name](), attn_implementation="eager").double()
    ids = torch.randint(300, (3, 9))
    targets = F.pad(ids[:, 1:], (0, 1), value=-100)
    targets[0, :4] = -100
    logits = model(input_ids=ids).logits
    wanted = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    wanted.backward()
    reference = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    defer_logits(model)
    assert isinstance(model(input_ids=ids).logits, Tensor), "logits are deferred only where that is asked for"
    with deferred_logits():
        deferred = model(input_ids=ids).logits
    assert isinstance(deferred, DeferredLogits)
    assert (deferred.plain_weight is None) == (name == "soft cap")
    close(deferred.whole(), logits)
    losses, predictions = losses_and_predictions(deferred, targets)
    close(losses.sum(), wanted)
    torch.testing.assert_close(predictions, logits.argmax(-1).flatten())
    close(token_losses(deferred, targets), token_losses(logits, targets))
    loss = summed_loss(deferred, targets)
    loss.backward()
    close(loss, wanted)
    for key, parameter in model.named_parameters():
        close(parameter.grad, reference[key])


def test_other_uses_get_real_logits() -> None:
    head = nn.Linear(8, 11)
    hidden = torch.randn(2, 3, 8)
    deferred = DeferredLogits(hidden, head.forward, head)
    real = head(hidden)
    close(deferred[:, -1], real[:, -1])
    close(torch.softmax(deferred, -1), real.softmax(-1))  # type: ignore[call-overload]
    torch.testing.assert_close(deferred.argmax(-1), real.argmax(-1))
    close((2 * deferred / 3).float().whole(), 2 * real / 3)
    close(deferred * real, real * real)
    assert deferred.shape == real.shape
