"""The thread of `Watchdog`: it reports the phase of this rank, detects stuck and lost ranks, and ends the process."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from automodel_trainer.callbacks.side_channel import SideChannel
from automodel_trainer.callbacks.stacks import current_call, dump_stacks
from automodel_trainer.distributed.phase import current

INTERVAL = 1.0  # seconds between two checks
LOST_AFTER = 20.0  # seconds without a heartbeat after which a rank counts as lost
GRACE = 5.0  # seconds for a rank to raise or end by itself after another has
ANSWER = 5.0  # seconds to wait for other ranks before this process ends
EXIT_CODE = 1


class Watch:
    """Watches this rank and, on rank 0, all others. It runs on every rank until `stop` or `report` is called.

    Args:
        channel: the connection to the other ranks.
        patience: returns how many seconds this rank may stay in its current phase.
        folder: where to write stacks when the job is ended.
        kill_children: kills processes that would outlive this one.
    """

    def __init__(
        self,
        channel: SideChannel,
        patience: Callable[[], float],
        folder: Path,
        kill_children: Callable[[], None] = lambda: None,
    ) -> None:
        self.channel, self.patience, self.folder, self.kill_children = channel, patience, folder, kill_children
        self._others = set(range(channel.world_size)) - {channel.rank}
        self._done = threading.Event()
        self._signs: dict[int, tuple[int, float]] = {}  # rank -> its last heartbeat, and when we first saw it
        self._beat = 0
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    # --- called by the main thread ----------------------------------------------------------------------------------

    def stop(self) -> None:
        """End the watch, because the run is over on this rank. Rank 0 keeps the store until the others know."""
        self._leave("bye")

    def report(self, exception: str) -> None:
        """Tell the other ranks that this rank has raised, and wait until they know.

        Args:
            exception: the traceback as text.
        """
        with suppress(*SideChannel.LOST):  # rank 0 may be gone already
            self.channel.declare({"kind": "raised", "rank": self.channel.rank, "text": exception})
        self._leave("seen")

    def _leave(self, word: str) -> None:
        self._done.set()
        self._thread.join()
        with suppress(*SideChannel.LOST):
            self.channel.tell("seen")
            self.channel.tell(word)  # a rank that has raised must not say "bye": the others would think the run is over
            if self.channel.rank == 0 or word == "seen":
                self.channel.wait_for(word, self._others, ANSWER)

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._done.wait(INTERVAL):
            try:
                if self.channel.has_told("bye", 0):  # the run is over, and rank 0 is about to close the store
                    self.channel.tell("bye")
                    return
                self._tell()
                verdict = self.channel.verdict() or self._judge()
            except SideChannel.LOST as error:
                verdict = {"kind": "lost", "rank": 0, "text": f"rank 0, which has the store, is gone ({error})"}
            if verdict is not None:
                self._end(verdict)
                return

    def _tell(self) -> None:
        self._beat += 1
        silent = time.monotonic() - current.since
        # Read the stacks only if this rank has been in its phase for a while: it takes the GIL from the main thread.
        collective, line = current_call() if silent > 2 * INTERVAL else ("", "")
        place = {"step": current.step, "phase": current.phase, "silent": silent, "collective": collective, "line": line}
        self.channel.tell("place", {"beat": self._beat, **place})

    def _judge(self) -> dict[str, Any] | None:
        silent = time.monotonic() - current.since
        if silent > self.patience():
            text = f"rank {self.channel.rank} has not moved for {silent:.0f} s ({current.phase} of step {current.step})"
            return self.channel.declare({"kind": "stuck", "rank": self.channel.rank, "text": text})
        if self.channel.rank == 0 and (lost := self._lost_rank()) is not None:
            text = f"rank {lost} has sent no heartbeat for {LOST_AFTER:.0f} s: its process is gone or frozen"
            return self.channel.declare({"kind": "lost", "rank": lost, "text": text})
        return None

    def _lost_rank(self) -> int | None:
        now = time.monotonic()  # only the clock of this rank: the clocks of machines differ
        for rank, place in self.channel.told("place").items():
            beat, seen = self._signs.get(rank, (-1, now))
            self._signs[rank] = (place["beat"], now if place["beat"] != beat else seen)
        silent = [rank for rank, (_, seen) in self._signs.items() if now - seen > LOST_AFTER]
        return next((rank for rank in silent if not self.channel.has_told("bye", rank)), None)

    def _end(self, verdict: dict[str, Any]) -> None:
        """End this process, unless it ends by itself for the same reason."""
        with suppress(*SideChannel.LOST):
            self.channel.tell("seen")
        if verdict["kind"] != "stuck" and self._done.wait(GRACE):
            return
        with suppress(OSError):
            dump_stacks(self.folder / f"rank-{self.channel.rank:05d}.txt")
        try:
            self._last_words(verdict)
        except SideChannel.LOST:
            print(f"Rank {self.channel.rank} ends: {_headline(verdict)}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        self.kill_children()
        os._exit(EXIT_CODE)  # `sys.exit` would end only this thread; the main thread hangs

    def _last_words(self, verdict: dict[str, Any]) -> None:
        """Print the report on rank 0. The others wait for it, because launchers kill all ranks when one ends."""
        self._tell()
        self.channel.tell("stacks")
        if self.channel.rank == 0:
            self.channel.wait_for("stacks", self._others - {verdict["rank"]}, ANSWER)
            print(self._report(verdict), file=sys.stderr, flush=True)
            self.channel.tell("spoken")
        elif verdict["rank"] == 0 and verdict["kind"] != "stuck":
            print(f"Rank {self.channel.rank} ends: {_headline(verdict)}", file=sys.stderr)
        else:
            self.channel.wait_for("spoken", {0}, 2 * ANSWER)

    def _report(self, verdict: dict[str, Any]) -> str:
        table = place_table(self.channel.told("place"))
        return f"\nThe job ends: {_headline(verdict)}\n{table}\nStacks of all threads: {self.folder}\n"


def _headline(verdict: dict[str, Any]) -> str:
    return f"rank {verdict['rank']} raised\n{verdict['text']}" if verdict["kind"] == "raised" else verdict["text"]


def place_table(places: dict[int, dict[str, Any]]) -> str:
    """A table of ranks: the step, phase and line of each when it last reported.

    Args:
        places: maps ranks to their last reports.
    """
    rows = [("rank", "step", "phase", "since", "collective", "at")]
    for rank, place in sorted(places.items()):
        since = f"{place['silent']:.0f} s"
        rows.append((str(rank), str(place["step"]), place["phase"], since, place["collective"] or "-", place["line"]))
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows)
