"""Profile a few optimizer steps: write a Chrome trace, and the most expensive kernels as a table and a picture."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

STEPS = 3  # number of optimizer steps to profile
KERNELS = 10  # number of kernels in the table


class Kernel(NamedTuple):
    """A kernel on the device, or an operator on the CPU if there is no device."""

    name: str
    calls: float  # per step
    milliseconds: float  # per step
    share: float  # of the time of all kernels, from 0 to 1


class ProfileSteps(Callback):
    """Profiles `STEPS` optimizer steps and writes the results on rank 0.

    Open `trace.json.gz` in chrome://tracing or https://ui.perfetto.dev. `kernels.md` and `kernels.svg` show the most
    expensive kernels.

    Args:
        folder: the folder to write.
        first: the step after which profiling begins.

    Attributes:
        kernels: the most expensive kernels, once the profile is complete.
    """

    def __init__(self, folder: Path, first: int) -> None:
        self.folder, self.first = folder, first
        self.kernels: list[Kernel] = []
        self._profile: profile | None = None

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Start and stop the profiler."""
        if trainer.global_step == self.first and self._profile is None:
            cuda = trainer.strategy.root_device.type == "cuda"
            self._profile = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])])
            self._profile.start()
        elif trainer.global_step == self.first + STEPS and self._profile is not None and not self.kernels:
            if trainer.strategy.root_device.type == "cuda":
                torch.cuda.synchronize(trainer.strategy.root_device)
            self._profile.stop()
            self.kernels = kernels_of(self._profile, STEPS)
            if trainer.is_global_zero:
                self._write(self._profile)

    def on_train_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Check that the profile is complete.

        Raises:
            ValueError: the run ended too early.
        """
        if not self.kernels:
            if self._profile is not None:
                self._profile.stop()
            raise ValueError(
                f"The run ended after {trainer.global_step} optimizer step(s), but --profile needs {STEPS} steps after "
                f"step {self.first}: lower --steps or --warmup, or use more data or epochs."
            )

    def _write(self, profiled: profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        profiled.export_chrome_trace(str(self.folder / "trace.json.gz"))
        (self.folder / "kernels.md").write_text(table(self.kernels))
        (self.folder / "kernels.svg").write_text(picture(self.kernels))


def kernels_of(profiled: profile, steps: int, most: int = KERNELS) -> list[Kernel]:
    """The kernels with the most time of their own (without the time of kernels that they call).

    Args:
        profiled: a profiler that has stopped.
        steps: number of profiled steps.
        most: maximum number of kernels.
    """
    averages = [event for event in profiled.key_averages() if not getattr(event, "is_user_annotation", False)]
    on_device = [event for event in averages if event.device_type == DeviceType.CUDA]
    times = [(e.self_device_time_total if on_device else e.self_cpu_time_total, e) for e in on_device or averages]
    total = sum(microseconds for microseconds, _ in times)
    largest = sorted(times, key=lambda pair: -pair[0])[:most]
    return [Kernel(e.key, e.count / steps, us / 1e3 / steps, us / total) for us, e in largest if us > 0]


def table(kernels: list[Kernel]) -> str:
    """The kernels as a Markdown table."""
    lines = ["| kernel | calls per step | ms per step | share |", "| --- | ---: | ---: | ---: |"]
    for kernel in kernels:
        name = kernel.name if len(kernel.name) <= 80 else kernel.name[:79] + "…"
        name = name.replace("|", "\\|")
        lines.append(f"| `{name}` | {kernel.calls:,.0f} | {kernel.milliseconds:.2f} | {kernel.share:.1%} |")
    return "\n".join(lines) + "\n"


def picture(kernels: list[Kernel], title: str = "Most expensive kernels, ms per step") -> str:
    """The kernels as an SVG bar chart."""
    row, left, width = 26, 380, 420
    longest = max((kernel.milliseconds for kernel in kernels), default=1.0)
    height = row * (len(kernels) + 2)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 130}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="12" y="20" font-size="14" font-weight="bold">{escape(title)}</text>',
    ]
    for index, kernel in enumerate(kernels):
        y = row * (index + 1) + 10
        name = kernel.name if len(kernel.name) <= 52 else kernel.name[:51] + "…"
        length = max(1.0, width * kernel.milliseconds / longest)
        parts += [
            f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{row - 8}" fill="#4477aa"/>',
            f'<text x="{left + length + 6:.1f}" y="{y + 14}">{kernel.milliseconds:.2f} ({kernel.share:.1%})</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"
