"""The parts of shell scripts that launch files share: the environment, and torchrun with its end."""

from __future__ import annotations

import shlex

from automodel_trainer.callbacks.preemption import REQUEUE, TIME
from automodel_trainer.tools.launch.job import PORT, RESTARTS, SAVE_SECONDS, Job, marker

CONTAINER_CONFIG = "/run.yaml"
"""Where a container that this machine's tools start finds the YAML."""
_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


def environment(cache: str) -> dict[str, str]:
    """Variables of every rank.

    Args:
        cache: a folder that all nodes see: tokens and proofs are made once, models are downloaded once.
    """
    return {
        "AMT_CACHE": f"{cache}/automodel_trainer",
        "HF_HOME": f"{cache}/huggingface",
        "OMP_NUM_THREADS": "8",
        "NCCL_DEBUG": "WARN",
    }


NCCL_HINTS = [
    "# NCCL finds its network by itself. Where it picks a wrong one, name yours (`ip -brief address` lists them):",
    "# export NCCL_SOCKET_IFNAME=eth0 NCCL_IB_HCA=mlx5 GLOO_SOCKET_IFNAME=eth0",
]


def exports(cache: str) -> list[str]:
    """The environment as lines of a script; what is set already stays."""
    lines = ["# Shared by all nodes: tokens are made once, models are downloaded once."]
    for name, value in environment(cache).items():
        lines.append(f'export {name}="${{{name}:-{_inside_quotes(value)}}}"')
    return [*lines, 'mkdir -p "$AMT_CACHE" "$HF_HOME"', *NCCL_HINTS]


TAKE_IN = [
    "# A node that was lost and is back must be told where the ranks meet. torchrun says so in the first round only,",
    "# unless each round has a store of its own.",
    "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
]


def rendezvous(job: Job, address: str) -> str:
    """Options of torchrun by which several nodes meet, and wait for one that was lost.

    Args:
        job: the run.
        address: of the first node, as a word of a shell.
    """
    return (
        f"--nnodes {job.nodes} --rdzv-backend c10d --rdzv-endpoint {address}:{PORT} "
        f"--rdzv-id {shlex.quote(job.name)} --rdzv-conf join_timeout=1800"
    )


def torchrun(job: Job, arguments: str, root: str, address: str | None, *, again_after_time: bool = True) -> list[str]:
    """Start this node's ranks, pass signals on, and end with 75 if the run waits to be resumed.

    Args:
        job: the run.
        arguments: of `amt`, quoted.
        root: the run's folder as this node sees it, or a URL.
        address: of the first node, as a word of a shell; None: there is one node.
        again_after_time: whether a run whose time is over gets new time when it is started again.
    """
    meeting = "--standalone" if address is None else rendezvous(job, address)
    return [
        *([] if address is None else TAKE_IN),
        f"# A crash starts all ranks again, {RESTARTS} times, from the newest whole checkpoint. A signal saves, ends.",
        f"torchrun {meeting} \\",
        f"  --nproc-per-node {job.gpus} --max-restarts {RESTARTS} --shutdown-timeout {SAVE_SECONDS} \\",
        f"  --signals-to-handle {_SIGNALS} \\",
        f"  -m automodel_trainer {arguments} &",
        "torchrun=$!",
        'for name in TERM INT USR1; do trap "kill -$name $torchrun" "$name"; done',
        'while kill -0 "$torchrun" 2>/dev/null; do wait "$torchrun"; done',
        'wait "$torchrun"',
        "code=$?",
        f"# torchrun ends with 0 when a signal or max_time stopped the run. A file says so: {REQUEUE}, again.",
        *_again(marker(root), again_after_time),
        'exit "$code"',
    ]


def _again(marker: str, after_time: bool) -> list[str]:
    if after_time:
        return [f'if [ "$code" -eq 0 ] && [ -e {marker} ]; then code={REQUEUE}; fi']
    return [
        "# After max_time it ends with 0: this job has no time left. Create it again to go on.",
        f'if [ "$code" -eq 0 ] && [ -e {marker} ] && ! grep -q {TIME} {marker}; then code={REQUEUE}; fi',
    ]


def _inside_quotes(value: str) -> str:
    """A value between double quotes, in which only `$HOME` at the beginning is a variable."""
    home = value.startswith("$HOME/")
    rest = value.removeprefix("$HOME") if home else value
    for character in ("\\", '"', "$", "`"):
        rest = rest.replace(character, "\\" + character)
    return ("$HOME" if home else "") + rest.replace("}", "\\}")
