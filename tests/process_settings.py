"""Settings of the process that a test, or what it runs, may change: the next one finds them as they were.

Libraries are not asked to undo what they do to a process, and a test that passes in any order may not see it.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from automodel_trainer._lightning import sync_rank_zero

LOGGERS = ("", "automodel_trainer", "datasets", "lightning", "lightning.pytorch", "lightning.fabric", "transformers")


@contextmanager
def restored() -> Iterator[None]:
    """Environment, folder, path of imports, loggers, rank and torch's defaults are the same again at the end."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    found = [(logger.level, logger.disabled, logger.propagate, list(logger.handlers)) for logger in loggers]
    environment, folder, path = dict(os.environ), os.getcwd(), list(sys.path)
    rank, dtype, threads = getattr(rank_zero_only, "rank", 0), torch.get_default_dtype(), torch.get_num_threads()
    deterministic, precision = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    yield
    for logger, (level, disabled, propagate, handlers) in zip(loggers, found, strict=True):
        logger.setLevel(level)
        logger.disabled, logger.propagate = disabled, propagate
        if logger is not logging.root:  # whose handlers pytest changes between set-up and tear-down
            logger.handlers[:] = handlers
    running = os.environ.get("PYTEST_CURRENT_TEST")  # pytest's own, which says what is torn down
    if dict(os.environ) != {**environment, "PYTEST_CURRENT_TEST": running}:
        os.environ.clear()
        os.environ.update(environment)
    os.chdir(folder)
    sys.path[:] = path
    sync_rank_zero(rank)
    torch.set_default_dtype(dtype)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    torch.set_float32_matmul_precision(precision)
