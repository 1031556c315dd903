"""Dispatchers of expert parallel: DeepEP's plumbing with its kernels replaced by gloo, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from automodel_trainer.distributed import phase
from automodel_trainer.distributed.phase import enter_phase
from automodel_trainer.models.kernels import KernelsConfig, apply_kernels
from automodel_trainer.models.kernels.libraries import _deepep
from automodel_trainer.models.kernels.libraries._deepep import DeepEP
from automodel_trainer.models.kernels.library import Offer
from tests import fake_deep_ep
from tests.harness import NextToken, check_steps, make_strategy, train_steps
from tests.matrix import more
from tests.pool import RankPool
from tests.strategies.test_expert import MAX_NORM, ROWS, STEPS, build, reference, rows_of
from tests.strategies.test_tensor import MOE, adam
from tests.tiny import tiny_model

CUDA = torch.device("cuda")


@contextmanager
def installed(package: ModuleType, **changes: Any) -> Iterator[pytest.MonkeyPatch]:
    """`package` is what `import deep_ep` finds, and attributes of our library are changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "deep_ep", package)
        patch.setattr(_deepep, "_preload", lambda: None)
        for name, value in changes.items():
            patch.setattr(DeepEP, name, value)
        _deepep._load.cache_clear()
        _deepep._buffers.cache_clear()
        yield patch
    _deepep._load.cache_clear()
    _deepep._buffers.cache_clear()


ANYWHERE: dict[str, Any] = {
    "devices": ("cuda", "cpu"),
    "offers": {"dispatch": Offer(dtypes=(torch.float32, torch.bfloat16), cuts_graph=True)},
    "peer_obstacle": lambda self, group: None,
}


def train(spec: str, ranks: int, family: str, skewed: bool, dispatch: str) -> Any:
    with installed(fake_deep_ep, **ANYWHERE):
        torch.manual_seed(ranks)
        strategy = make_strategy(spec, ranks)
        model = build(family, skewed)
        in_use = apply_kernels(model, KernelsConfig(dispatch=dispatch), strategy.root_device)
        strategy.parallelize(model)
        assert in_use.texts["dispatch"] == "DeepEP"
        size = max(ROWS // strategy.dp_size // 2, 1)
        return train_steps(strategy, NextToken(model), adam(model), rows_of, size, steps=STEPS, max_norm=MAX_NORM)


@pytest.mark.parametrize(
    ("spec", "ranks", "family", "skewed", "dispatch"),
    [
        ("fsdp2:ep=2", 2, "qwen3_moe", False, "auto"),
        ("fsdp2:ep=2,activation_checkpointing=full", 2, "gpt_oss", True, "deepep"),
        more("fsdp2:ep=4,tp=2", 4, "glm4_moe", False, "deepep"),
    ],
)
def test_deepep_as_on_one_device(
    pool: RankPool, spec: str, ranks: int, family: str, skewed: bool, dispatch: str
) -> None:
    """A token to several ranks, ranks and experts without a token, weights' gradients, recomputation."""
    check_steps(pool.run(ranks, train, spec, ranks, family, skewed, dispatch), reference(family, skewed))


def auto_where_it_does_not_fit() -> list[str]:
    """What carries tokens with "auto": one rank lacks the package; GPUs without peers; tokens in a dtype it lacks."""
    said = []
    for case in ("package", "peers", "dtype"):
        changes = {name: value for name, value in ANYWHERE.items() if (name, case) != ("offers", "dtype")}
        changes |= {"peer_obstacle": lambda self, group: "no peers"} if case == "peers" else {}
        with installed(fake_deep_ep, **changes) as patch:
            strategy = make_strategy("fsdp2:ep=2", 2)
            if case == "package" and strategy.global_rank == 1:
                patch.setitem(sys.modules, "deep_ep", None)
            model = tiny_model("qwen3_moe", **MOE)
            in_use = apply_kernels(model, KernelsConfig(), strategy.root_device)
            strategy.parallelize(model)
            assert model(input_ids=torch.arange(8)[None]).logits.isfinite().all()
            said.append(in_use.texts["dispatch"])
    return said


def test_auto_is_all_to_all_where_a_rank_lacks_deepep(pool: RankPool) -> None:
    assert pool.run(2, auto_where_it_does_not_fit) == [["all_to_all", "all_to_all", "DeepEP"]] * 2


def places() -> list[str]:
    """The phases that a rank goes through in one step."""
    seen: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phase, "enter_phase", lambda name, step=None: (seen.append(name), enter_phase(name, step)))
        strategy = make_strategy("fsdp2:ep=2", 2)
        model = strategy.parallelize(build("qwen3_moe", False))
        seen.clear()
        train_steps(strategy, NextToken(model), adam(model), rows_of, ROWS // 2, steps=1)
    return seen


def test_the_watchdog_knows_where_tokens_travel(pool: RankPool) -> None:
    for seen in pool.run(2, places):
        exchange = "backward (exchange of tokens' gradients)"
        for place, after in (("forward (dispatch of tokens)", "forward"), (exchange, "backward")):
            assert seen[seen.index(place) + 1] == after
        assert seen.index("forward (combine of tokens)") < seen.index(exchange)


# --- what is refused --------------------------------------------------------------------------------------------------


def refusal(model: nn.Module, device: torch.device) -> str:
    with pytest.raises(ValueError, match="dispatch='deepep'") as caught:
        apply_kernels(model, KernelsConfig(dispatch="deepep"), device)  # type: ignore[arg-type]
    return str(caught.value)


def test_deepep_needs_a_gpu() -> None:
    assert "needs a GPU, and this run is on cpu" in refusal(tiny_model("qwen3_moe", **MOE), torch.device("cpu"))


def test_a_package_that_is_missing_or_another_is_named() -> None:
    model = tiny_model("qwen3_moe", **MOE)
    empty = ModuleType("deep_ep")
    empty.__version__ = "2.0"  # type: ignore[attr-defined]
    with installed(empty):
        said = refusal(model, CUDA)
        assert "needs DeepEP with the V1 Buffer" in said
        assert "deep_ep 2.0 has no V1 Buffer: Buffer.get_dispatch_layout is missing" in said
    with installed(empty) as patch:
        patch.setitem(sys.modules, "deep_ep", None)  # as if it was not installed
        assert "(import of deep_ep halted" in refusal(model, CUDA)


def test_an_unused_choice_is_refused() -> None:
    with installed(fake_deep_ep, **ANYWHERE):
        strategy = make_strategy("fsdp2", 1)
        model = tiny_model("qwen3_moe", **MOE)
        apply_kernels(model, KernelsConfig(dispatch="deepep"), strategy.root_device)
        with pytest.raises(ValueError, match=r"dispatch='deepep' carries tokens between ranks.* and ep=1"):
            strategy.parallelize(model)


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dispatch='nccl' is unknown. Allowed: auto, all_to_all, deepep"):
        KernelsConfig(dispatch="nccl")


def without_peers(hosts: bool) -> str:
    """What `parallelize` says on ranks of several hosts, or on GPUs that cannot reach each other."""
    changes = {name: value for name, value in ANYWHERE.items() if name != "peer_obstacle"}
    with installed(fake_deep_ep, **changes) as patch:
        strategy = make_strategy("fsdp2:ep=2", 2)
        patch.setattr(torch.cuda, "current_device", lambda: strategy.global_rank)
        patch.setattr(_deepep, "_reaches", lambda device, other: hosts or device == 0)
        if hosts:
            patch.setattr("socket.gethostname", lambda: f"host{strategy.global_rank}")
        model = tiny_model("qwen3_moe", **MOE)
        apply_kernels(model, KernelsConfig(dispatch="deepep"), strategy.root_device)
        with pytest.raises(ValueError, match="cannot be used here") as caught:
            strategy.parallelize(model)
        return str(caught.value)


def test_ranks_without_peers_are_refused_on_all_of_them(pool: RankPool) -> None:
    assert all("GPU 1 cannot reach the memory of GPU 0" in said for said in pool.run(2, without_peers, False))
    assert all("the ep ranks are on 2 hosts (host0, host1)" in said for said in pool.run(2, without_peers, True))


def wrong_dtype() -> str:
    changes = {name: value for name, value in ANYWHERE.items() if name != "offers"}
    with installed(fake_deep_ep, **changes):
        strategy = make_strategy("fsdp2:ep=2", 2)
        model = tiny_model("qwen3_moe", **MOE)
        apply_kernels(model, KernelsConfig(dispatch="deepep"), strategy.root_device)
        strategy.parallelize(model)
        with pytest.raises(ValueError, match="sends tokens in bf16") as caught:
            model(input_ids=torch.arange(8)[None])
        return str(caught.value)


def test_tokens_in_a_dtype_that_deepep_lacks_are_refused(pool: RankPool) -> None:
    assert all("these are torch.float32. Set precision='bf16'" in said for said in pool.run(2, wrong_dtype))
