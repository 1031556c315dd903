"""`amt export --gguf`: a GGUF file of an exported model, for llama.cpp and what builds on it.

The names of the format are those of gguf 0.19 and of transformers 5.23. The file is read back with transformers, and
every weight and every value of the config is compared. So a family works here if transformers reads it from GGUF as it
is; all others are refused.
"""

from __future__ import annotations

import json
import os
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from automodel_trainer.checkpoint.weight_stream import Weights
from automodel_trainer.models.sidecars import has_tokenizer
from automodel_trainer.nn.text import listed
from automodel_trainer.tools._gguf_tokenizer import add_tokenizer

FILE = "model.gguf"
_OTHER_WAY = "Use llama.cpp's convert_hf_to_gguf.py on the exported folder."
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16"}
# Of a config: names, defaults of generation and training, and what GGUF keeps with the tokenizer.
_NOT_KEPT = (
    "_name_or_path", "architectures", "transformers_version", "*dtype", "*_token_id", "use_cache", "*drop*",
    "initializer_*", "output_*", "return_dict", "id2label", "label2id", "pretraining_tp", "max_window_layers",
    "chunk_size_feed_forward", "is_encoder_decoder", "problem_type", "tie_word_embeddings", "auto_map",
)  # fmt: skip


def check_gguf_can_be_written() -> None:
    """Raise ValueError if the package `gguf` is missing."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ValueError("--gguf needs the package gguf: pip install gguf (or automodel-trainer[gguf]).") from error


def write_gguf(folder: Path) -> Path:
    """Write `model.gguf` into the folder of an exported model, and read it back.

    Returns:
        the file.

    Raises:
        ValueError: this family, its tokenizer or a value of its config cannot be written, or what transformers reads
            back is something else. Then no file stays.
    """
    check_gguf_can_be_written()
    temporary, target = folder / f".{FILE}.tmp.gguf", folder / FILE
    try:
        _write(folder, temporary)
        _check(folder, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _write(folder: Path, target: Path) -> None:
    import gguf
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(folder)
    arch, permuted = _architecture(config)
    writer = gguf.GGUFWriter(str(target), arch)
    weights = Weights(folder)
    names = _names(weights, arch, config)
    writer.add_name(folder.name)
    kinds = {_DTYPES.get(weights.header[name][0]) for name in names if len(weights.header[name][1]) > 1}
    if None in kinds:
        raise ValueError(f"{folder} holds weights that are not fp32, fp16 or bf16. Export with --dtype bfloat16.")
    largest = next(kind for kind in ("F32", "BF16", "F16") if kind in kinds)
    writer.add_file_type(getattr(gguf.LlamaFileType, _FILE_TYPES[largest]))
    _add_config(writer, arch, config)
    if not has_tokenizer(folder):
        raise ValueError(f"{folder} has no tokenizer, and a GGUF file holds one. Save it with the model.")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    add_tokenizer(writer, tokenizer, config.vocab_size)
    for name, gguf_name in names.items():
        dtype, shape = weights.header[name]
        kind = _kind(dtype, shape)
        size = int(np.prod(shape)) * (4 if kind == "F32" else 2)
        raw = getattr(gguf.GGMLQuantizationType, kind)
        bytes_shape = (*shape[:-1], shape[-1] * 2) if kind == "BF16" else shape
        numbers = {"F32": np.float32, "F16": np.float16, "BF16": np.uint8}[kind]
        writer.add_tensor_info(gguf_name, bytes_shape, np.dtype(numbers), size, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in names:  # one tensor in memory at a time
        writer.write_tensor_data(_array(name, weights.exact(name), config if permuted else None))
    writer.close()


def _kind(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return _DTYPES[dtype] if len(shape) > 1 else "F32"  # llama.cpp wants norms and biases so


def _array(name: str, tensor: Tensor, permuted: Any) -> np.ndarray:
    kind = _kind(tensor.dtype, tuple(tensor.shape))
    if permuted is not None and (".q_proj." in name or ".k_proj." in name):  # rotary pairs lie next to each other there
        heads = permuted.num_attention_heads if ".q_proj." in name else permuted.num_key_value_heads
        pairs = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        tensor = pairs.transpose(1, 2).reshape(tensor.shape)
    tensor = tensor.contiguous()
    if kind == "BF16":
        return tensor.view(torch.uint8).numpy()
    return tensor.to(torch.float32 if kind == "F32" else torch.float16).numpy()


def _architecture(config: Any) -> tuple[str, bool]:
    """GGUF's name of the family, and whether its rotary pairs lie otherwise than in transformers.

    Raises:
        ValueError: the format, or transformers, does not have the family.
    """
    import gguf
    from transformers.integrations import GGUF_CONFIG_MAPPING
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, LlamaTensorProcessor

    kind = config.model_type
    processor = TENSOR_PROCESSORS.get(kind)
    if kind not in gguf.MODEL_ARCH_NAMES.values() or kind not in GGUF_CONFIG_MAPPING:
        raise ValueError(f"--gguf does not know the family {kind!r}. {_OTHER_WAY}")
    if processor not in (None, LlamaTensorProcessor):
        raise ValueError(f"--gguf cannot write the family {kind!r}, whose weights GGUF stores otherwise. {_OTHER_WAY}")
    return kind, processor is LlamaTensorProcessor


def _names(weights: Weights, arch: str, config: Any) -> dict[str, str]:
    """Maps each weight to its name in GGUF. A tied head is left out: readers take the embeddings."""
    import gguf

    kind = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    table = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    found: dict[str, str] = {}
    for name in weights.header:
        if name == "lm_head.weight" and getattr(config, "tie_word_embeddings", False):
            continue
        gguf_name = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise ValueError(f"--gguf has no name for the weight {name} of the family {arch!r}. {_OTHER_WAY}")
        found[name] = gguf_name
    return found


def _add_config(writer: Any, arch: str, config: Any) -> None:
    """The config under GGUF's names, as transformers reads them, and what llama.cpp wants besides."""
    from transformers.integrations import GGUF_CONFIG_MAPPING

    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"--gguf writes plain rotary positions, and this model has {rope}. {_OTHER_WAY}")
    layers = set(getattr(config, "layer_types", None) or ("full_attention",))
    if layers != {"full_attention"}:
        raise ValueError(f"--gguf writes models with full attention in every layer; this has {layers}. {_OTHER_WAY}")
    head = _head_dim(config)
    values: dict[str, Any] = {"rope.dimension_count": head}
    if head * config.num_attention_heads != config.hidden_size:
        values |= {"attention.key_length": head, "attention.value_length": head}
    names: dict[str, Any] = GGUF_CONFIG_MAPPING[arch]  # type: ignore[assignment]
    for key, attribute in names.items():
        value = rope.get(attribute, getattr(config, attribute, None)) if isinstance(attribute, str) else None
        if value is not None:
            values[key] = value
    for key, value in values.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{arch}.{key}", value)


# --- reading it back --------------------------------------------------------------------------------------------------


def _check(folder: Path, file: Path) -> None:
    """Compare what transformers reads of the file with the folder: every weight, and every value of the config."""
    from transformers import AutoModelForCausalLM

    try:
        read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    except RuntimeError as error:
        raise ValueError(f"transformers cannot read this model from GGUF: {error} {_OTHER_WAY}") from error
    source = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours, theirs = _values(source.config), _values(read.config)
    if lost := sorted(key for key, value in ours.items() if not _same(value, theirs.get(key))):
        shown = ", ".join(f"{key} (here {ours[key]!r}, read back {theirs.get(key)!r})" for key in lost[:3])
        raise ValueError(f"GGUF does not keep {shown} of this model. {_OTHER_WAY}")
    mine, back = source.state_dict(), read.state_dict()
    both = mine.keys() & back.keys()
    wrong = sorted((mine.keys() ^ back.keys()) | {name for name in both if not torch.equal(mine[name], back[name])})
    if wrong:
        raise ValueError(f"{listed(wrong)} read back from GGUF differ from the model's. {_OTHER_WAY}")
    tokens = _field(file, "tokenizer.ggml.tokens")
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    if any(tokens[number] != token for token, number in vocabulary.items()):
        raise ValueError(f"The vocabulary read back from GGUF differs from the tokenizer's. {_OTHER_WAY}")


def _values(config: Any) -> dict[str, Any]:
    """What of a config the format has to keep."""
    found = {k: v for k, v in config.to_dict().items() if not any(fnmatchcase(k, ignored) for ignored in _NOT_KEPT)}
    return {**found, "head_dim": _head_dim(config)}


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _same(value: Any, other: Any) -> bool:
    floats = isinstance(value, float) and isinstance(other, float)
    return bool(value == other or (floats and np.float32(value) == np.float32(other)))


def _field(file: Path, key: str) -> Any:
    import gguf

    field: Any = gguf.GGUFReader(str(file)).get_field(key)
    return field.contents()
