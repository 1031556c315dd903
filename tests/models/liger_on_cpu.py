"""Liger's own kernels, run by Triton's interpreter, against plain torch; prints relative errors as JSON.

A program of its own (`test_liger.py` runs it): Triton decides when it is imported whether it interprets, and where it
is importable torch and transformers behave otherwise.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.beside import folder_of

sys.path += [str(folder_of("triton")), str(folder_of("liger_kernel"))]

import triton.language as tl
from liger_kernel.ops import geglu, layer_norm, rms_norm
from triton.runtime import interpreter

from automodel_trainer.models.kernels.libraries._liger import LIGER
from automodel_trainer.models.kernels.library import LossKernel
from automodel_trainer.models.kernels.mlp import ACTIVATIONS, GatedMLP, swap_gated_mlps
from automodel_trainer.models.kernels.norm import Norm, swap_norms
from automodel_trainer.models.kernels.rope import restore_rope, rotate_half, swap_rope
from automodel_trainer.modules.loss import summed_loss
from automodel_trainer.nn.deferred_logits import DeferredLogits
from tests.tiny import tiny_model

CPU = torch.device("cpu")
Errors = dict[str, list[float]]


def teach_the_interpreter() -> None:
    """It hands Python's floats to kernels as they are, and does not know the functions of CUDA's library."""
    convert = interpreter._implicit_cvt

    def with_floats(value: Any) -> Any:
        if type(value) is not float:
            return convert(value)
        return tl.tensor(interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)

    interpreter._implicit_cvt = with_floats
    rms_norm.rsqrt = layer_norm.rsqrt = lambda x: tl.math.rsqrt(x)
    geglu.tanh = lambda x: 2 * tl.sigmoid(2 * x) - 1


def compare(found: Callable[..., Any], wanted: Callable[..., Any], *inputs: Tensor) -> list[float]:
    """Relative errors of outputs, then of the gradients by every input, in fp32: the interpreter cannot do bf16."""
    results = []
    for function in (found, wanted):
        leaves = [x.clone().requires_grad_() for x in inputs]
        # copies: some kernels write into what they are given
        out = function(*(x * 1 for x in leaves))
        out = out if isinstance(out, tuple) else (out,)
        generator = torch.Generator().manual_seed(1)
        given = [torch.randn(o.shape, generator=generator) for o in out]
        kept = [o.detach().clone() for o in out]
        results.append([*kept, *torch.autograd.grad(out, leaves, given)])
    return [float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in zip(*results)]


def norms(errors: Errors) -> None:
    cases = {
        "rms": Norm(False, 1e-6),
        "rms, wide": Norm(False, 1e-5, wide=True),
        "rms, around zero": Norm(False, 1e-6, 1.0, wide=True),
        "layer": Norm(True, 1e-5, wide=True),
    }
    for name, norm in cases.items():
        kernel: Any = LIGER.norm(norm)
        x, weight, bias = torch.randn(3, 7, 48), torch.randn(48), torch.randn(48)
        errors[f"{name}"] = compare(partial(kernel, bias=None), partial(norm.reference, bias=None), x, weight)
        if norm.centred:
            errors[f"{name} with bias"] = compare(kernel, norm.reference, x, weight, bias)


def gates(errors: Errors) -> None:
    for name, activation in ACTIVATIONS.items():
        kernel: Any = LIGER.activation(GatedMLP(name, "gate", "up", "down"))
        gate, up = torch.randn(2, 3, 5, 72)
        errors[f"{name}"] = compare(kernel, lambda a, b, f=activation: f(a) * b, gate, up)


def rope(errors: Errors) -> None:
    q, k = torch.randn(2, 4, 7, 16), torch.randn(2, 2, 7, 16)
    angles = torch.randn(2, 7, 8).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    kernel = LIGER.rope()
    errors["rope"] = compare(lambda q, k: kernel(q, k, cos, sin), lambda q, k: rotate_half(q, k, cos, sin), q, k)


def losses(errors: Errors) -> None:
    for name, ignored in {"some ignored": slice(3, 9), "none ignored": slice(0, 0), "all ignored": slice(None)}.items():
        targets = torch.randint(0, 40, (13,))
        targets[ignored] = -100

        def liger(hidden: Tensor, weight: Tensor, targets: Tensor = targets) -> Tensor:
            return LIGER.loss()(hidden, weight, None, targets)

        def whole(hidden: Tensor, weight: Tensor, targets: Tensor = targets) -> Tensor:
            return F.cross_entropy(F.linear(hidden, weight), targets, ignore_index=-100, reduction="sum")

        errors[f"loss, {name}"] = compare(liger, whole, torch.randn(13, 24), torch.randn(40, 24))


def models(errors: Errors) -> None:
    """Loss, and all gradients together, of small models with everything swapped, odd lengths and ignored labels."""
    ids = torch.randint(5, 260, (2, 11))
    targets = ids.roll(-1, 1)
    targets[0, 4:] = -100
    for family, layers in (("llama", 2), ("qwen3", 1), ("gemma3_text", 1)):
        results = []
        for swapped in (False, True):
            model = tiny_model(family, num_hidden_layers=layers).train()
            kind = "whole"
            if swapped:
                counts = [
                    len(swap_norms(model, LIGER.norm)[0]),
                    len(swap_gated_mlps(model, LIGER.activation)[0]),
                ]
                counts.append(len(swap_rope(model, LIGER.rope(), CPU)))
                assert all(counts), counts
                kind = "liger"
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
            head = model.get_output_embeddings()
            logits: Any = DeferredLogits(hidden, head.forward, head) if kind == "liger" else head(hidden)
            loss = summed_loss(logits, targets, LossKernel("liger", LIGER.loss()) if kind == "liger" else None)
            loss.backward()
            results.append(
                [loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])]
            )
            restore_rope(model)
        errors[f"model, {family}"] = [float((a - b).norm() / b.norm()) for a, b in zip(*results[::-1])]


def main() -> None:
    teach_the_interpreter()
    torch.manual_seed(0)
    errors: Errors = {}
    for part in (norms, gates, rope, losses):
        part(errors)
    models(errors)
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
