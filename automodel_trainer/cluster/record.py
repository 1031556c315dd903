"""Record: what driver and workers tell each other about a run. It lives in an actor and outlives workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

STOP, ABORT = "stop", "abort"


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        checkpoint: the newest checkpoint; None if the run wrote none.
        stopped_by: as `Trainer.stopped_by`.
        exit_code: as `Trainer.exit_code`.
        workers: how many there were at the end.
    """

    checkpoint: str | None
    stopped_by: str | None
    exit_code: int
    workers: int


class Record:
    """The state of a run on a cluster. Every method returns at once.

    Attributes are read through the methods: an actor has no others.
    """

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._asked: str | None = None
        self._error: str | None = None
        self._outcome: Outcome | None = None
        self._printed: list[str] = []

    # --- what torchrun's store is under torchrun: a restarted run finds its folder ---

    def set(self, key: str, value: str) -> None:
        """Keep a value over restarts."""
        self._values[key] = value

    def get(self, key: str) -> str | None:
        """A value that was kept; None if there is none."""
        return self._values.get(key)

    # --- the driver asks ---

    def ask(self, what: str) -> None:
        """Ask the workers to save and stop (`STOP`), or to end at once (`ABORT`)."""
        self._asked = what

    def asked(self) -> str | None:
        """What the driver has asked for."""
        return self._asked

    # --- the workers answer ---

    def refuse(self, error: str) -> None:
        """Note an error of the user's. Trying again would not help, so no further attempt is made."""
        self._error = self._error or error

    def error(self) -> str | None:
        """The error that was noted first."""
        return self._error

    def write(self, text: str) -> None:
        """Keep what a worker has printed until the driver takes it."""
        self._printed.append(text)

    def take(self) -> str:
        """What workers have printed since the last call."""
        text, self._printed = "".join(self._printed), []
        return text

    def finish(self, outcome: Outcome) -> None:
        """Note how the run ended."""
        self._outcome = outcome

    def outcome(self) -> Outcome | None:
        """How the run ended; None if it has not."""
        return self._outcome


class RecordStore:
    """The part of torch's `Store` that `distributed/restarts.py` uses, over a `Record`.

    Args:
        call: calls a method of the record by name and returns its result.
    """

    def __init__(self, call: Any) -> None:
        self._call = call

    def set(self, key: str, value: str) -> None:
        """See `Record.set`."""
        self._call("set", key, value)

    def get(self, key: str) -> bytes:
        """See `Record.get`."""
        return str(self._call("get", key)).encode()

    def check(self, keys: list[str]) -> bool:
        """Whether there is a value for every key."""
        return all(self._call("get", key) is not None for key in keys)
