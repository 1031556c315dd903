"""Measure time and error of every choice in the `kernels:` section on one GPU, at the shapes of llama 8B.

`python benchmarks/kernels.py` takes about two minutes on one H100. It needs `pip install
'automodel-trainer[te,liger,fp8]'`; for a library that is not installed it prints a line. It has two parts:

* kernels: forward and backward of one layer, as the median of CUDA events, and ‖out − ref‖/‖ref‖ of the output (first)
  and of every gradient, against plain torch in fp32 on the same bf16 values. It should be below 1e-2 for bf16 and below
  1e-1 for fp8 (3 or 2 bits of mantissa).
* model: two layers through `Trainer`, 5 steps. Losses must match eager fp32 within 1e-2 for bf16 and 3e-2 for fp8;
  otherwise the line says FAR.

What to look at: `FASTEST` in automodel_trainer/models/kernels/config.py should name the fastest of every section, if
its errors are like its neighbours'. `--parts kernels|model`, `--sections linear norm …`, `--seconds` for all together;
`--tiny` is for a CPU, where most choices say that they need a GPU.
"""

from __future__ import annotations

import argparse
import gc
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BIG = {"rows": 2, "length": 4096, "hidden": 4096, "inner": 14336, "heads": 32, "groups": 8, "width": 128}
BIG |= {"vocab": 128256}
TINY = {"rows": 2, "length": 64, "hidden": 64, "inner": 128, "heads": 4, "groups": 2, "width": 16, "vocab": 256}
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# A choice takes the bf16 inputs and returns what to run and the leaves to differentiate by.
Choice = Callable[[list[Tensor]], tuple[Callable[[], Any], list[Tensor]]]
Section = tuple[list[Tensor], Callable[..., Any], dict[str, Choice], float]
_deadline = float("inf")


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise a TimeoutError after the given time, or when the time of the whole run is over."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"stopped after {seconds:.0f} s")

    seconds = min(seconds, _deadline - time.monotonic())
    if seconds <= 0:
        raise TimeoutError("out of time")
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def report(section: str, name: str, text: str) -> None:
    print(f"{section:11} {name:22} {text}", flush=True)


# --- kernels ----------------------------------------------------------------------------------------------------------


def plain(function: Callable[..., Any]) -> Choice:
    """A choice that is a plain function of the inputs."""

    def choose(inputs: list[Tensor]) -> tuple[Callable[[], Any], list[Tensor]]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        return lambda: function(*leaves), leaves

    return choose


def made(make: Callable[[], Callable[..., Any]]) -> Choice:
    """A choice that must be created first, which may fail."""
    return lambda inputs: plain(make())(inputs)


def tensors(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def run_section(section: str, size: dict[str, int]) -> None:
    inputs, reference, choices, flops = SECTIONS[section](size)
    with limit(30):
        run, leaves = plain(reference)([x.float() for x in inputs])
        wanted = tensors(run())
        given = [torch.randn_like(out).bfloat16() for out in wanted]
        wanted_gradients = torch.autograd.grad(wanted, leaves, [g.float() for g in given])
        wanted = tuple(out.detach() for out in wanted)
    del run, leaves
    for name, choice in choices.items():
        try:
            with limit(25):
                began = time.monotonic()
                run, leaves = choice(inputs)
                out = tensors(run())
                gradients = torch.autograd.grad(out, leaves, [g.to(o.dtype) for g, o in zip(given, out)])
                errors = [distance(a, b) for a, b in zip((*out, *gradients), (*wanted, *wanted_gradients))]
                first = time.monotonic() - began
                del out, gradients
                milliseconds = median_ms(run, leaves, given)
        except Exception as error:
            report(section, name, f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
            continue
        rate = f", {flops / milliseconds / 1e9:.0f} TFLOP/s" if flops else ""
        far = " ".join(f"{e:.1e}" for e in errors)
        report(section, name, f"{milliseconds:8.3f} ms{rate}, errors {far}, first run {first:.1f} s")


def distance(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.detach().float(), wanted.reshape(found.shape)
    return float((found - wanted).norm() / wanted.norm())


def median_ms(run: Callable[[], Any], leaves: list[Tensor], given: list[Tensor], warm_up: int = 3) -> float:
    def once() -> None:
        out = tensors(run())
        torch.autograd.grad(out, leaves, [g.to(o.dtype) for g, o in zip(given, out)])

    times = []
    for i in range(warm_up + (15 if CUDA else 2)):
        if CUDA:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            once()
            end.record()
            end.synchronize()
            elapsed = begin.elapsed_time(end)
        else:
            began = time.perf_counter()
            once()
            elapsed = (time.perf_counter() - began) * 1e3
        times += [elapsed] if i >= warm_up else []
    return statistics.median(times)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE).bfloat16()


def linear(size: dict[str, int]) -> Section:
    from automodel_trainer.models.kernels.libraries._transformer_engine import LinearKernel

    tokens, hidden, inner = size["rows"] * size["length"], size["hidden"], size["inner"]

    def torchao(recipe: str) -> Choice:
        def choose(inputs: list[Tensor]) -> tuple[Callable[[], Any], list[Tensor]]:
            from torchao.float8 import Float8LinearConfig, convert_to_float8_training

            layer = nn.Linear(hidden, inner, bias=False, device="meta")
            layer.weight = nn.Parameter(inputs[1].clone())
            config = Float8LinearConfig.from_recipe_name(recipe)
            layers = torch.compile(convert_to_float8_training(nn.Sequential(layer), config=config))
            x = inputs[0].clone().requires_grad_()
            return lambda: layers(x), [x, layers.get_parameter("0.weight")]

        return choose

    def te(recipe: str | None) -> Choice:
        return made(lambda: LinearKernel(recipe))

    choices: dict[str, Choice] = {"torch": plain(F.linear), "te": te(None)}
    choices |= {f"te, {recipe}": te(recipe) for recipe in ("delayed", "current", "block")}
    choices |= {f"torchao, {recipe}": torchao(recipe) for recipe in ("tensorwise", "rowwise")}
    inputs = [random(tokens, hidden), random(inner, hidden) * hidden**-0.5]
    return inputs, F.linear, choices, 6.0 * tokens * hidden * inner


def norm(size: dict[str, int]) -> Section:
    from automodel_trainer.models.kernels.libraries._liger import LIGER
    from automodel_trainer.models.kernels.libraries._transformer_engine import TRANSFORMER_ENGINE
    from automodel_trainer.models.kernels.norm import Norm

    rms = Norm(centred=False, eps=1e-5)
    own = partial(rms.reference, bias=None)
    choices = {
        "eager": plain(own),
        "compile": made(lambda: torch.compile(own)),
        "liger": made(lambda: partial(called(LIGER.norm(rms)), bias=None)),
        "te": made(lambda: partial(called(TRANSFORMER_ENGINE.norm(rms)), bias=None)),
    }
    return [random(size["rows"], size["length"], size["hidden"]), 1 + 0.1 * random(size["hidden"])], own, choices, 0


def called(kernel: Any) -> Callable[..., Any]:
    """Check that this is a kernel, and not the reason why there is none."""
    if isinstance(kernel, str):
        raise ValueError(kernel)
    return kernel  # type: ignore[no-any-return]


def activation(size: dict[str, int]) -> Section:
    from automodel_trainer.models.kernels.libraries._liger import LIGER
    from automodel_trainer.models.kernels.mlp import GatedMLP

    def swiglu(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    liger = made(lambda: called(LIGER.activation(GatedMLP("silu", "gate", "up", "down"))))
    choices = {"eager": plain(swiglu), "compile": made(lambda: torch.compile(swiglu)), "liger": liger}
    return [random(size["rows"], size["length"], size["inner"]) for _ in range(2)], swiglu, choices, 0


def rope(size: dict[str, int]) -> Section:
    from automodel_trainer.models.kernels.libraries._liger import LIGER
    from automodel_trainer.models.kernels.rope import rotate_half

    angles = (torch.rand(size["rows"], size["length"], size["width"] // 2, device=DEVICE) * 6).repeat(1, 1, 2)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()

    def rotated(rotate: Callable[..., Any], q: Tensor, k: Tensor) -> Any:
        return rotate(q.transpose(1, 2), k.transpose(1, 2), cos.to(q.dtype), sin.to(q.dtype))

    own = partial(rotated, rotate_half)
    choices = {
        "eager": plain(own),
        "compile": made(lambda: torch.compile(own)),
        "liger": made(lambda: partial(rotated, LIGER.rope())),
    }
    shape = size["rows"], size["length"]
    return [random(*shape, size[n], size["width"]) for n in ("heads", "groups")], own, choices, 0


def attention(size: dict[str, int]) -> Section:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import flex_attention

    from automodel_trainer.models.kernels.attention import document_block_mask
    from automodel_trainer.models.kernels.registry import find

    layer = SimpleNamespace(num_key_value_groups=size["heads"] // size["groups"], is_causal=True)

    def through(name: str) -> Choice:
        library = find("attention", name)
        assert library is not None
        attend = library.attention()
        return plain(lambda q, k, v: attend(layer, q, k, v, None, scaling=size["width"] ** -0.5)[0])

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)

    def flex() -> Callable[..., Any]:
        one = document_block_mask(torch.zeros(size["rows"], size["length"], dtype=torch.int64, device=DEVICE))
        compiled = torch.compile(flex_attention)
        return lambda q, k, v: compiled(q, k, v, block_mask=one, enable_gqa=True).transpose(1, 2)

    choices = {"sdpa, its own choice": through("flex"), "cudnn": through("cudnn"), "flash": through("flash")}
    choices |= {"te": through("te"), "flex": made(flex), "eager": plain(eager)}
    rows, length, heads, width = (size[n] for n in ("rows", "length", "heads", "width"))
    inputs = [random(rows, size[n], length, width) for n in ("heads", "groups", "groups")]
    return inputs, eager, choices, 3.5 * 4 * rows * heads * width * length**2 / 2


def loss(size: dict[str, int]) -> Section:
    from automodel_trainer.models.kernels.libraries._liger import LIGER
    from automodel_trainer.modules.linear_cross_entropy import linear_cross_entropy

    tokens = size["rows"] * size["length"]
    targets = torch.randint(0, size["vocab"], (tokens,), device=DEVICE)
    targets[: tokens // 8] = -100

    def whole(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), targets, ignore_index=-100, reduction="sum")

    choices = {
        "whole": plain(whole),
        "chunked": plain(lambda hidden, weight: linear_cross_entropy(hidden, weight, None, targets)),
        "liger": plain(lambda hidden, weight: LIGER.loss()(hidden, weight, None, targets)),
    }
    inputs = [random(tokens, size["hidden"]), random(size["vocab"], size["hidden"]) * size["hidden"] ** -0.5]
    return inputs, whole, choices, 6.0 * tokens * size["hidden"] * size["vocab"]


SECTIONS: dict[str, Callable[[dict[str, int]], Section]] = {
    f.__name__: f for f in (linear, attention, norm, activation, rope, loss)
}

# --- two layers through the product -----------------------------------------------------------------------------------

MODELS: dict[str, dict[str, Any]] = {  # the first is the reference
    "eager fp32": {"precision": "32-true", "attention": "eager", "loss": "whole"},
    "auto, compiled": {"compile": True},
    "norm te, compiled": {"compile": True, "norm": "te"},
    "all te, compiled": {"compile": True, "attention": "te", "norm": "te", "linear": "te"},
    "all liger, compiled": {"compile": True, "norm": "liger", "activation": "liger", "rope": "liger", "loss": "liger"},
    "linear te": {"linear": "te"},
    "linear te, delayed": {"linear": "te", "fp8": "delayed"},
    "linear te, current": {"linear": "te", "fp8": "current"},
    "norm te": {"norm": "te"},
    "norm liger": {"norm": "liger"},
    "activation liger": {"activation": "liger"},
    "rope liger": {"rope": "liger"},
    "loss liger": {"loss": "liger"},
    "attention te": {"attention": "te"},
    "attention cudnn": {"attention": "cudnn"},
    "attention flash": {"attention": "flash"},
    "delayed, compiled": {"compile": True, "linear": "te", "fp8": "delayed"},
    "tensorwise, compiled": {"compile": True, "fp8": "tensorwise"},
    "linear te, block": {"linear": "te", "fp8": "block"},
}


def run_models(size: dict[str, int], names: list[str]) -> None:
    reference: list[float] = []
    for name in names or MODELS:
        options = dict(MODELS[name])
        try:
            with limit(45):
                began = time.monotonic()
                losses, tokens, text = train(size, options)
        except Exception as error:
            report("model", name, f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            continue
        finally:
            gc.collect()
            if CUDA:
                torch.cuda.empty_cache()
        reference = reference or losses
        far = max(abs(a - b) / b for a, b in zip(losses, reference))
        verdict = "ok" if far < (3e-2 if "fp8" in options else 1e-2) else "FAR"
        report("model", name, f"{tokens:9,.0f} tok/s, losses {' '.join(f'{x:.4f}' for x in losses)}, from eager fp32 "
               f"{far:.1e} {verdict}, {time.monotonic() - began:.1f} s in all; {text}")  # fmt: skip


def train(size: dict[str, int], options: dict[str, Any]) -> tuple[list[float], float, str]:
    """Losses of 5 steps, tokens per second of the last ones, and the kernels that the model reports."""
    import transformers
    from lightning.pytorch.callbacks import Callback

    from automodel_trainer import AutoModelForCausalLM, CausalLMModule, KernelsConfig, MockDataModule, Trainer
    from automodel_trainer.models.kernels import kernels_in_use

    shape = transformers.LlamaConfig(
        hidden_size=size["hidden"], intermediate_size=size["inner"], num_hidden_layers=2, head_dim=size["width"],
        num_attention_heads=size["heads"], num_key_value_heads=size["groups"], vocab_size=min(size["vocab"], 32000),
        max_position_embeddings=8192,
    )  # fmt: skip

    class Random(CausalLMModule):
        def _build(self) -> Any:
            return AutoModelForCausalLM.from_config(shape, self.strategy, seed=1, kernels=self.kernels)

    class Clock(Callback):
        losses: list[float] = []
        times: list[float] = []

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self.losses = [*self.losses, float(trainer.callback_metrics["train_loss"])]  # waits for the device
            self.times = [*self.times, time.perf_counter()]

    precision = options.pop("precision", "bf16")
    compiled = options.pop("compile", False)
    data = MockDataModule(
        vocab_size=shape.vocab_size, seq_len=size["length"], micro_batch_size=size["rows"],
        global_batch_size=size["rows"], num_samples=5 * size["rows"],
    )  # fmt: skip
    clock = Clock()
    trainer = Trainer(
        strategy=f"fsdp2:compile={'auto' if compiled else 'false'}", devices=1, precision=precision, max_steps=5,
        log_every_n_steps=1, default_root_dir=tempfile.mkdtemp(), callbacks=[clock], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, logger=False,
    )  # fmt: skip
    with torch.device("meta"):
        meta = transformers.AutoModelForCausalLM.from_config(shape)
    module = Random(meta, kernels=KernelsConfig(**options), lr=1e-4)
    trainer.fit(module, data)
    seconds = (clock.times[-1] - clock.times[1]) / 3
    used = {name: text for name, text in kernels_in_use(module.model).texts.items() if name in options}
    return clock.losses, size["rows"] * size["length"] / seconds, str(used)


def main() -> None:
    global _deadline
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", default=["kernels", "model"], choices=["kernels", "model"])
    parser.add_argument("--sections", nargs="*", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--models", nargs="*", default=[], choices=list(MODELS))
    parser.add_argument("--seconds", type=float, default=115)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    _deadline = time.monotonic() + args.seconds
    torch.manual_seed(0)
    size = TINY if args.tiny else BIG
    print(torch.cuda.get_device_name() if CUDA else "cpu", "torch", torch.__version__, size, flush=True)
    for section in args.sections if "kernels" in args.parts else []:
        try:
            run_section(section, size)
        except Exception as error:
            report(section, "", f"failed: {type(error).__name__}: {str(error)[:200]}")
    if "model" in args.parts:
        run_models(size, args.models)


if __name__ == "__main__":
    main()
