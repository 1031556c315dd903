"""What the return of a replica group cost, taken apart."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

GB = 10**9


@dataclass
class Clock:
    """Takes the time of the parts of a return, on every rank of every group.

    Attributes:
        rehearsal: seconds of the step that this group ran before the others knew of it.
        meeting: seconds of the newest meeting with the others: until all are connected and late groups have a message.
        transfer: seconds of the newest transfer of tensors.
        sent: bytes of it on this rank.
    """

    rehearsal: float = 0.0
    meeting: float = 0.0
    transfer: float = 0.0
    sent: int = 0
    _since: float = field(default_factory=time.monotonic)

    def restart(self) -> None:
        """Start to count."""
        self._since = time.monotonic()

    def seconds(self) -> float:
        """Seconds since `restart`, and start again."""
        before, self._since = self._since, time.monotonic()
        return self._since - before

    def returned(self, late: bool) -> Returned:
        """What the return cost. Call it when the first step together has its gradients."""
        return Returned(late, self.rehearsal if late else None, self.meeting, self.transfer, self.sent, self.seconds())


@dataclass(frozen=True)
class Returned:
    """A return as one group sees it.

    Attributes:
        late: this group came back; or the others see it.
        rehearsal: seconds of this group's rehearsal, for which nobody waited; None: this group was there.
        meeting, transfer: see `Clock`.
        sent: bytes of the state that one rank sent or received; 0 if this rank did neither.
        step: seconds from there until the gradients of the first step together were summed.
    """

    late: bool
    rehearsal: float | None
    meeting: float
    transfer: float
    sent: int
    step: float

    def __str__(self) -> str:
        size = f" for {self.sent / GB:.2f} GB of state ({self.rate:.2f} GB/s)" if self.sent else " for its state"
        parts = f"{self.meeting:.2f} s to meet, {self.transfer:.2f} s{size}, {self.step:.2f} s for the step"
        return parts if self.rehearsal is None else f"{parts}; rehearsed before that for {self.rehearsal:.2f} s"

    @property
    def rate(self) -> float:
        """GB/s of the state."""
        return self.sent / GB / max(self.transfer, 1e-9)

    @property
    def metrics(self) -> dict[str, float]:
        """What loggers get."""
        seconds = {"rehearsal": self.rehearsal, "meeting": self.meeting, "transfer": self.transfer, "step": self.step}
        return {f"return_{name}_seconds": value for name, value in seconds.items() if value is not None}
