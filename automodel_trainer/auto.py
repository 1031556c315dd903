"""transformers' auto classes, with layouts: drop-in replacements that also build models sharded.

Importing this file costs what importing transformers' own classes costs: what builds a model is imported when one is
built.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, ClassVar

import transformers

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from automodel_trainer.models.kernels import KernelsConfig
    from automodel_trainer.models.layout import Layout
    from automodel_trainer.models.lora import LoRAConfig


class AutoBuilder:
    """Builds the model that transformers' auto class of the same name builds, sharded if asked.

    The result is the transformers model itself: the same class, forward, state-dict keys and `generate`. With a
    strategy (whose processes have started) the model is laid out on its mesh, and no rank ever holds all of it. A
    subclass is transformers' class too, with everything else that it offers (`register`, say).

    Attributes:
        auto_class: name of transformers' class.
    """

    auto_class: ClassVar[str]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        strategy: Layout | None = None,
        dtype: torch.dtype | str | None = None,
        *,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
        allow_missing_weights: bool | Collection[str] = False,
        allow_unused_weights: bool = False,
        device: torch.device | str = "cpu",
        lora: LoRAConfig | None = None,
        kernels: KernelsConfig | None = None,
        **config_overrides: Any,
    ) -> PreTrainedModel:
        """Build a model and stream its checkpoint into it.

        Args:
            pretrained_model_name_or_path: a folder with config.json and safetensors, or a Hub id.
            strategy: the layout; None builds the plain model on `device`.
            dtype: of the parameters. None takes the dtype of the strategy's precision; without a strategy, that of the
                checkpoint.
            attn_implementation: transformers' name of an attention kernel; None lets transformers choose.
            trust_remote_code: run model code that comes with the checkpoint.
            revision: branch, tag or commit of a Hub repository.
            allow_missing_weights: True initialises weights that the checkpoint lacks, instead of raising. Names of
                modules allow it for these only, and they must then be trained.
            allow_unused_weights: load a part of what the checkpoint holds (the text model without its vision tower,
                say). The rest is not trained, and missing in what is saved.
            device: where to build without a strategy.
            lora: adapters to train on the frozen model.
            kernels: the kernels to compute with; None leaves the choice to transformers.
            config_overrides: attributes of the model's config to change.

        Raises:
            ValueError: the folder or repository does not exist, weights are missing or damaged, a config attribute is
                unknown, or this device, model or layout does not have a kernel that was asked for.
        """
        from automodel_trainer.models.build import build_pretrained, load_config
        from automodel_trainer.models.files import resolve_folder

        folder = resolve_folder(pretrained_model_name_or_path, revision)
        return build_pretrained(
            cls.auto_class,
            folder,
            load_config(folder, trust_remote_code, config_overrides),
            strategy,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            allow_missing_weights=allow_missing_weights,
            allow_unused_weights=allow_unused_weights,
            device=device,
            lora=lora,
            kernels=kernels,
        )

    @classmethod
    def from_config(
        cls,
        config: PreTrainedConfig,
        strategy: Layout | None = None,
        dtype: torch.dtype | str | None = None,
        *,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
        lora: LoRAConfig | None = None,
        kernels: KernelsConfig | None = None,
        strict: bool = True,
    ) -> PreTrainedModel:
        """Build a model with random weights. The same `seed` gives the same weights under every strategy.

        Args:
            config: of the model.
            seed: of the random weights.
            strict: False starts parameters at zero that the model has no rule for.
            strategy, dtype, attn_implementation, trust_remote_code, device, lora, kernels: see `from_pretrained`.

        Raises:
            ValueError: this device, model or layout does not have a kernel that was asked for; or the model has no rule
                to draw some of its parameters.
        """
        from automodel_trainer.models.build import build_random

        return build_random(
            cls.auto_class,
            config,
            strategy,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            seed=seed,
            device=device,
            lora=lora,
            kernels=kernels,
            strict=strict,
        )


class AutoModel(AutoBuilder, transformers.AutoModel):  # type: ignore[misc]
    """Builds the model that `transformers.AutoModel` builds: the body without a head. See `AutoBuilder`."""

    auto_class = "AutoModel"


class AutoModelForCausalLM(AutoBuilder, transformers.AutoModelForCausalLM):  # type: ignore[misc]
    """Builds the model that `transformers.AutoModelForCausalLM` builds, sharded if asked. See `AutoBuilder`."""

    auto_class = "AutoModelForCausalLM"


class AutoModelForImageTextToText(AutoBuilder, transformers.AutoModelForImageTextToText):  # type: ignore[misc]
    """Builds the model that `transformers.AutoModelForImageTextToText` builds, sharded if asked. See `AutoBuilder`."""

    auto_class = "AutoModelForImageTextToText"


class AutoModelForSequenceClassification(AutoBuilder, transformers.AutoModelForSequenceClassification):  # type: ignore[misc]
    """Builds the model that `transformers.AutoModelForSequenceClassification` builds. See `AutoBuilder`."""

    auto_class = "AutoModelForSequenceClassification"


class AutoModelForTokenClassification(AutoBuilder, transformers.AutoModelForTokenClassification):  # type: ignore[misc]
    """Builds the model that `transformers.AutoModelForTokenClassification` builds. See `AutoBuilder`."""

    auto_class = "AutoModelForTokenClassification"


def builder(auto_class: str) -> type[AutoBuilder]:
    """The class of this project for a transformers auto class of this name, also one that is not listed above.

    Raises:
        ValueError: transformers has no such class.
    """
    from automodel_trainer.models.auto_classes import transformers_class

    theirs = transformers_class(auto_class)
    return type(auto_class, (AutoBuilder, theirs), {"auto_class": auto_class})
