"""Estimate the minimum time of a compiled kernel's instructions on an H100, from its machine code.

A kernel is memory-bound only if this time is well below the time for its bytes, because dependent instructions are
issued at half the best rate or less. Nothing runs: we need only triton's assembler and disassembler. This is for torch
2.11.0 and its triton.
"""

from __future__ import annotations

import ast
import importlib.util
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

KERNEL = re.compile(
    r"'signature': (?P<types>\{[^{}]*\}).*?"
    r"(?P<code>@triton\.jit\ndef (?P<name>triton_\w+)\(.*?)\n\n\ndef get_args",
    re.DOTALL,
)
HEAD = """import triton
import triton.language as tl
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.triton_helpers import libdevice, math as tl_math

"""
INSTRUCTION = re.compile(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_]+)")
ISSUED = 132 * 4 * 1.6e9  # warp instructions per second: multiprocessors × per clock × clock rate under load
BLOCK = {"XBLOCK": 1024, "YBLOCK": 1}  # elements per program of a kernel without a reduction
ROW = {"XBLOCK": 1, "R0_BLOCK": 2048}  # of a kernel with a reduction, which goes along a row


@dataclass
class Kernel:
    name: str
    code: str
    types: dict[str, str]


def kernels_in(generated: str) -> Iterator[Kernel]:
    """The kernels in code that was compiled with `benchmark_kernel`."""
    for found in KERNEL.finditer(generated):
        yield Kernel(found["name"], found["code"], ast.literal_eval(found["types"]))


def least_seconds(kernel: Kernel) -> float | None:
    """Time at four warp instructions per clock. None for kernels that hold whole rows, which move few bytes."""
    if "_per_" in kernel.name:
        return None
    along_rows = "R0_BLOCK" in kernel.types
    blocks, warps = (ROW, 8) if along_rows else (BLOCK, 4)
    counted, loops = _counted(_disassembled(kernel, blocks, warps))
    if along_rows:
        counted += sum(loops) * -(-_numel(kernel, "r0_") // ROW["R0_BLOCK"])
    axes = [axis for axis in "xy" if f"{axis.upper()}BLOCK" in kernel.types]
    programs = math.prod(-(-_numel(kernel, axis) // blocks[f"{axis.upper()}BLOCK"]) for axis in axes)
    return programs * warps * counted / ISSUED


def _numel(kernel: Kernel, axis: str) -> int:
    found = re.search(rf"\b{axis}numel = (\d+)", kernel.code)
    return int(found[1]) if found else 1  # the compiler leaves out a size of 1


def _disassembled(kernel: Kernel, blocks: dict[str, int], warps: int) -> str:
    constants = {
        name: blocks[name] if name in blocks else _numel(kernel, name.removesuffix("numel"))
        for name, kind in kernel.types.items()
        if kind == "constexpr"
    }
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "kernel.py", Path(folder) / "kernel.cubin"
        source.write_text(HEAD + kernel.code)
        spec: Any = importlib.util.spec_from_file_location("kernel", source)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        function = getattr(module, kernel.name)
        names = list(kernel.types)
        aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in names if name not in constants}
        at = {(names.index(name),): value for name, value in constants.items()}
        made = triton.compile(
            ASTSource(fn=function, signature=kernel.types, constexprs=at, attrs=aligned),
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": warps, "num_stages": 1},
        )
        binary.write_bytes(made.asm["cubin"])
        tool = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/nvdisasm")
        return subprocess.run([tool, "-c", binary], capture_output=True, text=True, check=True).stdout


def _counted(listing: str) -> tuple[int, list[int]]:
    """Instructions outside loops, and in each loop."""
    labels: dict[str, int] = {}
    loops, count = [], 0
    for line in listing.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line.strip()):
            labels[label[1]] = count
        elif found := INSTRUCTION.search(line):
            if found[1] == "NOP":
                continue
            count += 1
            target = re.search(r"\.L_x_\d+", line)
            if found[1] == "BRA" and target and labels.get(target[0], count - 1) < count - 1:
                loops.append(count - labels[target[0]])
    return count - sum(loops), loops
