"""A task of SkyPilot, for `sky jobs launch`; checked against release 0.14."""

from __future__ import annotations

from automodel_trainer.callbacks.preemption import REQUEUE
from automodel_trainer.tools.launch import shell
from automodel_trainer.tools.launch.job import RESTARTS, SHARED, Job, yaml_string

_CONFIG = "/tmp/amt-run.yaml"


def write(job: Job) -> str:
    """The YAML."""
    cache = job.cache or (f"{SHARED}/cache" if job.volume is not None else "/tmp/amt-cache")
    lines = [*job.title(f"sky jobs launch --name {job.name} THIS_FILE")]
    lines += [
        f"name: {job.name}",
        f"num_nodes: {job.nodes}",
        "resources:",
        f"  accelerators: {yaml_string(f'{job.gpu_type}:{job.gpus}')}",
        "  network_tier: best  # the fastest network of the cloud between nodes",
    ]
    if job.image is not None:
        lines += [f"  image_id: {yaml_string('docker:' + job.image)}"]
    lines += [
        "  use_spot: false  # true: cheaper, and a node that is taken away is replaced",
        "  job_recovery:",
        f"    max_restarts_on_errors: {RESTARTS}",
        f"    recover_on_exit_codes: [{REQUEUE}]  # stopped, to be resumed; does not count as an error",
        "file_mounts:",
        f"  {_CONFIG}: {yaml_string(str(job.config))}",
    ]
    if job.volume is not None:
        lines += ["volumes:", f"  {SHARED}: {yaml_string(job.volume)}"]
    lines += ["envs:"]
    lines += [f"  {name}: {yaml_string(value)}" for name, value in shell.environment(cache).items()]
    if job.image is None:
        lines += ["setup: |", "  pip install --quiet automodel-trainer"]
    lines += ["run: |", *(f"  {line}" if line else "" for line in _script(job))]
    return "\n".join(lines) + "\n"


def _script(job: Job) -> list[str]:
    address = None if job.nodes == 1 else '"$HEAD"'
    head = [] if address is None else ['HEAD=$(head -n 1 <<< "$SKYPILOT_NODE_IPS")']
    return [
        *shell.NCCL_HINTS,
        *head,
        *shell.torchrun(job, job.arguments(_CONFIG, job.root), job.root, address),
    ]
