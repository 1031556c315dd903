"""The arguments of transformers' `from_pretrained`: what each of them means here.

Every argument is one of four kinds. Most are honoured. Some say nothing any more, and transformers ignores them too.
Some ask for what only transformers does; a call with one of these is transformers' own, and with a strategy, adapters
or kernels it is refused. All others are attributes of the model's config.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from automodel_trainer.nn.text import listed

HUB = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
"""Arguments that say where files come from."""

# Without effect in transformers, or on how files are read that are not read here (pickle).
_WITHOUT_EFFECT = {
    "low_cpu_mem_usage", "offload_state_dict", "weights_only", "disable_mmap", "mirror", "_fast_init", "_from_auto",
    "_from_pipeline", "_commit_hash",
}  # fmt: skip

_PLACED = "A strategy places the weights itself"
_LAYOUT = "Write the layout as strategy='fsdp2:tp=2'"
# What only transformers does, with what to do instead.
_OF_TRANSFORMERS = {
    "quantization_config": "To train adapters on 4-bit weights, give lora=LoRAConfig(quantize='nf4')",
    "device_map": _PLACED,
    "max_memory": _PLACED,
    "offload_folder": "FSDP2Strategy(cpu_offload=True) keeps weights in host memory",
    "offload_buffers": "FSDP2Strategy(cpu_offload=True) keeps weights in host memory",
    "distributed_config": _LAYOUT,
    "device_mesh": _LAYOUT,
    "tp_plan": "Give FSDP2Strategy(tp=…, tp_plan=…)",
    "tp_size": _LAYOUT,
    "use_kernels": "Choose kernels with kernels=KernelsConfig(…)",
    "kernel_config": "Choose kernels with kernels=KernelsConfig(…)",
    "allow_all_kernels": "Choose kernels with kernels=KernelsConfig(…)",
    "fusion_config": "Choose kernels with kernels=KernelsConfig(…)",
    "gguf_file": "Load it without a strategy, save it with save_pretrained, and load that folder",
    "variant": "Save the files of this variant as a folder of its own, and load that",
    "state_dict": "Save the weights with save_pretrained, and load that folder",
    "key_mapping": "Load the model without a strategy, save it with save_pretrained, and load that folder",
    "ignore_mismatched_sizes": "Load the model without a strategy, save it with save_pretrained, and load that folder",
    "output_loading_info": "allow_missing_weights and allow_unused_weights decide what a checkpoint may lack or hold",
    "adapter_kwargs": "Give lora=LoRAConfig(adapter=…)",
    "adapter_name": "Give lora=LoRAConfig(adapter=…)",
    "tqdm_class": "Leave it out",
}
_NO_DEVICE = ("auto", "balanced", "balanced_low_0", "sequential")  # device maps that transformers works out


@dataclass
class Arguments:
    """The arguments of a `from_pretrained` call, sorted.

    Args:
        hub: of those in `HUB`, the ones that were given.
        only_transformers: arguments that only transformers honours.
        dtype: from `dtype` or the older `torch_dtype`.
        device: from `device_map`; None: it was not given.
        config: a `PreTrainedConfig`, or the path of one.
        generation_config: a `GenerationConfig` that replaces the checkpoint's.
        code_revision: of code that lies in another repository than the model.
        experts_implementation: transformers' name of the code that computes experts.
        overrides: attributes of the config to change.
    """

    hub: dict[str, Any]
    only_transformers: dict[str, Any]
    dtype: torch.dtype | str | None
    device: torch.device | None
    config: Any
    generation_config: Any
    code_revision: str | None
    experts_implementation: str | None
    overrides: dict[str, Any]


def sort_arguments(given: Mapping[str, Any], dtype: Any = None) -> Arguments:
    """Sort the keyword arguments of a `from_pretrained` call.

    Args:
        given: what transformers' class takes, but `dtype`, `attn_implementation` and `trust_remote_code`.
        dtype: the argument of that name.

    Raises:
        ValueError: an argument asks for what neither transformers nor this project does.
    """
    rest = {name: value for name, value in given.items() if name not in _WITHOUT_EFFECT}
    if rest.pop("use_safetensors", None) is False:
        raise ValueError(
            "use_safetensors=False asks for pickled weights, which can run code when they are read. Convert them: load "
            "the model with transformers' own class, and save it with save_pretrained."
        )
    if rest.pop("proxies", None):
        raise ValueError("proxies= is not honoured by huggingface_hub any more. Set HTTPS_PROXY in the environment.")
    if old := [name for name in ("from_tf", "from_flax") if rest.pop(name, None)]:
        raise ValueError(f"{old[0]}=True: transformers 5 no longer reads such weights. Give a folder with safetensors.")
    older = rest.pop("torch_dtype", None)
    dtype = older if dtype is None else dtype
    device = single_device(rest.get("device_map"))
    if device is not None:
        del rest["device_map"]
    asked = {name: rest.pop(name) for name in _OF_TRANSFORMERS if name in rest}
    only_transformers = {name: value for name, value in asked.items() if value not in (None, False, "", {})}
    if only_transformers.get("adapter_name") == "default":  # as transformers calls it anyway
        del only_transformers["adapter_name"]
    if isinstance(dtype, dict):
        only_transformers["dtype"] = dtype
    return Arguments(
        hub={name: rest.pop(name) for name in HUB if name in rest},
        only_transformers=only_transformers,
        dtype=dtype,
        device=device,
        config=rest.pop("config", None),
        generation_config=rest.pop("generation_config", None),
        code_revision=rest.pop("code_revision", None),
        experts_implementation=rest.pop("experts_implementation", None),
        overrides=rest,
    )


def single_device(device_map: Any) -> torch.device | None:
    """The device of a `device_map` that names one for the whole model; None for any other.

    Raises:
        ValueError: it names no device.
    """
    if isinstance(device_map, dict):
        return single_device(device_map[""]) if set(device_map) == {""} and device_map[""] != "disk" else None
    if device_map is None or device_map in _NO_DEVICE:
        return None
    if device_map == "cuda":
        device_map = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device_map={device_map!r} is no device. Give one ('cpu', 'cuda:0', 0), {', '.join(_NO_DEVICE)}, or a "
            "dict."
        ) from error


def refuse_together(only_transformers: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Refuse arguments that only transformers honours beside those that only this project does.

    Args:
        only_transformers: from `Arguments`.
        ours: the arguments of this project that were given, by name.

    Raises:
        ValueError: there are some of both. It says what to do instead.
    """
    if not only_transformers or not ours:
        return
    name = next(iter(only_transformers))
    advice = _OF_TRANSFORMERS.get(name, "Give one dtype for the whole model")
    others = listed(f"{other}=" for other in ours)
    raise ValueError(
        f"{name}= is honoured by transformers alone, and {others} by this project alone: they do not go together. "
        f"{advice}, and leave out {name}=; or leave out {others}."
    )
