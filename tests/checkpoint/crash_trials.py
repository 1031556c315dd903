"""Training on two ranks, killed at random moments and started again; ranks are forked from this warm process.

python -m tests.checkpoint.crash_trials FOLDER --kills 100 --seed 0
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from automodel_trainer.callbacks.dcp_checkpoint import DCPCheckpoint
from automodel_trainer.checkpoint import check_checkpoint
from automodel_trainer.checkpoint.record import RecordedFile
from automodel_trainer.checkpoint.runs import find_last
from tests.callbacks.runs import train
from tests.pool import _free_port, meet_at_once

RANKS, STEPS, EVERY = 2, 8, 2
WAITED = -99  # in place of an exit code
# Seconds after a rank has died. A rank that still looks for the others is then ended, as launchers do it; one that has
# found them has to end by itself, through its collectives or the watchdog.
RENDEZVOUS, PATIENCE = 5.0, 30.0
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "shutil.rmtree"}


class Acknowledging(DCPCheckpoint):
    """Notes the step of every save that has been reported as whole."""

    def __init__(self, notes: Path, **options: Any) -> None:
        super().__init__(every_n_steps=EVERY, keep_last=2, **options)
        self.notes = notes

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        (self.notes.parent / f"joined-{trainer.global_rank}").touch()

    def _on_whole(self, folder: Path) -> None:
        super()._on_whole(folder)
        self.notes.write_text(str(step_of(folder)))


class Killer:
    """Counts what this process does to files below `root`, and kills it at the `moment`-th time (0: never).

    Half of a block is on the disk when it dies in a write.
    """

    def __init__(self, root: Path, moment: int) -> None:
        self.root, self.moment, self.count = str(root), moment, 0
        sys.addaudithook(self._on_event)
        write = RecordedFile.write

        def writing(file: RecordedFile, data: bytes | memoryview) -> None:
            if self._strikes():
                file._stream.write(data[: len(data) // 2])
                file._stream.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            write(file, data)

        RecordedFile.write = writing  # type: ignore[method-assign]

    def _on_event(self, event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[1], str) and args[1][0] in "wax"
        if (writes or event in _CHANGES) and str(args[0]).startswith(self.root) and self._strikes():
            os.kill(os.getpid(), signal.SIGKILL)

    def _strikes(self) -> bool:
        self.count += 1
        return self.count == self.moment


def rank_main(rank: int, port: int, root: Path, moment: int, background: bool) -> None:
    """One rank of a run that goes on from the last checkpoint, if there is one."""
    log = os.open(root.parent / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.register(signal.SIGUSR2)
    meet_at_once()
    names = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
    os.environ.update({key: str(value) for key, value in names.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="crash")
    killer = Killer(root, moment)
    result = train(
        root,
        [Acknowledging(root.parent / "acknowledged", async_save=background)],
        strategy="fsdp2",
        devices=RANKS,
        ckpt_path="last" if find_last(root / "checkpoints") else None,
        max_steps=STEPS,
        max_epochs=None,
        limit_val_batches=0,
    )
    weights = {name: value.tolist() for name, value in result["weights"].items()}
    outcome = {"journal": result["journal"], "weights": weights, "moments": killer.count}
    (root.parent / f"rank-{rank}.json").write_text(json.dumps(outcome))


def launch(
    root: Path, background: bool, victim: int | None, moment: int, after: float, all_ranks: bool
) -> tuple[list[int], float]:
    """Run until the ranks are gone.

    Returns:
        their exit codes (negative: killed by that signal), and the seconds from the first end to the last.

    Args:
        victim: the rank that dies; None: nobody.
        moment: when, counted in changes to files; 0: `after` seconds.
        all_ranks: whether the others are killed with it, or have to find out.
    """
    port = _free_port()
    joined = [root.parent / f"joined-{rank}" for rank in range(RANKS)]
    for file in joined:
        file.unlink(missing_ok=True)
    children = {}
    for rank in range(RANKS):
        if not (process := os.fork()):
            try:
                rank_main(rank, port, root, moment if rank == victim else 0, background)
                os._exit(0)
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
        children[process] = rank
    started, codes, died = time.monotonic(), {}, 0.0
    while len(codes) < RANKS and not (died and time.monotonic() - died > PATIENCE):
        if victim is not None and not moment and time.monotonic() - started > after:
            moment = -1
            for process, rank in children.items():
                if rank not in codes and (rank == victim or all_ranks):
                    os.kill(process, signal.SIGKILL)
        if died and time.monotonic() - died > RENDEZVOUS:
            for process, rank in children.items():
                if rank not in codes and not joined[rank].exists():
                    os.kill(process, signal.SIGKILL)
        process, status = os.waitpid(-1, os.WNOHANG)
        if not process:
            time.sleep(0.002)
            continue
        codes[children[process]] = os.waitstatus_to_exitcode(status)
        died = died or time.monotonic()
        if codes[children[process]] == -signal.SIGKILL and all_ranks:
            for other, rank in children.items():
                if rank not in codes:
                    os.kill(other, signal.SIGKILL)
    took = time.monotonic() - died
    for process, rank in children.items():
        if rank not in codes:
            os.kill(process, signal.SIGUSR2)  # writes to its log where it is
            time.sleep(0.2)
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
    return [codes.get(rank, WAITED) for rank in range(RANKS)], took


def waited_in(log: Path) -> str:
    """Where a rank was that did not notice: the innermost functions of its main thread."""
    stack = log.read_text().rpartition("(most recent call first):\n")[2].splitlines()
    return " < ".join(line.split(" in ")[-1] for line in stack[:4])


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def outcome_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "rank-0.json").read_text())


def compare(outcome: dict[str, Any], reference: dict[str, Any]) -> list[str]:
    """How a run that was killed, maybe often, differs from the one that was not: it must end as that does."""
    steps = outcome["journal"]
    problems = [] if steps == reference["journal"][len(reference["journal"]) - len(steps) :] else ["the curve differs"]
    return problems + [name for name, value in reference["weights"].items() if outcome["weights"][name] != value]


def trials(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    reference_folder = folder / "reference"
    reference_folder.mkdir(parents=True)
    started = time.monotonic()
    codes, _ = launch(reference_folder / "run", False, None, 0, 0.0, False)
    assert codes == [0, 0], "the reference run failed"
    duration = time.monotonic() - started
    reference = outcome_of(reference_folder)
    moments = [json.loads((reference_folder / f"rank-{r}.json").read_text())["moments"] for r in range(RANKS)]
    report: dict[str, Any] = {
        "kills": 0,
        "inside_a_save": 0,
        "one_rank": 0,
        "finished": 0,
        "slowest_end_s": 0.0,
        "problems": [],
    }
    number = 0
    while report["kills"] < kills or (folder / str(number)).exists():
        place = folder / str(number)
        place.mkdir(exist_ok=True)
        victim, all_ranks, background = draw.randrange(RANKS), draw.random() < 0.5, draw.random() < 0.5
        by_clock = draw.random() < 0.25
        # Runs that go on from a checkpoint have less before them: most moments lie early.
        moment = 0 if by_clock else 1 + int(moments[victim] * draw.random() ** 2)
        if report["kills"] >= kills:
            victim, moment = None, 0
        codes, took = launch(place / "run", background, victim, moment, duration * draw.random(), all_ranks)
        where = f"run {number}, kill {report['kills']} (rank {victim}, moment {moment}, async {background}): "
        report["slowest_end_s"] = max(report["slowest_end_s"], round(took, 1))
        if WAITED in codes:
            waiting = waited_in(place / f"rank-{codes.index(WAITED)}.log")
            report["problems"].append(where + f"a rank was still there after {PATIENCE:.0f} s: {waiting}")
        if victim is not None and -signal.SIGKILL in codes:
            report["kills"] += 1
            report["one_rank"] += not all_ranks
            report["inside_a_save"] += any((place / "run" / "checkpoints").glob("*.tmp*"))
            report["problems"] += [where + text for text in state_after(place)]
            continue
        if codes != [0, 0]:
            report["problems"].append(where + f"exit codes {codes}: {(place / 'rank-0.log').read_text()[-600:]}")
        else:
            report["problems"] += [where + text for text in compare(outcome_of(place), reference)]
        report["finished"] += 1
        number += 1
    return report


def state_after(place: Path) -> list[str]:
    """What is wrong with the checkpoints after a kill: nothing that was reported as saved may be lost."""
    base = place / "run" / "checkpoints"
    last = find_last(base)
    notes = place / "acknowledged"
    saved = int(notes.read_text() or 0) if notes.is_file() else 0
    problems = []
    if saved and (last is None or step_of(last) < saved):
        problems.append(f"step {saved} was reported as saved, but the last checkpoint is {last}")
    for checkpoint in (path for path in base.glob("step-*") if ".tmp" not in path.name):
        try:
            check_checkpoint(checkpoint)
        except ValueError as error:
            problems.append(str(error))
    latest = base / "latest"
    if latest.is_symlink() and not latest.exists():
        problems.append("`latest` points to nothing")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(trials(arguments.folder, arguments.kills, arguments.seed)))


if __name__ == "__main__":
    main()
