"""Adds adapters to a model and gives them their initial values."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from automodel_trainer.models._transformers import tied_weight_names
from automodel_trainer.models.initialize import seed_of
from automodel_trainer.models.lora.adapter_files import (
    adapter_config,
    adapter_targets,
    load_adapter,
    read_config,
    read_tensors,
)
from automodel_trainer.models.lora.config import LoRAConfig
from automodel_trainer.models.lora.config_changes import as_arguments, read_changes, unmet_changes
from automodel_trainer.models.lora.embeddings import fit_embeddings, note_resized, untie_as_peft
from automodel_trainer.models.lora.fuse import fuse_as_chosen
from automodel_trainer.models.lora.fused_fp8 import FusedFp8
from automodel_trainer.models.lora.initialize import initialize_adapter
from automodel_trainer.models.lora.layers import (
    LINEAR,
    adapt_linear,
    adapt_parameter,
    adapters,
    quantizable_weights,
)
from automodel_trainer.models.lora.targets import Target, find_targets, kind, kinds, matches
from automodel_trainer.models.quantization import mxfp4, nf4
from automodel_trainer.models.quantization.as_stored import hold_as_stored
from automodel_trainer.models.quantization.quantize import prepare_quantization, quantize_weights
from automodel_trainer.models.record import record_of, recorded


def lora_of(model: nn.Module) -> LoRAConfig | None:
    """The LoRA configuration of a model that has adapters."""
    return recorded(model, LoRAConfig)


def apply_lora(
    model: PreTrainedModel,
    config: LoRAConfig,
    base_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    stored: Collection[str] | None = None,
) -> PreTrainedModel:
    """Freeze a model and give it adapters, in place, before it is laid out. `finish_lora` fills them.

    Args:
        model: on meta or real, not yet sharded.
        config: what to adapt, and how.
        base_dtype: of the frozen weights; None leaves them as they are.
        dtype: of what is trained; None: fp32 or wider.
        stored: names of the parameters that `quantize: mxfp4` holds as the checkpoint has them (`as_stored.py`).

    Raises:
        ValueError: the configuration does not fit the model; the message lists what would.
    """
    if config.quantize == mxfp4.SCHEME and stored is None:
        raise ValueError(
            "lora quantize='mxfp4' holds the experts as the files of an mxfp4 checkpoint have them, and this model has "
            "other weights already. Give the checkpoint's folder or Hub id as the model, or set quantize to 'nf4'."
        )
    if config.adapter is not None:
        _warn_of_changes(model, str(config.adapter))
        config = adapter_config(config)
        tensors = read_tensors(str(config.adapter))
        fit_embeddings(model, tensors)
        if not read_config(str(config.adapter)).get("ensure_weight_tying"):
            untie_as_peft(model, tensors)
        targets = adapter_targets(model, config)
    else:
        targets = find_targets(model, config)
        note_resized(model)
    linear = {name for name, module in model.named_modules() if isinstance(module, LINEAR)}
    _check(model, config, targets, linear)
    saved = _modules_to_save(model, config.modules_to_save)
    dtype = dtype or torch.promote_types(next(model.parameters()).dtype, torch.float32)
    _freeze(model, saved, base_dtype, dtype)
    if stored:  # before adapters: theirs is the outer forward
        hold_as_stored(model, stored)
    for target in targets:
        if target.name in linear:
            module = model.get_submodule(target.name)
            assert isinstance(module, LINEAR)
            adapt_linear(module, target.rank, target.scaling, dropout=config.dropout, dora=config.use_dora, dtype=dtype)
        else:
            owner, _, name = target.name.rpartition(".")
            adapt_parameter(model.get_submodule(owner), name, target.rank, target.scaling, dtype=dtype)
    for adapter in adapters(model):  # until `finish_lora`, a model with its weights computes what it did
        if not adapter.b.weight.is_meta:
            nn.init.zeros_(adapter.b.weight)
    record_of(model).keep(replace(config, modules_to_save=saved))
    if config.quantize in nf4.SCHEMES:
        prepare_quantization(model, config.quantize, quantizable_weights(model))
    return model


def _warn_of_changes(model: PreTrainedModel, adapter: str) -> None:
    if unmet := unmet_changes(read_changes(adapter), model.config):
        warnings.warn(
            f"Adapter {adapter} was trained with another config than this model has: {as_arguments(unmet)}. Give these "
            "values as config_overrides, or to from_pretrained, unless you mean to change them.",
            stacklevel=3,
        )


@torch.no_grad()
def finish_lora(model: nn.Module) -> None:
    """Fill the adapters of a model once its base weights are real, sharded or not. Collective.

    The seed of an adapter follows from the config's seed and the adapter's name, so any layout gets the same values.
    """
    config = lora_of(model)
    if config is None:
        return
    for adapter in adapters(model):
        initialize_adapter(adapter, config.init, seed_of(config.seed, adapter.target))
    quantize_weights(model)
    if config.adapter is not None:
        load_adapter(model, config.adapter)
    fuse_as_chosen(model)


def trained_names(model: nn.Module) -> set[str] | None:
    """Names of the trained parameters, the only ones that a checkpoint holds. None for a model without adapters."""
    if lora_of(model) is None:
        return None
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapter_names(model: nn.Module) -> set[str]:
    """State-dict names of all adapter weights. No base checkpoint holds them."""
    names = set()
    for adapter in adapters(model):
        names |= {f"{adapter.prefix}lora_A.weight", f"{adapter.prefix}lora_B.weight"}
        if adapter.magnitude is not None:
            names.add(f"{adapter.prefix}lora_magnitude_vector")
    return names


def learning_rate_of(model: nn.Module, name: str, lr: float) -> float:
    """The learning rate of a parameter in a run with learning rate `lr`."""
    config = lora_of(model)
    if config is None or name.endswith(("lora_A.weight", "lora_magnitude_vector")):
        return lr
    if name.endswith("lora_B.weight"):
        return lr * config.lr_ratio
    return lr if config.modules_to_save_lr is None else config.modules_to_save_lr


def describe_lora(model: nn.Module) -> str | None:
    """For the ledger: how many weights of each kind are adapted, and what else is trained."""
    config = lora_of(model)
    if config is None:
        return None
    found = list(adapters(model))
    counts = Counter(_short(adapter.target) for adapter in found)
    ranks = "/".join(str(rank) for rank in sorted({adapter.rank for adapter in found}))
    text = f"rank {ranks} on {len(found)} weights: {', '.join(f'{n} × {k}' for k, n in counts.items())}"
    flags = {"DoRA": config.use_dora, "rsLoRA": config.use_rslora, f"{config.quantize} base": config.quantize}
    text += "".join(f", {flag}" for flag, is_on in flags.items() if is_on)
    fused = [group for adapter in found if (group := getattr(adapter.module, "fused", None)) is not None]
    if fused:
        groups = set(fused)
        text += f", {len(fused)} with their weights in {len(groups)} matmuls"
        more = sum(group.transposed.nbytes for group in groups if isinstance(group, FusedFp8))
        text += f" (weights by columns too: {more / 2**20:,.1f} MiB more)" if more else ""
    return text + (f"; trained whole: {', '.join(config.modules_to_save)}" if config.modules_to_save else "")


def starts_without_gradient(model: nn.Module, name: str) -> bool:
    """Whether a parameter's first gradient is expected to be zero: that of A, because B starts as zero."""
    config = lora_of(model)
    if config is None or config.adapter is not None:
        return False
    return config.init == "kaiming" and name.endswith("lora_A.weight")


def _short(name: str) -> str:
    return ".".join(name.split(".")[-2 if name.endswith(".weight") else -1 :])


def _check(model: PreTrainedModel, config: LoRAConfig, targets: list[Target], linear: set[str]) -> None:
    parameters = [target.name for target in targets if target.name not in linear]
    asked = {
        f"dropout={config.dropout}": bool(config.dropout),
        "use_dora=True": config.use_dora,
        f"init={config.init!r}": config.init != "kaiming",
    }
    wrong = [option for option, is_on in asked.items() if is_on]
    if parameters and wrong:
        raise ValueError(
            f"lora {', '.join(wrong)} is for linear layers only, and these are fused parameters: {kinds(parameters)}. "
            f"Leave it out, or exclude them (exclude: {sorted({kind(p).rpartition('.')[2] for p in parameters})})."
        )
    transposed = [t.name for t in targets if t.name in linear and isinstance(model.get_submodule(t.name), Conv1D)]
    if transposed and config.quantize in nf4.SCHEMES:
        raise ValueError(
            f"lora quantize={config.quantize!r} holds nn.Linear layers in few bits, and {kinds(transposed)} are "
            "transformers' Conv1D. Leave quantize out."
        )
    tied = {name.rpartition(".")[0] for pair in tied_weight_names(model).items() for name in pair}
    if shared := [target.name for target in targets if target.name in tied]:
        raise ValueError(
            f"lora target_modules: the weight of {shared} is tied to another module's, which an adapter would untie. "
            "Leave it out, or train it whole with modules_to_save."
        )


def _modules_to_save(model: nn.Module, patterns: list[str]) -> list[str]:
    """Full names of the outermost modules that match."""
    holders = [name for name, module in model.named_modules() if name and next(module.parameters(), None) is not None]
    saved: list[str] = []
    for pattern in patterns:
        found = [name for name in holders if matches(name, pattern)]
        if not found:
            leaves = [name for name in holders if next(model.get_submodule(name).children(), None) is None]
            raise ValueError(f"lora modules_to_save: {pattern!r} matches nothing. There are: {kinds(leaves)}.")
        saved += [name for name in found if name not in saved]
    return [name for name in saved if not any(name.startswith(other + ".") for other in saved)]


def _freeze(model: nn.Module, saved: list[str], base_dtype: torch.dtype | None, dtype: torch.dtype) -> None:
    """Freeze all of the base but modules_to_save, and cast frozen and trained parameters to their dtypes."""
    trained = {id(p) for name in saved for p in model.get_submodule(name).parameters()}
    cast: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in cast:
                train = id(parameter) in trained
                wanted = dtype if train else base_dtype or parameter.dtype
                same = wanted == parameter.dtype
                cast[id(parameter)] = parameter if same else nn.Parameter(parameter.detach().to(wanted))
                cast[id(parameter)].requires_grad_(train)
            module._parameters[name] = cast[id(parameter)]
