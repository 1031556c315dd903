"""Show the kernels that the compiler generates for one llama-8B block on an H100, and the bytes that each moves.

    python benchmarks/block_kernels.py                  # with LoRA, in bf16
    python benchmarks/block_kernels.py --fp8            # frozen weights in fp8
    python benchmarks/block_kernels.py --full --fp8     # all parameters trained, in fp8
    python benchmarks/block_kernels.py --instructions   # also the minimum time of their instructions

We trace the block with fake tensors and lower it for an H100. Nothing runs, so no GPU is needed. A memory-bound kernel
takes about its bytes divided by the device's copy rate (3 TB/s), so we can judge a change without a GPU. The bytes are
the compiler's own count, which misses reads through a buffer that is written in place. The script needs torch 2.11
built for CUDA (it installs without a GPU) and its triton.

It uses private names of torch 2.11.0.
"""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch._inductor.compile_fx as compile_fx
import torch._inductor.config as inductor
import torch._subclasses.fake_tensor as fake_tensor
import transformers
import triton
from machine_code import kernels_in, least_seconds
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import scheduler
from torch._inductor.debug import DebugContext
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from triton.backends.compiler import GPUTarget

from automodel_trainer.models.kernels.choose import KernelsConfig, apply_kernels
from automodel_trainer.models.kernels.fp8 import convert_to_fp8
from automodel_trainer.models.lora import LoRAConfig, apply_lora, finish_lora, fused, fused_fp8
from automodel_trainer.models.lora.layers import let_adapters_cast
from automodel_trainer.models.quantization import _torchao, fp8_weight
from automodel_trainer.models.quantization import fp8_shared_input as fp8_together
from automodel_trainer.nn._torch import FAST_MATH
from automodel_trainer.strategies.base.compile import compile_blocks

ROWS, LENGTH = 2, 4096
COPIED = 3.0e12  # bytes per second
H100: dict[str, Any] = {
    "major": 9,
    "minor": 0,
    "multi_processor_count": 132,
    "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048,
    "warp_size": 32,
}
CPU = torch.device("cpu")

# --- what is not looked at -------------------------------------------------------------------------------------------


@torch.library.custom_op("block_kernels::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q)


@torch.library.custom_op("block_kernels::attention_backward", mutates_args=())
def attention_backward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    def laid_out(x: Tensor) -> Tensor:  # like cuDNN's outputs
        return torch.empty_like(x.transpose(1, 2).contiguous()).transpose(1, 2)

    return laid_out(q), laid_out(k), laid_out(v)


@torch.library.custom_op("block_kernels::matmul_into", mutates_args=(), tags=[torch.Tag.flexible_layout])
def matmul_into(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(a.shape[0], b.shape[1], dtype=dtype, device=a.device)


@torch.library.custom_op("block_kernels::fp8_matmul", mutates_args=())
def fp8_matmul(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor) -> Tensor:
    assert a.stride(1) == b.stride(0) == 1, "units for fp8 take both along what is summed"
    return torch.empty(a.shape[0], b.shape[1], dtype=torch.bfloat16, device=a.device)


for operation in (attention, attention_backward, matmul_into, fp8_matmul):
    operation.register_fake(operation._init_fn)
attention.register_autograd(
    lambda ctx, _: attention_backward(*ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
ALL_ATTENTION_FUNCTIONS["block_kernels"] = lambda _, q, k, v, *args, **kwargs: (
    attention(q, k, v).transpose(1, 2),
    None,
)

# --- lowering for a device that is not there --------------------------------------------------------------------------


class Driver:
    """The driver that triton asks for its target."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def is_active(self) -> bool:
        return True


def lower(graph: torch.fx.GraphModule, inputs: Sequence[Tensor], **options: Any) -> str:
    """The code that would run `graph`, which was traced for a CPU, on a GPU."""
    gpu, mode = torch.device("cuda", 0), torch._guards.detect_fake_mode(inputs)
    graph = torch.fx.GraphModule(graph, copy.deepcopy(graph.graph))
    for node in graph.graph.nodes:
        node.kwargs = {key: gpu if key == "device" else value for key, value in node.kwargs.items()}
    with mode:
        moved = [
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=gpu) if isinstance(t, Tensor) else t
            for t in inputs
        ]
    FakeTensorProp(graph, mode=mode).propagate_dont_convert_inputs(*moved)
    compile_fx.record_original_output_strides(graph)
    compile_fx.view_to_reshape(graph)
    with V.set_fake_mode(mode):
        post_grad_passes(graph, is_inference=False)
    lowering = GraphLowering(
        graph, example_inputs=moved, shape_env=mode.shape_env, is_backward=options.get("is_backward", False)
    )
    with V.set_fake_mode(mode), V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()):
        lowering.run(*moved)
        return str(lowering.codegen()[0].value)


def backend(found: list[tuple[bool, str]]) -> Callable[..., Any]:
    """A backend of `torch.compile` that stores the code for a GPU and runs the graph eagerly."""
    device = DeviceProperties(
        type="cuda", index=0, cc=90, max_threads_per_block=1024,
        **{key: value for key, value in H100.items() if key != "minor"},
    )  # fmt: skip

    def inner(graph: torch.fx.GraphModule, inputs: Sequence[Tensor], **options: Any) -> Any:
        with (
            patch.object(torch.cuda, "is_available", lambda: True),
            patch.object(torch.cuda, "device_count", lambda: 1),
            patch.object(torch.cuda, "current_device", lambda: 0),
            patch.object(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(name="H100", **H100)),
            patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)),
            patch.object(scheduler, "has_triton", lambda: True),
            patch.object(CudaInterface, "current_device", lambda: 0),
            patch.object(CudaInterface, "get_device_properties", lambda *_: SimpleNamespace(name="H100", **H100)),
            patch.object(CudaInterface, "get_compute_capability", lambda *_: 90),
            patch.object(DeviceProperties, "create", lambda *_: device),
            patch.object(fake_tensor, "init_gpu_context", lambda *_: None),
        ):
            found.append((bool(options.get("is_backward")), lower(graph, inputs, **options)))

        def run(arguments: list[Any]) -> Any:
            return torch.fx.Interpreter(graph).run(*arguments)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    return lambda graph, inputs: compile_fx.compile_fx(graph, inputs, inner_compile=inner)


def generated(fp8: bool, full: bool, gathered: bool) -> list[tuple[bool, str]]:
    """For every graph of the block: whether it is the backward's, and its code.

    Args:
        fp8: weights are multiplied in fp8.
        full: train all parameters, without adapters.
        gathered: weights are gathered in fp8.
    """
    found: list[tuple[bool, str]] = []
    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=1, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=128,
    )  # fmt: skip
    with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.config._attn_implementation = "block_kernels"
        if not full:
            apply_lora(model, LoRAConfig(rank=16, alpha=32), torch.bfloat16, torch.float32)
            let_adapters_cast(model, torch.bfloat16)
        if fp8:
            convert_to_fp8(model, "tensorwise", CPU, emulate=True)
        apply_kernels(model, KernelsConfig(attention="block_kernels", lora="auto" if full else "fused"), CPU)
        finish_lora(model)
        if gathered:
            give_codes(model)
        compile_blocks(model.train(), backend(found))
        x = torch.empty(ROWS, LENGTH, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        positions = torch.arange(LENGTH)[None].expand(ROWS, -1)
        rotary = model.model.rotary_emb(x.detach(), positions)
        out = model.model.layers[0](x, attention_mask=None, position_ids=positions, position_embeddings=rotary)
        out.backward(torch.empty_like(out))
    return found


def give_codes(model: torch.nn.Module) -> None:
    """Weights in the form that FSDP2 gathers in fp8."""
    for layer in model.modules():
        if isinstance(layer, fp8_together.Fp8Linear):
            codes = torch.empty(layer.weight.shape, dtype=torch.float8_e4m3fn)
            weight = _torchao.fp8_weight(codes, torch.ones(()), torch.bfloat16, layer)
            layer.weight = torch.nn.Parameter(weight)


def calls(code: str) -> list[tuple[str, float | None]]:
    """The calls in the code, in order, with the bytes that each compiled kernel moves."""
    pattern = r"async_compile\.triton\('(\w+)'.*?'kernel_num_gb': ([\d.e-]+)"
    moved = {name: float(gigabytes) * 1e9 for name, gigabytes in re.findall(pattern, code, re.DOTALL)}
    start = code.index("class Runner")
    body = code[start : code.index("def get_args()", start)]
    names = re.findall(r"^\s+(?:\w+ = )?(triton_\w+|extern_kernels\.\w+|torch\.ops\.[\w.]+)(?=\.run\(|\()", body, re.M)
    return [(name, moved.get(name)) for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fp8", action="store_true", help="frozen weights held in fp8, tensorwise")
    parser.add_argument("--full", action="store_true", help="train all parameters")
    parser.add_argument("--gathered", action="store_true", help="with --full --fp8: weights come in fp8")
    parser.add_argument("--instructions", action="store_true", help="see machine_code.py; a minute more")
    arguments = parser.parse_args()
    triton.runtime.driver.set_active(Driver())
    fused.matmul_into = fused_fp8.matmul_into = matmul_into  # type: ignore[attr-defined]
    for module in (fp8_together, fp8_weight, fused_fp8):
        module.scaled_matmul = lambda *args, **_: fp8_matmul(*args[:4])  # type: ignore[attr-defined]
    total = 0.0
    with inductor.patch(fx_graph_cache=False, benchmark_kernel=True, compile_threads=1, **FAST_MATH):
        graphs = generated(arguments.fp8, arguments.full, arguments.gathered)
    for backward, code in graphs:
        print("backward" if backward else "forward")
        least = {k.name: least_seconds(k) for k in kernels_in(code)} if arguments.instructions else {}
        for name, moved in calls(code):
            total += moved or 0.0
            figures = "" if moved is None else f"{moved / 1e6:7.0f} MB {moved / COPIED * 1e6:5.0f} µs"
            seconds = least.get(name)
            figures += "" if seconds is None else f"  instructions {seconds * 1e6:5.0f} µs"
            print(f"  {figures:<{40 if arguments.instructions else 18}}  {name}")
    print(f"{total / 1e9:.2f} GB in all, {total / COPIED * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
