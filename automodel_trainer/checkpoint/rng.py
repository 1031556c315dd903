"""Save and restore a rank's random number generators: Python, numpy, and torch on the CPU and on its GPU."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def rng_state() -> dict[str, Any]:
    """The state of all generators, as plain values and small tensors."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (str(name), np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore the state returned by `rng_state`. Without a saved GPU state, the GPU's generator is not changed."""
    random.setstate(state["python"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def fresh_rng_state(step: int, rank: int) -> dict[str, Any]:
    """A new state for `rank`, determined by the step and the rank.

    It is used when the checkpoint was saved on another number of ranks, so that its states do not fit.
    """
    before = rng_state()
    seed = (step * 1_000_003 + rank) % 2**32  # differs for all steps and ranks of a run; numpy accepts 32 bits
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    fresh = rng_state()
    set_rng_state(before)
    return fresh
