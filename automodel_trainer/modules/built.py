"""BuiltModule: a LightningModule around a Hugging Face model, which it builds on the strategy's mesh."""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from automodel_trainer.checkpoint import check_checkpoint
from automodel_trainer.checkpoint.own_saving import save_by_export
from automodel_trainer.models._masks import packing_without_sync
from automodel_trainer.models.build import add_adapters, build_pretrained, check_purpose, fill_from_folder, load_config
from automodel_trainer.models.files import resolve_folder
from automodel_trainer.models.generation import check_generation_config
from automodel_trainer.models.given_weights import unlike_folder, values_fingerprint
from automodel_trainer.models.isolation import Isolation
from automodel_trainer.models.kernels import KernelsConfig, apply_kernels, check_compiled
from automodel_trainer.models.lora import LoRAConfig, finish_lora, fuse_as_chosen, lora_of
from automodel_trainer.models.lora.adapter_files import CONFIG_NAME as ADAPTER_CONFIG
from automodel_trainer.models.lora.adapter_files import read_config
from automodel_trainer.models.lora.config_changes import read_changes
from automodel_trainer.models.lora.from_peft import (
    GivenPeftModel,
    check_no_peft_layers,
    is_peft_model,
    take_peft_model,
)
from automodel_trainer.models.parts import freeze_parts
from automodel_trainer.models.quantization.checkpoint import check_dense
from automodel_trainer.models.quantization.fp8_layers import check_gathered
from automodel_trainer.models.quantization_config import forget_quantization
from automodel_trainer.models.record import recorded
from automodel_trainer.models.sidecars import ModelFolder, has_tokenizer, source_folder
from automodel_trainer.modules.averaged import into_model, placed
from automodel_trainer.modules.balance import Balance, BalanceConfig, balance_of
from automodel_trainer.modules.base_hooks import keep_base_hooks
from automodel_trainer.modules.isolation import isolation_of, packs
from automodel_trainer.modules.neftune import add_neftune
from automodel_trainer.nn.deferred_logits import defer_logits
from automodel_trainer.strategies import MeshStrategy, Objective
from automodel_trainer.strategies.base.averaging import check_objective
from automodel_trainer.strategies.base.objective import MicroBatch
from automodel_trainer.strategies.base.precision import hold_in


class BuiltModule(Objective, pl.LightningModule):
    """Where an objective's model comes from, how it is built, and its state.

    Args:
        model: a folder or Hub id, or a `PreTrainedModel`.
        tokenizer, lora, neftune_alpha, kernels, balance, trust_remote_code, revision, config_overrides: see
            `HuggingFaceModule`.

    Raises:
        ValueError: the subclass sets no `auto_class`; or `revision` or `config_overrides` was given for a model that is
            already loaded.
    """

    frozen: Sequence[str] = ()  # parts of the model that are not trained; see `freeze_parts`
    _rows_are_safe = False  # not known yet

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        keep_base_hooks(cls)

    def __init__(
        self,
        model: str | os.PathLike[str] | PreTrainedModel,
        *,
        tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase | None,
        lora: LoRAConfig | None,
        neftune_alpha: float,
        kernels: KernelsConfig,
        balance: BalanceConfig,
        trust_remote_code: bool,
        revision: str | None,
        config_overrides: dict[str, Any] | None,
        allow_unused_weights: bool,
    ) -> None:
        super().__init__()
        if not hasattr(type(self), "auto_class"):
            raise ValueError(
                f"{type(self).__name__} is not an objective yet: set auto_class to the transformers auto class that "
                'builds its model (for example "AutoModelForTokenClassification").'
            )
        self._given_peft: GivenPeftModel | None = None
        if is_peft_model(model):
            if lora is not None:
                raise ValueError("The PeftModel has an adapter already: leave out lora, or give its base model.")
            self._given_peft = take_peft_model(model)
            model, lora = self._given_peft.base, self._given_peft.lora
        if not isinstance(model, (str, os.PathLike, PreTrainedModel)):
            raise ValueError(
                f"model is a {type(model).__name__}. Give a folder, a Hub id, a transformers PreTrainedModel or a "
                "PeftModel; of a model that torch.compile or DDP has wrapped, the model inside."
            )
        check_no_peft_layers(model)
        if isinstance(model, PreTrainedModel) and (revision is not None or config_overrides):
            raise ValueError(
                "revision and config_overrides apply to a model that is still to be loaded, and this one is an object. "
                "Change its config before you build it, or give its folder or Hub id."
            )
        # In a tuple, so that torch does not register it as a second submodule next to `self.model`.
        self._reference = (model,)
        self._tokenizer = self._given_tokenizer = tokenizer
        self.lora = lora
        self.neftune_alpha = neftune_alpha
        self.kernels = kernels
        self.balance = balance
        self._balance: Balance | None = None
        self.trust_remote_code = trust_remote_code
        self.revision = revision
        self.config_overrides = config_overrides or {}
        self.allow_unused_weights = allow_unused_weights
        self.model: Any = None
        self.register_load_state_dict_pre_hook(into_model)

    @cached_property
    def source(self) -> Path | None:
        """The folder that weights and tokenizer come from; None for a model that was built in memory."""
        (reference,) = self._reference
        if isinstance(reference, (str, os.PathLike)):
            return resolve_folder(reference, self.revision)
        name, kept = reference.name_or_path, recorded(reference, ModelFolder)
        if kept is not None and kept.name == name:
            return kept.folder
        return Path(name) if name and os.path.isdir(name) else None

    @property
    def given_model(self) -> PreTrainedModel | None:
        """The model object that was given; None for a folder or Hub id."""
        (reference,) = self._reference
        return reference if isinstance(reference, PreTrainedModel) else None

    @cached_property
    def base_values(self) -> str | None:
        """A hash of the frozen weights of the object that was given, as they were before it was laid out; or None."""
        model = self.given_model
        return None if model is None else values_fingerprint(model, trains=lora_of(model) is not None)

    @cached_property
    def changed_in_memory(self) -> str | None:
        """A weight of the object that was given that is another in the folder which it names; None if none is known."""
        model = self.given_model
        source = None if model is None or lora_of(model) is not None else source_folder(model)
        return None if model is None or source is None else unlike_folder(model, source)

    @property
    def given_lora(self) -> LoRAConfig | dict[str, Any] | None:
        """What is known of the adapters: as they were given, or as those of the object that was given."""
        if self._given_peft is not None:
            return self._given_peft.settings
        return self.lora or (None if self.given_model is None else lora_of(self.given_model))

    @property
    def model_config(self) -> PreTrainedConfig:
        """The model's config. It is available before the model is built."""
        (reference,) = self._reference
        if isinstance(reference, PreTrainedModel):
            return reference.config
        assert self.source is not None
        return load_config(self.source, self.trust_remote_code, self.config_overrides)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded on first use; see `load_tokenizer`."""
        return self.load_tokenizer()

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that was given, or the model's own.

        Raises:
            ValueError: no tokenizer was given, and the model has no folder or its folder holds no tokenizer.
        """
        if isinstance(self._tokenizer, PreTrainedTokenizerBase):
            return self._tokenizer
        folder = resolve_folder(self._tokenizer) if self._tokenizer is not None else self.source
        if folder is None:
            raise ValueError(
                "This model was built in memory and names no folder with a tokenizer: give "
                f"{type(self).__name__}(tokenizer=…)."
            )
        if not has_tokenizer(folder):
            raise ValueError(
                f"{folder} holds no tokenizer: give {type(self).__name__}(tokenizer=…), a folder or Hub id."
            )
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=self.trust_remote_code)

    @property
    def tokenizer_or_none(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer, or None if none was given and the model's folder holds none.

        Raises:
            ValueError: a tokenizer was given and its folder holds none.
        """
        had = self._tokenizer is not None or (self.source is not None and has_tokenizer(self.source))
        return self.tokenizer if had else None

    @property
    def saved_tokenizer(self) -> Any:
        """What makes the model's inputs and is saved with it: the tokenizer, or None as `tokenizer_or_none`."""
        return self.tokenizer_or_none

    @property
    def brings_tokenizer(self) -> bool:
        """Whether what is saved with the model may be another than the one in the folder that it came from."""
        return self._tokenizer is not None or "tokenizer" in self.__dict__

    def adopt_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take the tokenizer that the data is made with: checkpoints and exports get it with its chat template.

        Raises:
            ValueError: this module was given one with another vocabulary.
        """
        if self._given_tokenizer is not None:
            self._tokenizer = self._given_tokenizer
            self.__dict__.pop("tokenizer", None)
            if (own := self.tokenizer.get_vocab()) != (other := tokenizer.get_vocab()):
                raise ValueError(
                    f"{type(self).__name__} was given a tokenizer of {len(own):,} tokens and the data one of "
                    f"{len(other):,}, and their vocabularies differ. Give one of the two."
                )
        self._tokenizer = tokenizer
        self.__dict__.pop("tokenizer", None)

    @cached_property
    def isolation(self) -> Isolation:
        """What is proved of the model: whether packed documents and padding leave each other alone."""
        found = isolation_of(self, self.model_config, self.kernels.attention, self.trust_remote_code)
        self.gives_document_lengths = found.packed == "lengths"
        return found

    def check_rows(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Refuse packed rows of a model whose documents would see each other.

        A data module asks before training. This is for everyone else's loader.

        Raises:
            ValueError: documents share a row, and this model does not keep them apart.
        """
        if self._rows_are_safe:
            return
        maybe = [m for m in micro_batches if m.get("packed") is not False and m.get("attention_mask") is None]
        if not any(isinstance(m.get("position_ids"), Tensor) for m in maybe):
            return
        found = self.isolation
        self._rows_are_safe = found.packed is not None
        if not self._rows_are_safe and any(packs(m) for m in maybe):
            raise ValueError(
                f"The position_ids of these rows restart, so they hold several documents, and {found}. Give one "
                "document a row, padded, with an attention_mask."
            )

    def configure_model(self) -> None:
        """Build the model on the strategy's mesh. The Trainer calls this after the processes have started.

        Raises:
            ValueError: the module's options do not work with each other or with the strategy.
        """
        if self.model is not None:
            return
        self._check_options()
        check_compiled(self.kernels, self.strategy.compiles)
        # Lightning calls this with the GPU as the default device, and the builder chooses every tensor's device itself.
        with torch.device("cpu"), self._imports_beside():
            self.model = self._build()
        check_gathered(self.model)
        if lora_of(self.model) is None:
            check_generation_config(self.model, self.source)
        packing_without_sync(self.model)
        if self.defers_logits and self.kernels.on(self.strategy.root_device).loss != "whole":
            defer_logits(self.model)
        self._balance = balance_of(self.balance, self.model, adapted=lora_of(self.model) is not None)
        if self.neftune_alpha:
            add_neftune(self.model.get_input_embeddings(), self.neftune_alpha)
        save_by_export(self.model)
        self.model.train()
        if self.trainer.state.fn == TrainerFn.FITTING:
            trainer: Any = self.trainer
            check_objective(trainer.callbacks, self.model)

    def _imports_beside(self) -> AbstractContextManager[None]:
        """A context around loading, in which a run that trains imports what its first step needs."""
        trains = self.trainer.state.fn == TrainerFn.FITTING
        return self.strategy.beside_loading() if trains else nullcontext()

    def _check_options(self) -> None:
        cp = self.strategy.dims.cp
        if cp > 1 and not self.targets_per_token:
            raise ValueError(
                f"cp={cp} splits sequences over ranks, and {type(self).__name__} does not have one target per token "
                "(targets_per_token=False): the losses of the parts would not add up to the loss of the row. Set cp=1."
            )
        if self.kernels.loss != "auto" and not self.defers_logits:
            raise ValueError(
                f"kernels loss={self.kernels.loss!r} chooses how the next-token loss is computed, and "
                f"{type(self).__name__} has a loss of its own (defers_logits=False). Leave it at 'auto'."
            )

    def _build(self) -> PreTrainedModel:
        (reference,) = self._reference
        if isinstance(reference, PreTrainedModel):
            return self._adopt(reference)
        assert self.source is not None
        return build_pretrained(
            self.auto_class,
            self.source,
            self.model_config,
            self.strategy,
            allow_missing_weights=self.new_modules,
            allow_unused_weights=self.allow_unused_weights,
            trust_remote_code=self.trust_remote_code,
            lora=self.lora,
            kernels=self.kernels,
            freeze=self.frozen,
        )

    def _adopt(self, model: PreTrainedModel) -> PreTrainedModel:
        _ = self.base_values  # of the object as it was given
        check_purpose(model, self.auto_class)
        dtype = self.strategy.dtypes.parameters
        if lora_of(model) is not None:  # it was built with adapters, perhaps trained ones: keep them and its dtypes
            if self.lora is not None:
                raise ValueError(
                    f"The model already has adapters: leave out {type(self).__name__}(lora=…) to train them."
                )
            if self.kernels.fp8 is not None:
                raise ValueError(
                    f"fp8={self.kernels.fp8!r} casts frozen weights while they are read, and this model is already "
                    f"loaded. Build it with automodel_trainer.auto.builder({self.auto_class!r})"
                    ".from_pretrained(lora=…, kernels=KernelsConfig(fp8=…)) instead."
                )
            apply_kernels(model, self.kernels, self.strategy.root_device)
            self.strategy.parallelize(model)
            fuse_as_chosen(model)
            return model
        check_dense(model)
        forget_quantization(model.config)  # transformers leaves it there when it has dequantized the weights
        # Optimizer state follows the parameters: a bf16 checkpoint is trained from fp32 master weights.
        hold_in(model, dtype)
        if self.frozen:
            freeze_parts(model, self.frozen)
        if self.lora is not None:
            self._tell_change(model)
            on_meta = any(parameter.is_meta for parameter in model.parameters())
            add_adapters(model, self.lora, self.strategy, self.source if on_meta else None)
        apply_kernels(model, self.kernels, self.strategy.root_device)
        if not any(parameter.is_meta for parameter in model.parameters()):
            self.strategy.parallelize(model)
            finish_lora(model)
            self.strategy.finalize_parameters(model)
            return model
        if self.source is None:
            raise ValueError(
                f"The model is on meta, and its name_or_path {model.name_or_path!r} is not a folder with weights."
            )
        fill_from_folder(
            model,
            self.source,
            self.strategy,
            allow_missing_weights=self.new_modules,
            allow_unused_weights=self.allow_unused_weights,
            trust_remote_code=self.trust_remote_code,
        )
        return model

    def _tell_change(self, model: PreTrainedModel) -> None:
        if self.changed_in_memory is not None:
            rank_zero_warn(
                f"{self.changed_in_memory} of the model that was given is another than in {model.name_or_path}, which "
                "the adapters will name as their base: who loads or merges them gets another model. Save the changed "
                "one (model.save_pretrained(folder)) and give that folder."
            )

    def on_fit_end(self) -> None:
        """Write the trained adapter into the `PeftModel` that was given, if one was. Collective."""
        if self._given_peft is not None:
            self._given_peft.give_back(self.model)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | os.PathLike[str],
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """A module with the weights of a checkpoint folder. The model is built when a Trainer runs it.

        Args:
            checkpoint_path: the checkpoint folder.
            map_location, hparams_file, strict, weights_only: have no meaning here; give none of them.
            kwargs: arguments of the class. Of adapters, `model` is the base, by default the one they were trained on.

        Raises:
            ValueError: the folder is damaged or no checkpoint, or one of the arguments above was given.
        """
        given = {"map_location": map_location, "hparams_file": hparams_file, "strict": strict or None}
        if unused := [name for name, value in given.items() if value is not None]:
            raise ValueError(
                f"{cls.__name__}.load_from_checkpoint takes no {', '.join(unused)}: the model is built on its device "
                "when a Trainer runs the module, and its weights must all be there. Leave it out."
            )
        check_checkpoint(checkpoint_path)
        folder = Path(checkpoint_path) / "model"
        if not (folder / ADAPTER_CONFIG).is_file():
            return cls(**{"model": folder, **kwargs})
        base = read_config(folder)["base_model_name_or_path"]
        if base is None and "model" not in kwargs:
            raise ValueError(f"{folder} holds adapters and does not name their base model: give model=.")
        changes = read_changes(folder) if "model" not in kwargs else {}
        overrides = {"config_overrides": changes} if changes else {}
        return cls(**{"model": base, "lora": LoRAConfig(adapter=str(folder)), **overrides, **kwargs})

    def without_model(self) -> Self:
        """A light copy to send to other processes. It has the loss and settings, but no model, tokenizer or Trainer."""
        light = copy.copy(self)
        light._modules = {**self._modules, "model": None}
        light._reference = ("",)
        light._tokenizer = None
        light._given_peft = None
        light._balance = None
        light._trainer = None
        light._load_state_dict_pre_hooks = OrderedDict()  # Lightning's are bound to the module with the model
        light.__dict__.pop("tokenizer", None)
        return light

    @property
    def strategy(self) -> MeshStrategy:
        """The Trainer's strategy.

        Raises:
            ValueError: the strategy is not a `MeshStrategy`.
        """
        strategy = self.trainer.strategy
        if not isinstance(strategy, MeshStrategy):
            raise ValueError(
                f"{type(self).__name__} runs on automodel_trainer's strategies, not on {type(strategy).__name__}. "
                "Use automodel_trainer.Trainer(strategy='auto' | 'ddp' | 'fsdp2' | 'hsdp' | …)."
            )
        return strategy

    def forward(self, **inputs: Any) -> Any:
        """Call the model's own forward."""
        return self.model(**inputs)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        """Run transformers' `generate` on the laid-out model.

        Args:
            input_ids: int64 `[b, s]`.
            kwargs: as transformers has them.

        Returns:
            int64 `[b, s + new tokens]`. Collective: every rank calls this with the same arguments.
        """
        return self.model.generate(input_ids, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The model's state dict: its keys are the Hugging Face keys."""
        return self.model.state_dict(*args, **kwargs) if self.model is not None else {}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict with Hugging Face keys into the model; see `torch.nn.Module.load_state_dict`."""
        return self.model.load_state_dict(placed(self.model, state_dict), strict=strict, assign=assign)
