"""Cases of a benchmark, each in processes of its own: one that fails, hangs or fills the memory costs no other case."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

_MARK = "RESULT "


def report(result: Mapping[str, Any]) -> None:
    """Print what a case found, for `result_of`."""
    print(_MARK + json.dumps(result, default=str), flush=True)


def reported(text: str) -> list[dict[str, Any]]:
    """What `report` has printed among other lines."""
    return [json.loads(line.removeprefix(_MARK)) for line in text.splitlines() if line.startswith(_MARK)]


def result_of(
    script: str,
    arguments: Sequence[str],
    timeout: float,
    ranks: int = 0,
    environment: Mapping[str, str] | None = None,
    lines: int = 12,
) -> dict[str, Any] | str:
    """Run a script for one case.

    Args:
        script: a file that calls `report`.
        arguments: of its command line.
        timeout: seconds after which it is ended.
        ranks: of torchrun, on this machine; 0: without torchrun.
        environment: variables besides those of this process.
        lines: of its errors that a failure shows.

    Returns:
        What it reported, or why it reported nothing.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    process = subprocess.Popen(
        [sys.executable, *launcher, script, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    try:
        out, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        _end(process)
        return f"no end in {timeout:.0f} s"
    if found := reported(out):
        return found[0]
    said = errors.strip().splitlines() or out.strip().splitlines() or [f"no output, exit status {process.returncode}"]
    named = [line for line in said if "Error: " in line and "ChildFailedError" not in line]
    return "\n".join([f"failed: {(named or said)[-1][:300]}", *said[max(len(said) - lines, 0) :]])


def _end(process: subprocess.Popen[str]) -> None:
    """End a process. Ranks outlive a torchrun that is killed: it is asked first, and ends them."""
    process.terminate()
    try:
        process.communicate(timeout=45)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
