"""ImageTextModule: next-token training of a vision-language model."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Self

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin

from automodel_trainer.data.image_text import ImageTextDataModule
from automodel_trainer.models.build import build_on_meta
from automodel_trainer.models.files import resolve_folder
from automodel_trainer.models.isolation import Isolation
from automodel_trainer.models.parts import ModelParts
from automodel_trainer.models.processors import check_processor, has_processor, load_processor
from automodel_trainer.models.rope_index import RopeIndex, has_rope_index
from automodel_trainer.models.small_copy import TOKEN_TYPES
from automodel_trainer.models.stage_names import names_of_all_stages
from automodel_trainer.modules.causal_lm import CausalLMModule
from automodel_trainer.modules.idle_parameters import freeze_idle
from automodel_trainer.strategies.base.objective import DEFAULT_INPUTS, MicroBatch

_CROSS_ATTENTION = ("cross_attention_mask", "image_attention_mask")
_NOT_OF_PICTURES = {*DEFAULT_INPUTS, *TOKEN_TYPES, "labels", "inputs_embeds", "past_key_values", "use_cache"}


class ImageTextModule(CausalLMModule):
    """Trains a vision-language model on next-token prediction of text, given pictures.

    It takes the arguments of `HuggingFaceModule` and:

    Args:
        processor: a processor or its path; by default the model's own.
        freeze: parts that are not trained: "vision" (the tower), "projector", "language", or globs over the names of
            parameters. With adapters, `all-linear` means the language model as long as the tower is frozen.
        lr: the peak learning rate, or one for each part: `{"language": 1e-5, "projector": 1e-4}`. Keys may be globs;
            the first that means a parameter counts.

    Micro-batches may have every input that the model's forward names: `pixel_values`, `image_grid_thw`, … Rows without
    pictures need none.

    Raises:
        ValueError: as `HuggingFaceModule`; or `freeze` or `lr` is malformed.
    """

    auto_class = "AutoModelForImageTextToText"
    data_class = ImageTextDataModule

    def __init__(
        self,
        model: str | os.PathLike[str] | PreTrainedModel,
        *,
        processor: str | os.PathLike[str] | ProcessorMixin | None = None,
        freeze: Sequence[str] = ("vision",),
        lr: float | dict[str, float] = 2e-5,
        **kwargs: Any,
    ) -> None:
        if isinstance(freeze, str):
            raise ValueError(f"freeze={freeze!r} must be a list, such as ['{freeze}'].")
        rates = dict(lr) if isinstance(lr, Mapping) else {"*": lr}
        if not rates or any(rate < 0 for rate in rates.values()):
            raise ValueError(f"lr={lr!r} must be a number, or one for each part: {{'language': 1e-5, …}}.")
        self._processor = processor
        self._is_light = False  # `without_model` makes copies that know no folder
        self.frozen = tuple(freeze)
        self.rates = rates
        super().__init__(model, lr=max(rates.values()), **kwargs)
        self.save_hyperparameters({"freeze": list(freeze), "lr": lr})

    # --- the processor --------------------------------------------------------------------------------------------

    @cached_property
    def processor(self) -> ProcessorMixin:
        """The processor, loaded on first use.

        Raises:
            ValueError: none was given, and the model has no folder or its folder holds no processor.
        """
        given = self._processor
        if given is not None and not isinstance(given, str | os.PathLike):
            return check_processor(given, f"{type(self).__name__}(processor=…)")
        folder = resolve_folder(given) if given is not None else self.source
        if folder is None:
            raise ValueError(
                "This model was built in memory and names no folder with a processor: give "
                f"{type(self).__name__}(processor=…)."
            )
        found = load_processor(folder, self.trust_remote_code)
        if isinstance(self._tokenizer, PreTrainedTokenizerBase):
            found.tokenizer = self._tokenizer
        return found

    @property
    def _has_processor(self) -> bool:
        return self._processor is not None or (self.source is not None and has_processor(self.source))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The processor's tokenizer. A model without a processor can be trained on text with its tokenizer."""
        return self.processor.tokenizer if self._has_processor else self.load_tokenizer()

    @property
    def tokenizer_or_none(self) -> PreTrainedTokenizerBase | None:
        return self.tokenizer if self._has_processor else super().tokenizer_or_none

    @property
    def saved_tokenizer(self) -> Any:
        """What is saved with the model: the processor, which holds the tokenizer."""
        return self.processor if self._has_processor else super().saved_tokenizer

    @property
    def brings_tokenizer(self) -> bool:
        """See `BuiltModule.brings_tokenizer`; the same of the processor."""
        return super().brings_tokenizer or self._processor is not None or "processor" in self.__dict__

    def adopt_processor(self, processor: ProcessorMixin) -> None:
        """Take the processor that the data is made with: checkpoints and exports get it."""
        self._processor = processor
        for name in ("processor", "tokenizer"):
            self.__dict__.pop(name, None)

    def _check_options(self) -> None:
        super()._check_options()
        crossed = next((name for name in self.model_inputs if name in _CROSS_ATTENTION), None)
        for axis in ("cp", "pp"):
            if crossed and (size := getattr(self.strategy.dims, axis, 1)) > 1:
                raise ValueError(
                    f"{axis}={size} does not work with {type(self.outline).__name__}: its layers see pictures by "
                    f"cross-attention ({crossed}). Set {axis}=1; dp_shard, dp_replicate and tp work."
                )

    # --- the model ------------------------------------------------------------------------------------------------

    @cached_property
    def outline(self) -> PreTrainedModel:
        """The model without weights, for what its class and names tell before it is built."""
        given = self.given_model
        if given is None and self._is_light:
            given = self.model  # the one that was set since
        if given is not None:
            return given
        return build_on_meta(self.auto_class, self.model_config, torch.float32, None, self.trust_remote_code)

    @cached_property
    def model_inputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """Keys of a micro-batch that the model's forward takes: all that it names, but no cache and no labels."""
        named = inspect.signature(self.outline.forward).parameters
        more = [name for name in named if name not in _NOT_OF_PICTURES]
        return (*DEFAULT_INPUTS, *(name for name in TOKEN_TYPES if name in named), *more)

    @cached_property
    def rope_index(self) -> RopeIndex | None:
        """What computes the positions of tokens, of a model that counts them in several dimensions."""
        return RopeIndex(self.outline) if has_rope_index(self.outline) else None

    def split(self, micro_batch: MicroBatch) -> tuple[dict[str, Any], Tensor]:
        """See `Objective.split`. Rows without pictures get what the model wants all the same.

        Raises:
            ValueError: packed rows with pictures have one position for each token, and the model has several.
        """
        ids = micro_batch["input_ids"]
        positions: Any = micro_batch.get("position_ids")
        more: MicroBatch = {}
        for name in TOKEN_TYPES:
            if name in self.model_inputs and micro_batch.get(name) is None:
                more[name] = torch.zeros_like(ids)  # every token is text
        one_document = micro_batch.get("packed") is False or micro_batch.get("attention_mask") is not None
        if self.rope_index is not None and not one_document and getattr(positions, "ndim", 0) == 2:
            if self.pictures_in(micro_batch):
                raise ValueError(
                    f"{type(self.outline).__name__} counts tokens in time, height and width, and these packed rows "
                    f"with pictures have position_ids {list(positions.shape)}. Give [4, rows, tokens]: the place in "
                    "the document, and what the model's get_rope_index says of each document."
                )
            more["position_ids"] = positions.expand(4, -1, -1)
        return super().split({**micro_batch, **more})

    @cached_property
    def isolation(self) -> Isolation:
        """See `BuiltModule.isolation`. Pictures that are seen by cross-attention are those of a whole row."""
        found = super().isolation
        crossed = [name for name in self.model_inputs if name in _CROSS_ATTENTION]
        if found.packed is None or not crossed:
            return found
        obstacle = f"{type(self.outline).__name__} sees pictures by cross-attention ({crossed[0]}), a set for each row"
        return replace(found, packed=None, packed_obstacle=obstacle)

    def pictures_in(self, micro_batch: MicroBatch) -> list[str]:
        """The keys of a micro-batch that hold pictures, or what belongs to them."""
        return [
            key for key, value in micro_batch.items()
            if key in self.model_inputs and key not in _NOT_OF_PICTURES and value is not None
        ]  # fmt: skip

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """See `Objective.loss`. Rows without pictures may reach nothing that is trained: then no gradient is made."""
        loss = super().loss(outputs, targets)
        if loss.requires_grad or not torch.is_grad_enabled():
            return loss
        return loss + torch.zeros_like(loss, requires_grad=True)

    def after_backward(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Without a picture in the global batch, tower and projector have no gradient, as on one device."""
        if any(micro_batch.get("only_blank_pictures") for micro_batch in micro_batches):
            parts = ModelParts(self.model)
            for name, parameter in self.model.named_parameters():
                if parts.of(name) != "language":
                    parameter.grad = None

    def without_pictures(self) -> None:
        """Freeze what text alone does not reach, as the data have no pictures. The model is not built yet."""
        parts = ModelParts(self.outline)
        idle = {parts.of(name) for name, _ in self.outline.named_parameters()} - {"language", *self.frozen}
        if idle and self.model is None:
            self.frozen = (*self.frozen, *sorted(idle))
            rank_zero_info(f"The data has no pictures: {' and '.join(sorted(idle))} of the model stay as they are.")

    def laid_out(self, strategy: Any) -> None:
        """See `Objective.laid_out`. Parameters of tower and projector that no forward reaches are frozen."""
        data = getattr(self.trainer, "datamodule", None)
        parts = ModelParts(self.model)
        seeing = [n for n, p in self.model.named_parameters() if p.requires_grad and parts.of(n) != "language"]
        seeing = names_of_all_stages(self.model, seeing)
        if seeing and isinstance(data, ImageTextDataModule) and strategy.plain_backward:
            freeze_idle(self, strategy, data.picture_probe(), among=lambda name: parts.of(name) != "language")

    def lr_of(self) -> Callable[[str], float]:
        """The learning rate of a parameter, by its name.

        Raises:
            ValueError: `lr` says nothing of a parameter that is trained, or something of none.
        """
        parts = ModelParts(self.model)
        trained = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        trained = names_of_all_stages(self.model, trained)
        for pattern in self.rates:
            if not any(parts.matches(name, pattern) for name in trained):
                raise ValueError(
                    f"lr: {pattern!r} is no part of what is trained. Trained: "
                    f"{', '.join(sorted({parts.of(name) for name in trained}))} (freeze={list(self.frozen)})."
                )

        def rate(name: str) -> float:
            found = next((rate for pattern, rate in self.rates.items() if parts.matches(name, pattern)), None)
            if found is None:
                raise ValueError(
                    f"lr={self.rates} says nothing of {name} ({parts.of(name)}), which is trained. Add "
                    f"{parts.of(name)!r}, or '*' for all others at the end."
                )
            return found

        return rate

    def without_model(self) -> Self:
        light = super().without_model()
        light._processor, light._is_light = None, True
        for name in ("processor", "outline", "rope_index"):
            light.__dict__.pop(name, None)
        return light
