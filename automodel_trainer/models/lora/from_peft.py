"""A `PeftModel` to train: its base model with our adapters, which begin with its values and are given back to it."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from automodel_trainer.models.lora.adapter_files import adapter_config, gather_adapter
from automodel_trainer.models.lora.config import LoRAConfig

# Initial values that PEFT takes out of the base weights, which then are not those of any folder.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def is_peft_model(model: object) -> bool:
    """Whether this is a `PeftModel`. It imports no PEFT."""
    return any(cls.__name__ == "PeftModel" and cls.__module__.split(".")[0] == "peft" for cls in type(model).__mro__)


def check_no_peft_layers(model: object) -> None:
    """Refuse a model with PEFT's layers inside, but no `PeftModel` around it: `add_adapter`, or a `PeftModel`'s base.

    Raises:
        ValueError: there are such layers; the message writes out the LoRAConfig that does the same.
    """
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    name = next((name for name, module in modules if type(module).__module__.startswith("peft.tuners.")), None)
    if name is None:
        return
    found = getattr(model, "peft_config", None)
    config = next(iter(found.values()), None) if isinstance(found, dict) else None
    same = ""
    if config is not None and hasattr(config, "lora_alpha"):
        targets = config.target_modules
        targets = sorted(targets) if isinstance(targets, (set, list)) else targets
        same = f"LoRAConfig(rank={config.r}, alpha={config.lora_alpha}, target_modules={targets!r})"
    raise ValueError(
        f"{type(model).__name__} has PEFT's layers inside ({name}), and no PeftModel around it says what is trained. "
        f"Give the PeftModel (peft.get_peft_model), or a model without them and lora={same or 'LoRAConfig(…)'}."
    )


@dataclass
class GivenPeftModel:
    """A `PeftModel` that the user gave.

    Args:
        model: the object itself.
        base: its base model without PEFT's layers. It shares the frozen weights of the object.
        lora: continues from the object's adapter.
        folder: that the adapter is in.
        settings: how the adapter is computed, as far as PEFT says it in the words of LoRAConfig.
    """

    model: Any
    base: PreTrainedModel
    lora: LoRAConfig
    folder: TemporaryDirectory[str]
    settings: dict[str, Any]

    @torch.no_grad()
    def give_back(self, trained: nn.Module) -> None:
        """Write the trained adapter into the user's object, on every rank. Collective."""
        from peft import set_peft_model_state_dict

        tensors: Any = [gather_adapter(trained)[0]]
        if dist.is_initialized():
            dist.broadcast_object_list(tensors)
        own = self.model.state_dict()
        values: dict[str, Tensor] = {name: tensor for name, tensor in tensors[0].items() if tensor.numel()}
        set_peft_model_state_dict(self.model, values, adapter_name=self.model.active_adapter)
        assert own.keys() == self.model.state_dict().keys(), "giving values back changes no names"
        self.model.to(next(self.base.parameters()).device)  # training may have moved the weights that both share


def take_peft_model(model: Any) -> GivenPeftModel:
    """Take a `PeftModel` apart into a base model and a LoRAConfig.

    Raises:
        ValueError: it has several active adapters, an adapter that is no LoRA or is computed differently here, one that
            is not to be trained, or a base model that is no transformers model.
    """
    name = model.active_adapter
    if not isinstance(name, str):
        raise ValueError(f"The PeftModel has the active adapters {name}, and one is trained: call set_adapter(name).")
    config, base = model.peft_config[name], model.get_base_model()
    if not isinstance(base, PreTrainedModel):
        raise ValueError(f"The base of the PeftModel is a {type(base).__name__}, not a transformers model.")
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        raise ValueError(f"The PeftModel has a {kind} adapter; only LORA is trained here.")
    init = getattr(config, "init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_CHANGE_THE_BASE):
        raise ValueError(
            f"The PeftModel's init_lora_weights={init!r} has changed its base weights. Give the base model and "
            f"LoRAConfig(rank={config.r}, alpha={config.lora_alpha}, init='pissa') of automodel_trainer instead."
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("The PeftModel has nothing to train: load its adapter with is_trainable=True.")
    folder = TemporaryDirectory(prefix="adapter-")
    model.save_pretrained(folder.name, selected_adapters=[name])
    inside = Path(folder.name) if name == "default" else Path(folder.name) / name
    lora = LoRAConfig(adapter=str(inside))
    known = asdict(adapter_config(lora))
    settings = {key: known[key] for key in ("rank", "alpha", "dropout", "use_rslora", "use_dora", "modules_to_save")}
    return GivenPeftModel(model, _without_adapters(model), lora, folder, settings)


def _without_adapters(model: Any) -> PreTrainedModel:
    """The base model as it was before PEFT; frozen weights are shared, not copied.

    What the adapter trains whole (modules_to_save) is copied, because PEFT keeps the original beside its own copy.
    """
    shared = {id(t): t for n, t in (*model.named_parameters(), *model.named_buffers()) if ".original_module." not in n}
    return copy.deepcopy(model, shared).unload()
