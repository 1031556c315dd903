"""A script that is started on every machine by hand, or by a tool such as ssh."""

from __future__ import annotations

import shlex

from automodel_trainer.tools.launch import shell
from automodel_trainer.tools.launch.job import Job


def write(job: Job) -> str:
    """The script."""
    address = None if job.nodes == 1 else '"$HEAD"'
    how = "bash THIS_FILE" if job.nodes == 1 else "on every machine: HEAD=first-machine bash THIS_FILE"
    lines = ["#!/bin/bash", *job.title(how), "", *shell.exports(job.cache or "$HOME/.cache")]
    if job.nodes > 1:
        lines += [': "${HEAD:?set HEAD to the name or address of the first machine}"']
    config = str(job.config)
    if job.image is not None:
        lines += ["", *_enter(job.image, config)]
        config = shell.CONTAINER_CONFIG
    lines += ["", *shell.torchrun(job, job.arguments(config), job.root, address)]
    return "\n".join(lines) + "\n"


def _enter(image: str, config: str) -> list[str]:
    """Run this script again inside of a container."""
    return [
        'if [ -z "${AMT_INSIDE:-}" ]; then',
        "  # This file runs again inside of the container.",
        "  exec docker run --rm --init --gpus all --network host --ipc host --ulimit memlock=-1 \\",
        '    --env AMT_INSIDE=1 --env HEAD="${HEAD:-}" --env AMT_CACHE --env HF_HOME --env OMP_NUM_THREADS \\',
        '    --env NCCL_DEBUG --volume "$PWD:$PWD" --workdir "$PWD" \\',
        '    --volume "$AMT_CACHE:$AMT_CACHE" --volume "$HF_HOME:$HF_HOME" \\',
        f"    --volume {shlex.quote(f'{config}:{shell.CONTAINER_CONFIG}:ro')} \\",
        f'    --volume "$(realpath "$0"):/launch.sh:ro" {shlex.quote(image)} bash /launch.sh',
        "fi",
    ]
