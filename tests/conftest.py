from __future__ import annotations

import gc
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# No names are asked for (glibc): torch's store looks up the name of who connects, and waits 5 s for each lost answer.
os.environ.setdefault("RES_OPTIONS", "attempts:0")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a script's shell gives this to what it runs with `&`
    signal.signal(signal.SIGINT, signal.default_int_handler)

gc.disable()  # imports make no garbage; `seldom_look_for_garbage` enables it

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

from tests import matrix, process_settings, rounding  # noqa: E402
from tests.pool import RankPool, forget_compiled, look_once_for_plugins, seldom_look_for_garbage  # noqa: E402
from tests.store import bucket, server  # noqa: E402, F401

LONGEST = (
    "strategies/test_fp8_gather.py", "strategies/test_expert.py", "test_readme.py", "site/test_pages.py",
    "callbacks/test_dcp_checkpoint.py", "strategies/test_tensor.py", "checkpoint/test_resume.py",
    "strategies/test_pipeline_options.py", "test_launch.py", "test_trainer.py", "vlm/test_ranks.py",
    "models/test_lora_layouts.py", "tools/test_vlm_quickstart.py", "strategies/test_megatron_fsdp.py",
    "strategies/test_pipeline.py",
)  # fmt: skip
"""Files that begin first: with two side by side, the other one would wait for the end of one that began last."""

rounding.install()
# An example takes as long as the machine is busy.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--random-order", type=int, metavar="SEED", help="shuffle the files, and the tests of each")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    matrix.leave_out(config, items)
    first = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: first.get(item.path, len(first)))
    seed = config.getoption("random_order")
    if seed is not None:
        items[:] = shuffled(items, random.Random(seed))
    for item in items if rounding.wanted() else []:
        if item.get_closest_marker("exact"):
            item.add_marker(pytest.mark.skip(reason=f"is bit for bit, and {rounding.VARIABLE} is set"))


def pytest_collection_finish() -> None:
    look_once_for_plugins()
    seldom_look_for_garbage()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What a test draws does not depend on the tests before it."""
    torch.manual_seed(0)
    random.seed(0)


def shuffled(items: list[pytest.Item], dice: random.Random) -> list[pytest.Item]:
    """Files stay together: what they share is made once."""
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    return [item for file in dice.sample(list(files.values()), len(files)) for item in dice.sample(file, len(file))]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("random_order") is not None:
        terminalreporter.write_line(f"in random order: --random-order {config.getoption('random_order')}")


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Four gloo ranks, started once."""
    ranks = RankPool()
    yield ranks
    ranks.close()


@pytest.fixture(autouse=True, scope="module")
def _compiled() -> None:
    """A file finds nothing compiled."""
    forget_compiled()


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    """Nothing of a test's settings is left to the next one."""
    with process_settings.restored():
        yield


@pytest.fixture(autouse=True)
def _cache(_settings: None, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token caches go to a folder of the test session."""
    monkeypatch.setenv("AMT_CACHE", str(Path(tmp_path_factory.getbasetemp()) / "amt_cache"))
