"""A TrainJob of Kubeflow Trainer v2 (trainer.kubeflow.org/v1alpha1), checked against release 2.2."""

from __future__ import annotations

import json
from typing import Any

from automodel_trainer.tools.launch import shell
from automodel_trainer.tools.launch.job import SAVE_SECONDS, SHARED, Job, clock, yaml_string

_RUNTIME = "torch-distributed"
_CONFIG = "/tmp/run.yaml"


def write(job: Job) -> str:
    """The YAML."""
    cache = job.cache or (f"{SHARED}/cache" if job.volume is not None else "/tmp/amt-cache")
    lines = [*job.title("kubectl create --filename THIS_FILE"), *_header(job)]
    lines += [
        "apiVersion: trainer.kubeflow.org/v1alpha1",
        "kind: TrainJob",
        "metadata:",
        f"  name: {job.name}",
        "spec:",
    ]
    if job.seconds is not None:
        lines += [f"  activeDeadlineSeconds: {job.seconds}  # {clock(job.seconds)}; the run stops itself before"]
    lines += ["  runtimeRef:", f"    name: {_RUNTIME}", "  trainer:"]
    if job.image is not None:
        lines += [f"    image: {yaml_string(job.image)}"]
    lines += [
        f"    numNodes: {job.nodes}",
        "    resourcesPerNode:",
        "      limits:",
        f"        nvidia.com/gpu: {job.gpus}",
        "    env:",
    ]
    for name, value in shell.environment(cache).items():
        lines += [f"      - {{name: {name}, value: {yaml_string(value)}}}"]
    lines += ["    command: [bash, -c]", "    args:", "      - |"]
    lines += [f"        {line}" if line else "" for line in _script(job)]
    lines += ["  # Release 2.2 and later; before, the same things are under podTemplateOverrides.", "  runtimePatches:"]
    lines += _patch(job)
    return "\n".join(lines) + "\n"


def _header(job: Job) -> list[str]:
    return [
        f"# It needs the ClusterTrainingRuntime {_RUNTIME}. How often a pod that ends with 75 (stopped, to be",
        "# resumed) is started again is the runtime's: replicatedJobs[node].template.spec.backoffLimit, and its pods'",
        "# restartPolicy OnFailure.",
    ]


def _script(job: Job) -> list[str]:
    config = job.config.read_text(encoding="utf-8")
    end = "END_OF_RUN"
    while end in config:
        end += "_"
    install = [] if job.image is not None else ["pip install --quiet automodel-trainer"]
    address = None if job.nodes == 1 else '"$PET_MASTER_ADDR"'
    return [
        f"cat > {_CONFIG} <<'{end}'",
        *config.rstrip("\n").split("\n"),
        end,
        *install,
        *shell.NCCL_HINTS,
        "# The runtime's own meeting point (PET_MASTER_ADDR) is used, but the nodes agree on restarts by c10d.",
        *shell.torchrun(job, job.arguments(_CONFIG, job.root), job.root, address, again_after_time=False),
    ]


def _patch(job: Job) -> list[str]:
    pod: dict[str, Any] = {
        "terminationGracePeriodSeconds": SAVE_SECONDS,
        "volumes": [{"name": "dshm", "emptyDir": {"medium": "Memory"}}],
        "containers": [{"name": "node", "volumeMounts": [{"name": "dshm", "mountPath": "/dev/shm"}]}],
    }
    if job.volume is not None:
        pod["volumes"].append({"name": "shared", "persistentVolumeClaim": {"claimName": job.volume}})
        pod["containers"][0]["volumeMounts"].append({"name": "shared", "mountPath": SHARED})
    return [
        "    - manager: automodel-trainer.io/launch",
        "      trainingRuntimeSpec:",
        "        template:",
        "          spec:",
        "            replicatedJobs:",
        "              - name: node",
        "                template:",
        "                  spec:",
        "                    template:",
        "                      spec:",
        f"                        terminationGracePeriodSeconds: {SAVE_SECONDS}  # time to save after SIGTERM",
        "                        volumes:  # NCCL and data workers need more shared memory than the default 64 MiB",
        *(f"                          - {json.dumps(volume)}" for volume in pod["volumes"]),
        "                        containers:",
        "                          - name: node",
        "                            volumeMounts:",
        *(f"                              - {json.dumps(mount)}" for mount in pod["containers"][0]["volumeMounts"]),
    ]
