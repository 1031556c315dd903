"""How tokens travel to their experts and back on the GPUs of one host: DeepEP beside `all_to_all`.

`torchrun --nproc-per-node 2 benchmarks/moe_dispatch.py`: 8,192 tokens a rank of width 2,048, 8 of 128 experts each. It
prints the differences of DeepEP's results and gradients from those of `all_to_all`, then the time of a dispatch, of a
combine, and of both with their backward. The experts in between only multiply by their number, so that a wrong route
shows. In a second case no token chooses an expert of the last rank.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from automodel_trainer.models.kernels.dispatch import Dispatcher
from automodel_trainer.models.kernels.registry import find
from automodel_trainer.strategies.expert.dispatch import AllToAll

EXPERTS, TOP = 128, 8


def computed(carrier: Dispatcher, x: Tensor, experts: Tensor, weights: Tensor, local: int) -> Tensor:
    """A token's sum over its choices of weight · (expert + 1) / experts · token."""
    arrived = carrier.dispatch(x, experts, weights)
    first = dist.get_rank() * local
    scale = (arrived.experts + first + 1).float() / EXPERTS * arrived.weights
    return carrier.combine((arrived.hidden.float() * scale.sum(1, keepdim=True)).to(x.dtype), arrived.route)


def gradients(carrier: Dispatcher, x: Tensor, experts: Tensor, weights: Tensor, grad: Tensor) -> dict[str, Tensor]:
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    out = computed(carrier, x, experts, weights, EXPERTS // dist.get_world_size())
    out.backward(grad)
    assert x.grad is not None
    assert weights.grad is not None
    return {"output": out.detach(), "tokens' gradient": x.grad, "weights' gradient": weights.grad}


def expected(x: Tensor, experts: Tensor, weights: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """The same without any sending, in fp32."""
    scale = (experts + 1).float() / EXPERTS
    total = (scale * weights).sum(1, keepdim=True)
    return {
        "output": x.float() * total,
        "tokens' gradient": grad.float() * total,
        "weights' gradient": scale * (x.float() * grad.float()).sum(1, keepdim=True),
    }


def milliseconds(run: Callable[[], object], runs: int = 20) -> float:
    for _ in range(5):
        run()
    dist.barrier()
    start, end = torch.cuda.Event(True), torch.cuda.Event(True)
    start.record()
    for _ in range(runs):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / runs


def carriers(group: ProcessGroup) -> dict[str, Dispatcher]:
    local = EXPERTS // dist.get_world_size()
    library = find("dispatch", "deepep")
    library.load()
    deepep = library.dispatch(group, local)
    assert not isinstance(deepep, str), deepep
    return {"all_to_all": AllToAll(group, local), "deepep": deepep}


def timed(carrier: Dispatcher, x: Tensor, experts: Tensor, weights: Tensor, grad: Tensor) -> str:
    first, second = (gradients(carrier, x, experts, weights, grad) for _ in range(2))
    same = all(torch.equal(first[key], second[key]) for key in first)
    arrived = carrier.dispatch(x, experts, weights)
    send = milliseconds(lambda: carrier.dispatch(x, experts, weights))
    back = milliseconds(lambda: carrier.combine(arrived.hidden, arrived.route))
    both = milliseconds(lambda: gradients(carrier, x, experts, weights, grad))
    return f"dispatch {send:.2f} ms, combine {back:.2f} ms, with backward {both:.2f} ms; twice the same: {same}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, default=2048)
    args = parser.parse_args()
    rank = int(os.environ["RANK"])
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    dist.init_process_group("nccl", device_id=device)
    group = dist.group.WORLD
    assert group is not None
    torch.manual_seed(rank)
    x = torch.randn(args.tokens, args.width, device=device).bfloat16()
    grad = torch.randn_like(x)
    weights, experts = torch.randn(args.tokens, EXPERTS, device=device).softmax(-1).topk(TOP)
    skewed = experts % (EXPERTS - EXPERTS // dist.get_world_size())
    for name, carrier in carriers(group).items():
        for case, chosen in (("spread", experts), ("last rank idle", skewed)):
            want, got = expected(x, chosen, weights, grad), gradients(carrier, x, chosen, weights, grad)
            errors = {k: ((got[k].float() - want[k]).norm() / want[k].norm()).item() for k in want}
            print(f"rank {rank}, {name}, {case}: " + ", ".join(f"{k} {e:.1e}" for k, e in errors.items()), flush=True)
        times = timed(carrier, x, experts, weights, grad)
        if rank == 0:
            print(f"{name}: {times}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
