"""`amt launch`: golden files, quoting, what is refused, and what the scripts do when they run."""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import stat
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from automodel_trainer.checkpoint.remote import scratch
from automodel_trainer.tools.launch.check import check
from automodel_trainer.tools.launch.command import WRITERS, main
from automodel_trainer.tools.launch.job import Job, max_time_below, name_of, seconds_of

GOLDEN = Path(__file__).parent / "launch"
RUN = """# A run with $HOME and `ticks`.
trainer:
  strategy: hsdp:dp_replicate=4
  default_root_dir: "runs/my $run"
model:
  model: org/model
data:
  train: org/chats
  micro_batch_size: 1
  global_batch_size: 64
"""
ODD = 'it\'s "my" $HOME `run` \\ #1'


@pytest.fixture
def job(tmp_path: Path) -> Job:
    config = tmp_path / "run.yaml"
    config.write_text(RUN)
    return Job(config, "my-run", 4, 8, "runs/my $run", layout="dp_replicate 4 x dp_shard 8")


JOBS: dict[str, dict[str, Any]] = {
    "slurm.sh": {"seconds": 14400, "max_time": "00:03:50:00", "partition": "gpu", "account": "lab"},
    "slurm_container.sh": {"image": "org/image:1", "options": ("--trainer.max_steps", "100"), "nodes": 1},
    "torchrun.sh": {"nodes": 1, "notes": ("data.train is chats.jsonl",)},
    "torchrun_container.sh": {"image": "org/image:1", "cache": "/scratch/my cache"},
    "kubernetes.yaml": {"root": "/shared/runs/my $run", "volume": "claim", "image": "org/image:1"},
    "kubernetes_time.yaml": {"root": "s3://bucket/run", "seconds": 14400, "max_time": "00:03:50:00", "nodes": 1},
    "skypilot.yaml": {"root": "/shared/runs/my $run", "volume": "disk", "image": "org/image:1"},
    "skypilot_plain.yaml": {"root": "s3://bucket/run", "nodes": 1, "gpu_type": "A100"},
}


def written(job: Job, golden: str) -> str:
    return WRITERS[golden.partition(".")[0].partition("_")[0]](replace(job, **JOBS[golden]))


@pytest.mark.parametrize("golden", JOBS)
def test_golden_files(golden: str, job: Job) -> None:
    """`AMT_WRITE_GOLDEN=1` writes them again, to be read before they are committed."""
    text = written(job, golden).replace(str(job.config.parent), "/home/me")
    if os.environ.get("AMT_WRITE_GOLDEN"):
        (GOLDEN / golden).write_text(text)
    assert text == (GOLDEN / golden).read_text()


def script_of(kind: str, text: str) -> str:
    """The shell script of a launch file."""
    if kind in ("slurm", "torchrun"):
        return text
    content = yaml.safe_load(text)
    return content["run"] if kind == "skypilot" else content["spec"]["trainer"]["args"][0]


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("image", [None, ODD])
def test_odd_names_stay_what_they_are(kind: str, image: str | None, job: Job, tmp_path: Path) -> None:
    """Bash parses every script, and the program gets the words as they were."""
    folder = tmp_path / ODD
    folder.mkdir()
    config = folder / "run.yaml"
    config.write_text(RUN + "# END_OF_RUN\nEND_OF_RUN\n")
    odd = replace(job, config=config, root=f"/shared/{ODD}", options=("--model.model", ODD), cache=f"/c/{ODD}")
    text = WRITERS[kind](replace(odd, image=image, notes=(f"{ODD}\nrm -rf /",)))
    script = script_of(kind, text)
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\nrm -rf" not in text
    for line in script.splitlines():
        if "--model.model" in line:
            words = shlex.split(line.rstrip("& \\"))
            assert words[words.index("--model.model") + 1] == ODD
            break
    else:
        raise AssertionError(script)
    if kind == "kubernetes":
        between = script.partition("<<'END_OF_RUN_'\n")[2].partition("\nEND_OF_RUN_\n")[0]
        assert between + "\n" == config.read_text()
    if kind == "skypilot":
        assert yaml.safe_load(text)["file_mounts"] == {"/tmp/amt-run.yaml": str(config)}


def test_a_trainjob_has_the_fields_of_its_schema(job: Job) -> None:
    """As in the custom resource definition of Kubeflow Trainer 2.2."""
    content = yaml.safe_load(written(job, "kubernetes.yaml"))
    assert content["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
    assert set(content) == {"apiVersion", "kind", "metadata", "spec"}
    spec = content["spec"]
    assert set(spec) == {"runtimeRef", "trainer", "runtimePatches"}
    assert set(spec["trainer"]) == {"image", "numNodes", "resourcesPerNode", "env", "command", "args"}
    assert spec["trainer"]["resourcesPerNode"] == {"limits": {"nvidia.com/gpu": 8}}
    assert {variable["name"] for variable in spec["trainer"]["env"]} >= {"AMT_CACHE", "HF_HOME"}
    assert all(isinstance(variable["value"], str) for variable in spec["trainer"]["env"])
    (patch,) = spec["runtimePatches"]
    assert set(patch) == {"manager", "trainingRuntimeSpec"}
    (replicated,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    assert set(replicated) == {"name", "template"}
    pod = replicated["template"]["spec"]["template"]["spec"]
    assert set(pod) == {"terminationGracePeriodSeconds", "volumes", "containers"}
    mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]} == {"dshm", "shared"}
    assert yaml.safe_load(written(job, "kubernetes_time.yaml"))["spec"]["activeDeadlineSeconds"] == 14400


def test_a_task_of_skypilot_has_the_fields_of_its_schema(job: Job) -> None:
    """As in `sky/utils/schemas.py` of release 0.14; `sky.Task.from_yaml` took these files."""
    content = yaml.safe_load(written(job, "skypilot.yaml"))
    assert set(content) == {"name", "num_nodes", "resources", "file_mounts", "volumes", "envs", "run"}
    resources = content["resources"]
    assert set(resources) == {"accelerators", "network_tier", "image_id", "use_spot", "job_recovery"}
    assert resources["accelerators"] == "H100:8"
    assert resources["job_recovery"] == {"max_restarts_on_errors": 3, "recover_on_exit_codes": [75]}
    assert all(isinstance(value, str) for value in content["envs"].values())


# --- what the scripts do ----------------------------------------------------------------------------------------------


def run_script(kind: str, script: str, folder: Path, program: str, **environment: str) -> subprocess.Popen[bytes]:
    """Start a script with stand-ins for the programs that it calls: they are `program`, with their name as NAME."""
    for name in ("torchrun", "srun", "scontrol"):
        stand_in = folder / "bin" / name
        stand_in.parent.mkdir(exist_ok=True)
        stand_in.write_text(f"#!/bin/bash\nNAME={name}\n{program}\n")
        stand_in.chmod(stand_in.stat().st_mode | stat.S_IXUSR)
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    variables = {**os.environ, "PATH": path, "HOME": str(folder), "SLURM_JOB_ID": "7", **environment}
    return subprocess.Popen(["bash", "-c", script], cwd=folder, env=variables, start_new_session=True)


@pytest.mark.parametrize(
    ("kind", "program", "code"),
    [
        ("torchrun", "exit 0", 0),
        ("torchrun", "exit 1", 1),
        ("torchrun", "mkdir -p 'runs/my $run'; echo max_time > 'runs/my $run/requeue'", 75),
        ("kubernetes", "mkdir -p 'runs/my $run'; echo SIGTERM > 'runs/my $run/requeue'", 75),
        ("kubernetes", "mkdir -p 'runs/my $run'; echo max_time > 'runs/my $run/requeue'", 0),
        ("skypilot", "mkdir -p 'runs/my $run'; echo max_time > 'runs/my $run/requeue'", 75),
    ],
)
def test_a_stopped_run_ends_with_75(kind: str, program: str, code: int, job: Job, tmp_path: Path) -> None:
    one = replace(job, nodes=1, image=None if kind == "torchrun" else "image")
    process = run_script(kind, script_of(kind, WRITERS[kind](one)), tmp_path, program)
    assert process.wait(60) == code


def test_the_marker_of_a_run_in_object_storage(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lies where the run leaves it: below the cache."""
    monkeypatch.setenv("AMT_CACHE", str(tmp_path / "cache"))
    folder = scratch("s3://bucket/run")
    program = f"mkdir -p {folder}; echo SIGTERM > {folder}/requeue"
    script = WRITERS["torchrun"](replace(job, nodes=1, root="s3://bucket/run"))
    assert run_script("torchrun", script, tmp_path, program).wait(60) == 75


def test_a_signal_reaches_the_ranks_and_the_script_waits_for_them(job: Job, tmp_path: Path) -> None:
    program = "trap 'sleep 0.3; touch saved; exit 0' TERM\ntouch started\nwhile true; do sleep 0.05; done"
    process = run_script("torchrun", WRITERS["torchrun"](replace(job, nodes=1)), tmp_path, program)
    end = time.monotonic() + 60
    while not (tmp_path / "started").exists() and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize(("code", "queued"), [(75, True), (0, False), (1, False)])
def test_slurm_queues_a_stopped_run_again(code: int, queued: bool, job: Job, tmp_path: Path) -> None:
    program = f'if [ $NAME = srun ]; then printf "%s\\n" "$@" > words; exit {code}; fi; echo "$@" > queued'
    process = run_script("slurm", WRITERS["slurm"](job), tmp_path, program)
    assert process.wait(60) == code
    assert (tmp_path / "queued").exists() == queued
    words = (tmp_path / "words").read_text().split("\n")
    assert words[:4] == ["--kill-on-bad-exit=0", "amt", "fit", "--config"]
    if queued:
        assert (tmp_path / "queued").read_text() == "requeue 7\n"


# --- what is checked --------------------------------------------------------------------------------------------------


def launch(folder: Path, *options: str, run: str = RUN) -> None:
    config = folder / "run.yaml"
    config.write_text(run)
    main(["--config", str(config), *options])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--nodes", "3", "--gpus", "5"], "dp_replicate=4 does not fit 3 × 5 = 15 GPUs.*--nodes 3 --gpus 4"),
        (["--trainer.strategy", "fsdp2:tp=3"], r"tp=3 does not fit 4 × 8 = 32 GPUs.*--nodes \d+ --gpus \d+"),
        (["--trainer.strategy", "fsdp2:dp_shard=16"], "dp_shard=16 does not fit.*Sizes that work: --nodes 2 --gpus 8"),
        (["--trainer.strategy", "fsdp2:ep=3"], r"ep=3 must divide .* = 32"),
        (["--data.global_batch_size", "48"], "global_batch_size=48 .*The nearest sizes that work: 32 or 64"),
        (["--ckpt_path", "runs/a/step-00000100"], "would be taken again at every start"),
        (["--time", "4h"], "'4h' is not a time limit. Write HH:MM:SS"),
        (["--time", "00:05:00"], "too short"),
        (["--gpus", "0"], "--gpus 0 must be at least 1"),
        (["--partition", "a b"], "--partition 'a b' is no name of Slurm"),
        (["--to", "kubernetes"], "would be lost with the machine"),
        (["--to", "kubernetes", "--volume", "c", "--trainer.default_root_dir", "/home/me"], "mounted at /shared"),
        (["--to", "skypilot", "--time", "04:00:00"], "SkyPilot has none"),
    ],
)
def test_what_does_not_fit_is_refused(options: list[str], said: str, tmp_path: Path) -> None:
    given = ["--to", "slurm", "--nodes", "4", "--gpus", "8", *options]
    run = RUN.replace("hsdp:dp_replicate=4", "fsdp2") if "--data.global_batch_size" in options else RUN
    with pytest.raises(ValueError, match=said):
        launch(tmp_path, *given, run=run)


def test_sizes_that_are_said_to_work_do(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(RUN)
    with pytest.raises(ValueError, match="Sizes that work") as refused:
        check(config, ["--trainer.strategy", "3d:pp=3,tp=2", "--data.global_batch_size", "720"], 4, 8)
    sizes = str(refused.value).partition("Sizes that work: ")[2].rstrip(".").split(", ")
    assert len(sizes) == 3
    for size in sizes:
        _, nodes, _, gpus = size.split()
        assert int(nodes) * int(gpus) % 6 == 0
        check(config, ["--trainer.strategy", "3d:pp=3,tp=2", "--data.global_batch_size", "720"], int(nodes), int(gpus))


def test_a_file_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "chats.jsonl").write_text("")
    run = RUN.replace("org/chats", json.dumps(str(tmp_path / "chats.jsonl")))
    out = tmp_path / "job.sh"
    launch(tmp_path, "--to", "slurm", "--nodes", "4", "--time", "04:00:00", "--out", str(out), run=run)
    text = out.read_text()
    assert "# my-run: 4 x 8 GPUs, dp_replicate 4 x dp_shard 8." in text
    assert "--trainer.max_time 00:03:50:00 --ckpt_path auto" in text
    said = capsys.readouterr()
    assert str(out) in said.out
    assert f"data.train is {tmp_path / 'chats.jsonl'}, a path of the machine that wrote this" in said.err
    assert said.err.partition("data.train is ")[2].strip().rstrip(".") in text
    assert logging.getLogger("lightning.pytorch").level != logging.ERROR  # as long as the run is checked


def test_a_shorter_limit_of_the_run_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launch(tmp_path, "--to", "slurm", "--nodes", "4", "--time", "1-00:00:00", "--trainer.max_time", "00:02:00:00")
    text = capsys.readouterr().out
    assert text.count("--trainer.max_time") == 1
    assert "#SBATCH --time=24:00:00" in text


def test_times_and_names() -> None:
    assert seconds_of("1-02:03:04") == 93784
    assert max_time_below(14400) == "00:03:50:00"
    assert max_time_below(1800) == "00:00:27:00"
    assert max_time_below(90000) == "01:00:50:00"
    assert [name_of(text) for text in ("my $run", "8B sft", "", "a" * 80)] == ["my-run", "run-8b-sft", "run", "a" * 50]
