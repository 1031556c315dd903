"""What `amt export --check` holds besides predictions: tensors, ties, config, adapters, generation, chat template."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from jinja2 import TemplateError
from torch import Tensor

from automodel_trainer.checkpoint.sources import is_adapter, model_folder
from automodel_trainer.checkpoint.trained_base import other_base
from automodel_trainer.checkpoint.weight_stream import Weights
from automodel_trainer.models._transformers import converts_weights, original_weight_names, tied_weight_names
from automodel_trainer.models.auto_classes import auto_class_of_folder, transformers_class
from automodel_trainer.models.build import empty_model
from automodel_trainer.models.files import resolve_folder
from automodel_trainer.models.generation import GENERATION_CONFIG
from automodel_trainer.models.lora.adapter_files import read_config, read_tensors
from automodel_trainer.models.lora.config_changes import read_changes
from automodel_trainer.models.sidecars import has_tokenizer
from automodel_trainer.nn.text import listed

_TURNS: tuple[dict[str, Any], ...] = (
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4."},
    {"role": "user", "content": "And 3 + 3?\n\nThink.  "},
    {"role": "assistant", "content": "6. Ünïcode: 千里."},
)
CHATS: tuple[list[dict[str, Any]], ...] = (
    [*_TURNS[:2]],
    [*_TURNS],
    [{"role": "system", "content": "Be brief."}, *_TURNS],
)
"""Conversations that the exported chat template must render as the training's did."""


_MAY_DIFFER = {"_name_or_path", "architectures", "dtype", "quantization_config", "torch_dtype", "transformers_version"}
"""Values of config.json that an export sets: it may have another dtype, and its weights are not quantized."""
_PLAIN = (torch.float32, torch.bfloat16, torch.float16)  # dtypes of weights that are not quantized


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        name: what was checked.
        fault: what is wrong; "" if nothing is.
        detail: what was looked at.
    """

    name: str
    fault: str
    detail: str

    def __str__(self) -> str:
        return f"{self.name}: {f'WRONG: {self.fault}' if self.fault else self.detail}"


def check_export(
    source: str | os.PathLike[str],
    exported: Path,
    base: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
) -> list[Finding]:
    """Check an exported folder against what it was made of.

    Args:
        source: the checkpoint, model or adapter that was exported.
        exported: the exported folder, a plain model.
        base: base model of an adapter. None: the one that the adapter's config names.
        trust_remote_code: run model code that comes with the models.

    Raises:
        ValueError: a folder cannot be read.
    """
    folder = model_folder(source)
    adapter = folder if is_adapter(folder) else None
    original = folder
    if adapter is not None:
        original = resolve_folder(base or read_config(adapter)["base_model_name_or_path"])
    checks: list[Callable[[], Finding]] = [
        lambda: _tensors(original, exported, trust_remote_code),
        lambda: _loads(original, exported, adapter, trust_remote_code),
        lambda: _config(original, exported, adapter, trust_remote_code),
        lambda: _generation(original, exported, trust_remote_code),
        lambda: _chats(adapter or folder, original, exported, trust_remote_code),
    ]
    checks.append(lambda: _unchanged(original, exported, adapter))
    if adapter is not None:
        asked = base is not None
        checks += [
            lambda: _base(adapter, original, asked),
            lambda: _deltas(adapter),
            lambda: _sum(adapter, original, exported, trust_remote_code),
        ]
    return [check() for check in checks]


def _tensors(original: Path, exported: Path, trust_remote_code: bool) -> Finding:
    """No tensor of the source is missing, and none was added."""
    there, here = Weights(original), Weights(exported)
    model = empty_model(original, trust_remote_code)
    expected = set(there.header)
    if converts_weights(model) and expected <= model.state_dict().keys():  # a checkpoint has the names in memory
        expected = set(original_weight_names(model, there.meta()))
    tied = tied_weight_names(model)
    missing = {name for name in expected - set(here.header) if tied.get(name) not in here.header}
    extra = set(here.header) - expected - set(tied)
    faults = [f"{word} {listed(sorted(names))}" for word, names in (("lacks", missing), ("adds", extra)) if names]
    return Finding("tensors", "; ".join(faults), f"the same {len(here.header)} as the source")


def _loads(original: Path, exported: Path, adapter: Path | None, trust_remote_code: bool) -> Finding:
    """transformers takes every tensor, what the config ties is one tensor, and what the source ties is tied."""
    model, faults = _read(exported, trust_remote_code)
    known = [fault for fault in faults if fault in _read(original, trust_remote_code)[1]] if faults else []
    faults = [fault for fault in faults if fault not in known]
    pairs = tied_weight_names(model)
    if adapter is None or not read_config(adapter).get("modules_to_save"):  # which may train a tied weight by itself
        lost = tied_weight_names(empty_model(original, trust_remote_code)).keys() - pairs.keys()
        faults += [f"{name} is tied in the source and not here" for name in sorted(lost)]
    ties = f", {len(pairs)} tied" if pairs else ""
    read = f"transformers reads it into {type(model).__name__}{ties}"
    return Finding("loading", "; ".join(faults), f"{read}{_known('; '.join(known))}")


def _read(folder: Path, trust_remote_code: bool) -> tuple[Any, list[str]]:
    """A model as transformers reads it, and what is wrong with that."""
    cls = transformers_class(auto_class_of_folder(folder, trust_remote_code=trust_remote_code))
    try:
        model, info = cls.from_pretrained(folder, output_loading_info=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"transformers cannot read {folder}: {error}") from error
    faults = [f"{key} {listed(sorted(map(str, info[key])))}" for key in info if info.get(key)]
    faults += [
        f"{name} and {other} are tied by the config and differ"
        for name, other in tied_weight_names(model).items()
        if model.get_parameter(name) is not model.get_parameter(other)
    ]
    return model, faults


def _known(fault: str) -> str:
    """What to say of a fault that the source has too: the export did not make it."""
    return f" (as in the source: {' '.join(fault.split())})" if fault else ""


def _config(original: Path, exported: Path, adapter: Path | None, trust_remote_code: bool) -> Finding:
    """config.json says what the source's says, with what lies beside an adapter. Some values (eps, rope, biases of
    routers) no prompt may show.
    """
    changes = {} if adapter is None else read_changes(adapter)
    before, after = (
        transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, **changed)
        for folder, changed in ((original, changes), (exported, {}))
    )
    if before.model_type != after.model_type:  # a part of what the source holds: its text model, say
        before = before.get_text_config()
    old, new = _flat(before.to_dict()), _flat(after.to_dict())
    # Embeddings with new tokens lie whole beside the adapters.
    resized = adapter is not None and any(".lora_" not in name for name in read_tensors(adapter))
    differing = [
        f"{name} is {new.get(name)!r} and was {old.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not (resized and name.endswith("vocab_size"))
    ]
    return Finding("config", "; ".join(differing), f"{len(old)} values are those of the source")


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a config by their path (`text_config.vocab_size`), without those that an export sets."""
    values: dict[str, Any] = {}
    for name, value in config.items():
        if name in _MAY_DIFFER:
            continue
        if isinstance(value, dict):
            values.update(_flat(value, f"{prefix}{name}."))
        else:
            values[prefix + str(name)] = value
    return values


def _generation(original: Path, exported: Path, trust_remote_code: bool) -> Finding:
    """The settings of generation are valid, or those of the source, which transformers takes back with a warning."""
    fault, found = _generation_fault(exported, trust_remote_code)
    if fault and fault == _generation_fault(original, trust_remote_code)[0]:
        return Finding("generation config", "", f"that of the source{_known(fault)}")
    return Finding("generation config", fault, found)


def _generation_fault(folder: Path, trust_remote_code: bool) -> tuple[str, str]:
    """What is wrong with the settings of generation, "" if nothing; and what they are."""
    model = None
    if not (folder / GENERATION_CONFIG).is_file():  # older folders have them in config.json
        model = empty_model(folder, trust_remote_code)
    if model is not None and not model.can_generate():
        return "", "none"
    try:
        config: Any = (
            transformers.GenerationConfig.from_pretrained(folder) if model is None else model.generation_config
        )
        config.validate(strict=True)
    except (ValueError, OSError, TypeError) as error:
        return str(error), ""
    size = _vocabulary(folder)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = getattr(config, name, None)
        for token in ids if isinstance(ids, list) else [ids]:
            if token is not None and size is not None and not 0 <= token < size:
                return f"{name}={token}, and the model has {size:,} tokens", ""
    return "", "valid"


def _chats(trained: Path, original: Path, exported: Path, trust_remote_code: bool) -> Finding:
    """The tokenizer and its chat template give the tokens that they gave in training."""
    folder = next((place for place in (trained, original) if has_tokenizer(place)), None)
    if folder is None:
        return Finding("chat template", "", "the source has no tokenizer")
    if not has_tokenizer(exported):
        return Finding("chat template", f"{folder} has a tokenizer, and the export has none", "")
    before, after = (
        transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
        for place in (folder, exported)
    )
    if before.get_vocab() != after.get_vocab():
        return Finding("chat template", f"the vocabulary differs ({len(before):,} tokens, then {len(after):,})", "")
    size, then = _vocabulary(exported), _vocabulary(original)
    if size is not None and len(after) > size and not (then is not None and len(before) > then):
        return Finding("chat template", f"the tokenizer has {len(after):,} tokens and the model {size:,}", "")
    if (before.chat_template is None) != (after.chat_template is None):
        return Finding("chat template", "one of source and export has none", "")
    if after.chat_template is None:
        return Finding("chat template", "", "none; the vocabularies are the same")
    done = 0
    for chat in CHATS:
        first, second = _rendered(before, chat), _rendered(after, chat)
        if first != second:
            return Finding("chat template", f"it renders {second!r} where training rendered {first!r}", "")
        done += first is not None
    return Finding("chat template", "", f"{done} conversations have the tokens that they had in training")


def _rendered(tokenizer: Any, chat: list[dict[str, Any]]) -> list[int] | None:
    """The tokens of a conversation; None if the template refuses it."""
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    except (TemplateError, TypeError, KeyError, ValueError):
        return None
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _vocabulary(folder: Path) -> int | None:
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    size = getattr(config.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) else None


def _unchanged(original: Path, exported: Path, adapter: Path | None) -> Finding:
    """Every weight that no adapter changes is that of the source, to the rounding of its dtype."""
    before, after = Weights(original), Weights(exported)
    factors = read_tensors(adapter) if adapter is not None else {}
    changed = {name.partition(".lora_")[0].removesuffix(".weight") for name in factors}
    plain = [name for name, (dtype, _) in before.header.items() if dtype in _PLAIN]
    shared = [name for name in plain if name in after.header and name.removesuffix(".weight") not in changed]
    wrong = []
    for name in shared:
        old, new = before.read([name])[name], after.read([name])[name]
        if old.shape != new.shape or not _rounding(new, old.double()) <= 1:
            wrong.append(name)
    fault = f"{listed(wrong)} differs from the source, and no adapter changes it" if wrong else ""
    return Finding("unchanged", fault, f"{len(shared)} weights are those of the source")


def _base(adapter: Path, original: Path, asked: bool) -> Finding:
    """The base is the one that the adapter was trained on. Another one may be asked for: one in full precision, say."""
    other = other_base(adapter, original)
    if other is None or asked:
        return Finding(
            "base", "", f"{other}, as was asked for" if other else "not known to be another than in training"
        )
    return Finding("base", other, "")


def _deltas(adapter: Path) -> Finding:
    """Every adapted weight has moved: an adapter that is all zero was not trained."""
    zero = sorted(n for n, t in read_tensors(adapter).items() if ".lora_B" in n and not bool(t.any()))
    count = sum(".lora_B" in name for name in read_tensors(adapter))
    fault = f"{len(zero)} of {count} updates are zero, as if untrained: {listed(zero)}" if zero else ""
    return Finding("adapter", fault, f"{count} updates, none is zero")


def _sum(adapter: Path, base: Path, exported: Path, trust_remote_code: bool) -> Finding:
    """Every merged linear weight is base + scaling · B A, computed here from the files and PEFT's definition alone."""
    config, factors = read_config(adapter), read_tensors(adapter)
    if config.get("use_dora") or config.get("init_lora_weights") not in (True, False, "gaussian", "orthogonal"):
        return Finding("merged", "", "compared by predictions alone (DoRA or PiSSA)")
    before, after = Weights(base), Weights(exported)
    wrong, compared = [], 0
    for name in (key for key in factors if key.endswith(".lora_A.weight")):
        weight = name.removesuffix(".lora_A.weight") + ".weight"
        if weight not in before.header or weight not in after.header:
            continue  # the files have other names or parts than the model: compared by predictions
        a, b = factors[name].double(), factors[name.replace("lora_A", "lora_B")].double()
        old, new = before.read([weight])[weight].double(), after.read([weight])[weight]
        update = _scaling(config, name, a.shape[0]) * (b @ a)
        wanted = old + (update.T if update.shape != old.shape or config.get("fan_in_fan_out") else update)
        compared += 1
        if not _rounding(new, wanted) <= 1:
            wrong.append(weight)
    fault = f"{listed(wrong)} is not base + adapter" if wrong else ""
    return Finding("merged", fault, f"{compared} weights are base + adapter")


def _scaling(config: dict[str, Any], name: str, rank: int) -> float:
    module = name.removesuffix(".lora_A.weight")
    alphas: dict[str, float] = config.get("alpha_pattern") or {}
    alpha = next((value for key, value in alphas.items() if module.endswith(key)), config["lora_alpha"])
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def _rounding(new: Tensor, wanted: Tensor) -> float:
    """The largest error in units of what rounding once to the dtype allows."""
    allowed = wanted.abs() * torch.finfo(new.dtype).eps + 1e-6 * wanted.abs().max() + torch.finfo(new.dtype).tiny
    return float(((new.double() - wanted).abs() / allowed).max())
