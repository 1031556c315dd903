"""A batch script for Slurm: srun starts one process per GPU, and Slurm queues a stopped run again."""

from __future__ import annotations

import shlex

from automodel_trainer.callbacks.preemption import REQUEUE
from automodel_trainer.tools.launch import shell
from automodel_trainer.tools.launch.job import SAVE_SECONDS, Job, clock


def write(job: Job) -> str:
    """The script."""
    lines = ["#!/bin/bash", *job.title("sbatch THIS_FILE")]
    lines += [f"#SBATCH --job-name={job.name}"]
    lines += [f"#SBATCH --nodes={job.nodes} --ntasks-per-node={job.gpus} --gpus-per-node={job.gpus}"]
    lines += [f"#SBATCH --{name}={value}" for name, value in _of_the_site(job)]
    if job.seconds is not None:
        lines += [f"#SBATCH --time={clock(job.seconds)}"]
    lines += [
        "#SBATCH --requeue --open-mode=append --output=%x-%j.log",
        f"#SBATCH --signal=USR1@{SAVE_SECONDS}   # before the limit, and where the site sends it, before a preemption",
        "",
        *shell.exports(job.cache or "$HOME/.cache"),
        "",
        "# Every rank is a task: the Trainer finds the others in Slurm's variables. SIGUSR1 saves, and queues this job",
        "# again; max_time is below the limit by the time to start, so it saves first where no signal comes.",
        "# A rank that dies is noticed by the others (Watchdog), so Slurm must not kill them: code 75 would be lost.",
        "srun --kill-on-bad-exit=0 \\",
    ]
    config = str(job.config)
    if job.image is not None:  # by NVIDIA's pyxis
        mounts = '"$PWD:$PWD,$AMT_CACHE:$AMT_CACHE,$HF_HOME:$HF_HOME,"'
        mounts += shlex.quote(f"{config}:{shell.CONTAINER_CONFIG}:ro")
        lines += [f'  --container-image={shlex.quote(job.image)} --container-workdir="$PWD" \\']
        lines += [f"  --container-mounts={mounts} \\"]
        config = shell.CONTAINER_CONFIG
    lines += [
        f"  amt {job.arguments(config)}",
        "code=$?",
        f"# {REQUEUE}: stopped by SIGTERM or max_time, to be started again. 0: done, or Slurm has queued it already.",
        f'if [ "$code" -eq {REQUEUE} ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
        'exit "$code"',
    ]
    return "\n".join(lines) + "\n"


def _of_the_site(job: Job) -> list[tuple[str, str]]:
    given = (("partition", job.partition), ("account", job.account))
    return [(name, value) for name, value in given if value is not None]
