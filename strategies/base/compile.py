"""Per-block compilation: every block of a model runs as one compiled function, which blocks of one shape share.

The graph holds what a block computes, not how it is laid out. FSDP2's hooks and the collectives of tensor parallel at
a block's edges stay outside; activation checkpointing is inside. Only training is compiled: evaluation has other
shapes, and `generate` has a new one for every token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import copy_context
from functools import partial
from threading import Thread
from typing import Any, Literal

import torch
from torch import Tensor, nn

from automodel_trainer.imports import importing
from automodel_trainer.models.kernels.tower_attention import attends_in_one_call, reads_boundaries
from automodel_trainer.models.lora.fuse import fused_groups
from automodel_trainer.models.lora.fused import FusedGroup, refresh
from automodel_trainer.models.record import CompiledBlock, record_of
from automodel_trainer.nn._torch import (
    FAST_MATH,
    allow_side_effects_in_checkpoints,
    import_compiler,
    keep_autograd_functions,
    prefer_recomputing,
    raise_recompile_limit,
)
from automodel_trainer.nn.blocks import find_blocks
from automodel_trainer.nn.float_tensors import is_float
from automodel_trainer.nn.operators import key_by_operators
from automodel_trainer.nn.wrap import Forward, own_forward


def wants_compile(asked: bool | Literal["auto"], backend: str, device: torch.device) -> bool:
    """Whether to compile on this device.

    Raises:
        ValueError: `asked` is unknown, or it is True and the inductor has no GPU to compile for.
    """
    if asked not in (True, False, "auto"):
        raise ValueError(f"compile={asked!r} is unknown. Allowed: true, false, auto.")
    gpu = device.type == "cuda"
    if asked is True and backend == "inductor" and not gpu:
        raise ValueError(
            f"compile=True makes GPU kernels, and this run is on {device.type}. Use compile='auto', or set "
            "compile_backend='aot_eager' to test whether the model compiles at all."
        )
    return asked is True or (asked == "auto" and gpu)


@contextmanager
def compiler_imported(wanted: bool) -> Iterator[None]:
    """A context that reads weights. If `wanted`, a thread imports the compiler meanwhile; it ends before the context.

    The interpreter is idle while weights are read, and the first compiled call would import for seconds. The thread
    must have ended before another process is forked, which would inherit modules that are half imported.
    """
    # torch keeps its settings in the context: the thread must see those of this one
    thread = Thread(target=copy_context().run, args=(_import_quietly,), name="import of the compiler", daemon=True)
    if wanted:
        thread.start()
    try:
        yield
    finally:
        if wanted:
            thread.join()


def _import_quietly() -> None:
    with suppress(Exception), importing():  # the first compiled call imports it again, and raises what there is to say
        import_compiler()


def compile_blocks(
    model: nn.Module,
    backend: str | Callable[..., Any] = "inductor",
    blocks: Sequence[nn.Module] | None = None,
    options: dict[str, Any] | None = None,
) -> int:
    """Compile the training forward of every block of `model`, in place. Names and types do not change.

    Call it after activation checkpointing is applied and before tensor parallel or FSDP2.

    Args:
        backend: passed to `torch.compile`.
        blocks: the blocks to compile; None: all of the model's.
        options: passed to `torch.compile`. None: `{"use_fast_math": True}` for the inductor, which uses the GPU's fast
            exp. Its error is up to 2 + 1.2·|x| units in the last place of fp32. (The loss always uses it.)

    Returns:
        the number of blocks.

    Raises:
        ValueError: the model has no blocks to compile.
    """
    blocks = find_blocks(model) if blocks is None else blocks
    if not blocks:
        raise ValueError(
            f"compile=True compiles a model block by block, and {type(model).__name__} has no list of blocks "
            "(nn.ModuleList). Set compile=False."
        )
    raise_recompile_limit()
    key_by_operators()
    keep_autograd_functions()
    allow_side_effects_in_checkpoints()
    prefer_recomputing()
    options = effective_options(backend, options)
    compiled = _compiled(_run, backend, options)
    blocks = [*filter(_can_be_compiled, blocks)]
    if any(map(reads_boundaries, blocks)):
        for_any_length = _compiled(_run_any_length, backend, options, dynamic=True)
    for block in blocks:
        record_of(block).keep(CompiledBlock())  # LoRA fuses the layers of such blocks
        run = for_any_length if reads_boundaries(block) else compiled
        block.forward = _Compiled(block, own_forward(block), run)  # type: ignore[method-assign, assignment]
    return len(blocks)


def compiled_call(backend: str, options: dict[str, Any] | None) -> Callable[..., Any]:
    """A function that calls its first argument with the others, compiled. It is for tiles of blocks' MLPs."""
    return torch.compile(_run_tile, backend=backend, options=effective_options(backend, options))


def compile_any_length(
    backend: str | Callable[..., Any] = "inductor", options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """A compiled `run(forward, *args, **kwargs)` for parts whose inputs have another length at each call.

    Dynamo sees at the second call which sizes change, and compiles once more for all of them.
    """
    return torch.compile(_run_part, backend=backend, options=effective_options(backend, options))


def effective_options(backend: str | Callable[..., Any], options: dict[str, Any] | None) -> dict[str, Any] | None:
    """The options that blocks are compiled with: `options`, or the inductor's default if they are None."""
    return FAST_MATH if options is None and backend == "inductor" else options


def _compiled(
    run: Callable[..., Any], backend: str | Callable[..., Any], options: dict[str, Any] | None, **more: Any
) -> Callable[..., Any]:
    """`torch.compile`. With this project's own options it is called later, because it imports all of the inductor.

    What a user gives is checked at once.
    """
    compile = partial(torch.compile, run, backend=backend, options=options, **more)
    return _AtFirstCall(compile) if options is FAST_MATH else compile()


class _AtFirstCall:
    """A function that is made when it is first called."""

    def __init__(self, make: Callable[[], Callable[..., Any]]) -> None:
        self.make = make
        self.made: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.made is None:
            self.made = self.make()
        return self.made(*args, **kwargs)


def _can_be_compiled(block: nn.Module) -> bool:
    """Whether a block computes alike for all batches.

    Blocks of some vision towers are told where pictures begin. transformers' `sdpa` cuts its input there, so every
    number of pictures would be a graph of its own.
    """
    return not reads_boundaries(block) or attends_in_one_call(block)


def _run(forward: Forward, *args: Any, **kwargs: Any) -> Any:
    """The one function that all blocks share: dynamo compiles it once for each kind of block."""
    return forward(*args, **kwargs)


def _run_any_length(forward: Forward, *args: Any, **kwargs: Any) -> Any:
    """The same for blocks of towers: each batch has another number of patches. Dynamo keeps graphs by function."""
    return forward(*args, **kwargs)


def _run_tile(forward: Forward, x: Any) -> Any:
    """The same for tiles of MLPs."""
    return forward(x)


def _run_part(forward: Forward, *args: Any, **kwargs: Any) -> Any:
    """The same for a part of a block that runs between collectives, such as split experts."""
    return forward(*args, **kwargs)


class _Compiled:
    """A block's forward: compiled in training, eager in evaluation and where no gradient is wanted.

    Other libraries generate in training mode, without gradients: a graph for each length would be compiled.
    """

    def __init__(self, block: nn.Module, forward: Forward, compiled: Callable[..., Any]) -> None:
        self.block, self.forward, self.compiled = block, forward, compiled
        self.fused: list[FusedGroup] | None = None  # found at the first call, once the weights are real
        self.held: list[dict[str, nn.Parameter | None]] = []  # the parameters that each of its modules holds

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.block.training and torch.is_grad_enabled()):
            return self.forward(*args, **kwargs)
        if self.fused is None:
            self.fused = fused_groups(self.block)
            self.held = [module._parameters for module in self.block.modules() if module._parameters]
        refresh(self.fused)  # outside of the graph: it copies updated adapters once per optimizer step
        if args and is_float(args[0]) and not args[0].requires_grad and self._is_trained():
            args = (_with_gradient(args[0]), *args[1:])
        return self.compiled(self.forward, *args, **kwargs)

    def _is_trained(self) -> bool:
        """Whether the block trains anything now. Those of a frozen tower ask at each call: modules are not walked."""
        return any(found is not None and found.requires_grad for held in self.held for found in held.values())


def _with_gradient(x: Tensor) -> Tensor:
    """`x`, as if something before it were trained.

    The first block behind frozen embeddings then runs the graph of all others, and no second one is compiled. Its
    backward computes a gradient that nobody needs, of one matmul.
    """
    return _Frozen.apply(x.new_empty(0, requires_grad=True), x)


class _Frozen(torch.autograd.Function):
    """Gives back its second argument, and wants a gradient that it drops."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return None, None
