"""Activation checkpointing: recompute a block's activations in backward instead of keeping them.

What it keeps, the inputs of blocks, can lie in host memory until then (`offload_inputs`). A `Switch` says what a block
does, and can be set anew between two steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from automodel_trainer.models.quantization.fp8_layers import fp8_layers
from automodel_trainer.models.record import record_of, recorded
from automodel_trainer.nn import _torch
from automodel_trainer.nn._torch import CHECKPOINT_MISSES_FUNCTIONS, EXPENSIVE_OPERATIONS, MATMULS, pytree
from automodel_trainer.nn.blocks import find_blocks
from automodel_trainer.nn.kept_results import contexts
from automodel_trainer.nn.offload import HostInputs
from automodel_trainer.nn.operators import hash_of
from automodel_trainer.nn.wrap import wrap
from automodel_trainer.strategies.base.block_modes import MODES, Mode

__all__ = ["Mode", "Switch", "apply_activation_checkpointing", "check_blocks", "offload_inputs", "switch_blocks"]

CHEAP = 8  # a matmul whose result is this many times as wide as the dimension it sums over is computed again


def apply_activation_checkpointing(model: nn.Module, mode: Mode, blocks: Sequence[nn.Module] | None = None) -> None:
    """Checkpoint the training forward of every block of `model`, in place. Parameter names do not change.

    Wrappers put around a block's forward before this call are recomputed with it; later ones are not.

    Args:
        mode: "full" recomputes a whole block; "selective" keeps the outputs of attention and of all but cheap matmuls.
            "offload" leaves the blocks to `offload_inputs`.
        blocks: the blocks to checkpoint; None: all of the model's.

    Raises:
        ValueError: the mode is unknown, the model has no blocks, or it uses fp8 with delayed scaling.
    """
    if mode not in MODES:
        raise ValueError(
            f"activation_checkpointing={mode!r} is unknown. Allowed: {', '.join(MODES)}, or null for none."
        )
    blocks = find_blocks(model) if blocks is None else blocks
    check_blocks(model, blocks, mode)
    switch_blocks({block: Switch(mode) for block in blocks}, inside=True)


class Switch:
    """What a block does with its activations.

    Attributes:
        mode: how it is checkpointed; None: everything is kept.
        inside: whether that happens inside of what is compiled, if the block is.
    """

    def __init__(self, mode: Mode | None = None, inside: bool = True) -> None:
        self.mode, self.inside = mode, inside


def check_blocks(model: nn.Module, blocks: Sequence[nn.Module], mode: str | None) -> None:
    """Raise ValueError if the model has no blocks, or cannot compute them again.

    Args:
        mode: what is asked for; None: a memory budget will say.
    """
    name = "memory" if mode is None else "activation_checkpointing"
    if not blocks:
        raise ValueError(
            f"{name} recomputes a model block by block, and {type(model).__name__} has no list of blocks "
            f"(nn.ModuleList). Set {name} to null."
        )
    if (layers := fp8_layers(model)) and layers.has_history:
        raise ValueError(
            f"{name if mode is None else f'{name}={mode!r}'} runs blocks again in backward, and with fp8='delayed' "
            f"every run changes the scales. Set fp8='current', or {name} to null."
        )


def switch_blocks(switches: Mapping[nn.Module, Switch], *, inside: bool) -> None:
    """Let blocks do what their switches say, in place. Wrappers put around a block later are not recomputed.

    Args:
        inside: whether these calls are the ones inside of what is compiled.
    """
    for block, switch in switches.items():
        wrap(block, partial(_checkpointed, block, switch, inside))


def offload_inputs(
    blocks: Sequence[nn.Module],
    host: HostInputs,
    switches: Mapping[nn.Module, Switch] | None = None,
    again: bool = True,
) -> None:
    """Checkpoint blocks around all that they do, in place: their inputs lie in host memory until their backward.

    So do their results of attention, as far as there is room: attention is not computed again then. Call it after the
    blocks are compiled and cut: copies are no part of compiled code.

    Args:
        host: holds the inputs. Blocks that run one after the other share one.
        switches: of the blocks: only those whose mode is "offload" do it. None: all.
        again: whether a block may run forward once more than the others, for an input that `host` has no room for.
    """
    switches = {block: Switch("offload") for block in blocks} if switches is None else switches
    host.blocks = partial(_count_offloading, switches)
    for block in blocks:
        wrap(block, partial(_offloaded, block, switches[block], host, again))


def _count_offloading(switches: Mapping[nn.Module, Switch]) -> int:
    return sum(switch.mode == "offload" for switch in switches.values())


class Checkpointed:
    """In a model's record: its blocks are checkpointed."""


def checkpoint_when_asked(model: nn.Module) -> None:
    """Let `model.activation_checkpointing_enable()`, transformers' method, checkpoint the blocks of a cut model.

    transformers checkpoints the forward of a block's class, inside what a layout has put around it: then the
    recomputation would not find this rank's part of the parameters.
    """
    model.activation_checkpointing_enable = MethodType(_enable, model)  # type: ignore[assignment]
    model.gradient_checkpointing_enable = MethodType(_enable, model)  # type: ignore[assignment]


def _enable(self: nn.Module, *_: Any, every_n_layers: int = 1, offload: bool = False, **__: Any) -> None:
    """Checkpoint every block. The way torch recomputes (`use_reentrant`) does not change what is computed.

    Raises:
        ValueError: only some blocks, or host memory, were asked for.
    """
    if every_n_layers != 1 or offload:
        raise ValueError(
            "Under tp and cp every block is checkpointed, on the device: leave out every_n_layers, offload."
        )
    if recorded(self, Checkpointed) is None:
        apply_activation_checkpointing(self, "full")
        record_of(self).keep(Checkpointed())


def _checkpointed(
    block: nn.Module, switch: Switch, inside: bool, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    mode = switch.mode
    if mode in (None, "offload") or switch.inside != inside or not (block.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = SELECTIVE
    elif CHECKPOINT_MISSES_FUNCTIONS and torch.compiler.is_compiling():
        # Without a policy, this compiler keeps what an autograd.Function computes: with fused adapters, a whole block.
        options["context_fn"] = RECOMPUTING
    return checkpoint(forward, *args, **options, **kwargs)


def _offloaded(
    block: nn.Module,
    switch: Switch,
    host: HostInputs,
    again: bool,
    forward: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    if switch.mode != "offload" or not (block.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    run = partial(_checkpointed_to, host, forward)
    return host.around(run, partial(_run_gathered, block, run) if again else None, *args, **kwargs)


def _run_gathered(block: nn.Module, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a block whose hooks of FSDP2 are not called."""
    if not isinstance(block, FSDPModule):
        return run(*args, **kwargs)
    block.unshard()
    try:
        return run(*args, **kwargs)
    finally:
        block.reshard()


def _checkpointed_to(host: HostInputs, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    options: dict[str, Any] = {"use_reentrant": False, "context_fn": partial(contexts, host)}
    if args and isinstance(args[0], Tensor):
        return checkpoint(forward, *args, **options, **kwargs)
    leaves, structure = pytree.tree_flatten((args, kwargs))  # torch saves tensors given by place alone
    return checkpoint(partial(_unflattened, forward, structure), *leaves, **options)


def _unflattened(forward: Callable[..., Any], structure: Any, *leaves: Any) -> Any:
    args, kwargs = pytree.tree_unflatten(leaves, structure)
    return forward(*args, **kwargs)


def _recompute(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keep = op in EXPENSIVE_OPERATIONS and not _is_cheap_matmul(op, args)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _is_cheap_matmul(op: Any, args: Sequence[Any]) -> bool:
    """Whether a matmul sums so few products that its result is cheap to compute again and large to keep.

    The second matmul of an adapter is one: its result is as large as that of the frozen weight beside it.
    """
    if op not in MATMULS:
        return False
    second = args[MATMULS[op]]
    inner, width = second.shape[-2:]
    return bool(inner * CHEAP <= width)


def _contexts(policy: Callable[..., CheckpointPolicy]) -> Callable[[], Any]:
    """The contexts of a checkpoint with this policy. torch keeps compiled code only of policies that have a name."""
    found = partial(create_selective_checkpoint_contexts, policy)
    found.cache_hash = f"{policy.__name__} {hash_of(__file__, str(_torch.__file__))}"  # type: ignore[attr-defined]
    return found


SELECTIVE, RECOMPUTING = _contexts(_policy), _contexts(_recompute)
