"""The numeric tests as other processors would run them: `make test-processors`.

Settings of the libraries' kernels and the number of threads vary in pairs: any two values of two of them meet in some
run, which takes 6 runs in place of 24. Every run has another seed of hashes. What this machine lacks is left out, and a
line says so. A few more runs move the results of kernels at random (tests/rounding.py), as processors would that nobody
here has.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time

NUMERIC = [
    "tests/checkpoint/test_changed_schedules.py",
    "tests/checkpoint/test_changed_settings.py",
    "tests/checkpoint/test_resume.py",
    "tests/data/test_chat_datamodule.py",
    "tests/data/test_packing.py",
    "tests/data/test_text_datamodule.py",
    "tests/dropin",
    "tests/lightning/test_modules.py",
    "tests/models",
    "tests/modules",
    "tests/strategies",
    "tests/test_add_an_objective.py",
    "tests/test_limits.py",
    "tests/test_numerics.py",
    "tests/test_trainer.py",
    "tests/tools/test_checkpoint_tools.py",
    "tests/tools/test_generate.py",
    "tests/tools/test_merge.py",
    "tests/tools/test_verify.py",
    "tests/tools/test_verify_choices.py",
    "tests/vlm",
]
NAMES = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "AMT_TEST_THREADS")
PAIRS = [
    ("default", "AVX2", "AVX2", "1"),
    ("default", "AVX512", "AVX512_CORE", "2"),
    ("avx2", "AVX2", "AVX512_CORE", "2"),
    ("avx2", "AVX512", "AVX2", "1"),
    ("avx512", "AVX2", "AVX512_CORE", "1"),
    ("avx512", "AVX512", "AVX2", "2"),
]
ROUNDINGS = ["1:1", "2:2", "3:4"]  # seed, and units in the last place


def runs() -> list[dict[str, str]]:
    """The environments to run in, those that this machine can tell apart."""
    wide, found = has_avx512(), []
    for pair in PAIRS:
        if not wide and "avx512" in pair:
            print(f"skipped: {describe(dict(zip(NAMES, pair)))}: this machine has no AVX-512", flush=True)
            continue
        if not wide and any(value.startswith("AVX512") for value in pair):
            pair = tuple("AVX2" if value.startswith("AVX512") else value for value in pair)
            print(f"this machine has no AVX-512: AVX2 in its place in {describe(dict(zip(NAMES, pair)))}", flush=True)
        found.append(dict(zip(NAMES, pair)))
    found += [{"AMT_TEST_ROUNDING": seed, "AMT_TEST_THREADS": "1"} for seed in ROUNDINGS]
    return [{**run, "PYTHONHASHSEED": str(index)} for index, run in enumerate(found)]


def has_avx512() -> bool:
    """What torch finds if nothing holds it back."""
    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    environment = {key: value for key, value in os.environ.items() if key != "ATEN_CPU_CAPABILITY"}
    return "AVX512" in subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)


def describe(run: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in run.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", default="2", help="test processes side by side")
    parser.add_argument("--only", type=int, help="the index of one run")
    parser.add_argument("paths", nargs="*", default=NUMERIC, help="tests in place of all numeric ones")
    options = parser.parse_args()
    failed, every = [], runs()
    for index, run in enumerate(every):
        if options.only not in (None, index):
            continue
        print(f"\nrun {index} of {len(every)}: {describe(run)}", flush=True)
        started = time.monotonic()
        command = [sys.executable, "-m", "pytest", "-n", options.jobs, "--dist", "loadfile", *options.paths]
        with tempfile.TemporaryDirectory() as cache:  # a header that is compiled for one processor fails on another
            more = {"OMP_NUM_THREADS": run["AMT_TEST_THREADS"], "TORCHINDUCTOR_CACHE_DIR": cache}
            code = subprocess.call(command, env={**os.environ, **more, **run})
        print(f"run {index}: exit code {code} after {time.monotonic() - started:.0f} s", flush=True)
        failed += [describe(run)] if code else []
    print("\n" + ("all green" if not failed else "\n".join(["RED under", *failed])))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
