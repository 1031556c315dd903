"""transformers' auto classes, with layouts: drop-in replacements that also build models sharded.

Importing this file costs what importing transformers' own classes costs: what builds a model is imported when one is
built.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, ClassVar

import transformers

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from automodel_trainer.models.build import MayBeMissing
    from automodel_trainer.models.kernels import KernelsConfig
    from automodel_trainer.models.layout import Layout
    from automodel_trainer.models.lora import LoRAConfig


class AutoBuilder:
    """Builds the model that transformers' auto class of the same name builds, sharded if asked.

    The result is the transformers model itself: the same class, forward, state-dict keys and `generate`. With a
    strategy the model is laid out on its mesh, and no rank ever holds all of it. A subclass is transformers' class too,
    with everything else that it offers (`register`, say).

    Attributes:
        auto_class: name of transformers' class.
    """

    auto_class: ClassVar[str]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        strategy: str | Layout | None = None,
        dtype: torch.dtype | str | None = None,
        *,
        attn_implementation: str | None = None,
        trust_remote_code: bool | None = False,
        allow_missing_weights: MayBeMissing | None = None,
        allow_unused_weights: bool = False,
        device: torch.device | str | None = None,
        lora: LoRAConfig | None = None,
        kernels: KernelsConfig | None = None,
        **kwargs: Any,
    ) -> PreTrainedModel:
        """Build a model and stream its checkpoint into it, in evaluation mode as transformers does.

        All arguments of transformers' `from_pretrained` are taken. What only transformers does (`quantization_config`,
        `device_map="auto"`, `gguf_file`, …) makes the call transformers' own. It is refused together with a strategy,
        adapters or kernels.

        Args:
            pretrained_model_name_or_path: a folder with config.json and safetensors, a Hub id, or an adapter in PEFT's
                format, of which the base is loaded too. The adapter can be trained on.
            strategy: the layout, as a name (`"fsdp2:tp=2"`) or a strategy. It is started first if it has not started
                (`strategy.start()`): the ranks are those of torchrun, srun or a running process group. None builds the
                plain model.
            dtype: of the parameters. None takes the dtype of the strategy's precision; without a strategy, that of the
                checkpoint.
            attn_implementation: transformers' name of an attention kernel; None lets transformers choose.
            trust_remote_code: run model code that comes with the checkpoint.
            allow_missing_weights: True initialises weights that the checkpoint lacks, instead of raising. Names of
                modules allow it for these only, and they must then be trained. "head" allows it for heads and poolers,
                with a warning; it is the default of the classes that give a body a new head.
            allow_unused_weights: load a part of what the checkpoint holds (the text model without its vision tower,
                say). The rest is not trained, and missing in what is saved.
            device: where to build without a strategy; None: torch's default device.
            lora: adapters to train on the frozen model.
            kernels: the kernels to compute with; None leaves the choice to transformers.
            kwargs: other arguments of transformers' `from_pretrained` (`revision`, `subfolder`, `token`, `config`,
                `device_map`, `generation_config`, …), and attributes of the model's config to change.

        Raises:
            ValueError: the folder or repository does not exist, weights are missing or damaged, an argument or config
                attribute is unknown or not for this project, or this device, model or layout does not have a kernel
                that was asked for.
        """
        from automodel_trainer.models.arguments import refuse_together, sort_arguments
        from automodel_trainer.models.pretrained import load_pretrained

        arguments = sort_arguments(kwargs, dtype)
        if arguments.only_transformers:
            ours: dict[str, Any] = {"strategy": strategy, "lora": lora, "kernels": kernels, "device": device}
            ours |= {"allow_missing_weights": allow_missing_weights, "allow_unused_weights": allow_unused_weights}
            refuse_together(arguments.only_transformers, {name: value for name, value in ours.items() if value})
            given = {"dtype": dtype, "attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
            given = {name: value for name, value in given.items() if value is not None}
            theirs: Any = super()
            model: PreTrainedModel = theirs.from_pretrained(pretrained_model_name_or_path, **given, **kwargs)
            return model
        layout = started(strategy, arguments.dtype)
        built = load_pretrained(
            cls.auto_class,
            pretrained_model_name_or_path,
            layout,
            arguments,
            attn_implementation=attn_implementation,
            trust_remote_code=bool(trust_remote_code),
            allow_missing_weights=allow_missing_weights,
            allow_unused_weights=allow_unused_weights,
            device=device,
            lora=lora,
            kernels=kernels,
        )
        return finished(built, layout, kernels)

    @classmethod
    def from_config(
        cls,
        config: PreTrainedConfig,
        strategy: str | Layout | None = None,
        dtype: torch.dtype | str | None = None,
        *,
        attn_implementation: str | None = None,
        trust_remote_code: bool | None = False,
        seed: int | None = None,
        device: torch.device | str | None = None,
        lora: LoRAConfig | None = None,
        kernels: KernelsConfig | None = None,
        strict: bool = True,
        **kwargs: Any,
    ) -> PreTrainedModel:
        """Build a model with random weights. The same `seed` gives the same weights under every strategy.

        Args:
            config: of the model.
            seed: of the random weights; None draws one from torch's generator, that of rank 0.
            device: where to build without a strategy; None: torch's default device. On "meta", or in accelerate's
                `init_empty_weights()`, the model stays empty.
            strict: False starts parameters at zero that the model has no rule for.
            strategy, dtype, attn_implementation, trust_remote_code, lora, kernels: see `from_pretrained`.
            kwargs: `torch_dtype`, `experts_implementation` and `code_revision`, as transformers' `from_config` takes.

        Raises:
            ValueError: an argument is unknown; this device, model or layout does not have a kernel that was asked for;
                or the model has no rule to draw some of its parameters.
        """
        from automodel_trainer.models.pretrained import draw

        older = kwargs.pop("torch_dtype", None)
        dtype = older if dtype is None else dtype
        layout = started(strategy, dtype)
        built = draw(
            cls.auto_class,
            config,
            layout,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=bool(trust_remote_code),
            seed=seed,
            device=device,
            lora=lora,
            kernels=kernels,
            strict=strict,
            options=kwargs,
        )
        return finished(built, layout, kernels)


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


_STARTED: dict[tuple[str, str | None], Any] = {}  # the strategies that were given as names


def started(strategy: str | Layout | None, dtype: Any = None) -> Layout | None:
    """The strategy, started if it was not. The same name gives the same strategy until it is stopped. Collective.

    Args:
        strategy: a name, a strategy, or None.
        dtype: of the parameters; in bf16 or fp64, everything is computed in that dtype. None: fp32.

    Raises:
        ValueError: the name is unknown, the sizes do not fit the number of ranks, or a Trainer has the strategy.
    """
    if strategy is None:
        return None
    from automodel_trainer.strategies import MeshStrategy, StrategyRegistry

    precision = {"bfloat16": "bf16-true", "float64": "64-true"}.get(str(dtype).removeprefix("torch."))
    if not isinstance(strategy, str):
        if not isinstance(strategy, MeshStrategy):
            raise ValueError(
                f"strategy={strategy!r} is no layout. Give a name such as 'fsdp2:tp=2', or FSDP2Strategy(tp=2)."
            )
        return strategy.start(precision)
    known = _STARTED.get((strategy, precision))
    if known is None or not known.has_started:
        made = StrategyRegistry.get(strategy)
        assert isinstance(made, MeshStrategy)
        known = _STARTED[strategy, precision] = made.start(precision)
    layout: Layout = known
    return layout


def finished(model: PreTrainedModel, layout: Layout | None, kernels: KernelsConfig | None = None) -> PreTrainedModel:
    """The model, ready for other people's loops.

    It gets methods of its own to save itself where transformers would not save it right. If it is sharded,
    transformers' Trainer is told. A loss that kernels choose is the one that `model(labels=…)` computes.
    """
    from automodel_trainer.models.lora import lora_of

    if layout is not None or lora_of(model) is not None:
        from automodel_trainer.checkpoint.own_saving import save_by_export

        save_by_export(model)
    if kernels is not None and kernels.loss not in ("auto", "whole"):
        from automodel_trainer.modules.chunked_loss import compute_loss_in_chunks

        compute_loss_in_chunks(model)
    tell = getattr(layout, "tell_transformers", None)
    if tell is not None:
        tell(model)
    return model


def add_lora(model: PreTrainedModel, lora: LoRAConfig) -> PreTrainedModel:
    """Freeze a model that is loaded, and give it adapters, in place. `save_pretrained` then writes the adapter.

    Args:
        model: whole, with its weights. For a sharded model, give `lora=` to `from_pretrained`.
        lora: what to adapt, and how.

    Returns:
        the model.

    Raises:
        ValueError: the model is sharded or on meta, or the configuration does not fit it.
    """
    from torch.distributed.tensor import DTensor

    from automodel_trainer.models.lora import apply_lora, finish_lora, lora_of

    for name, parameter in model.named_parameters():
        if parameter.is_meta or isinstance(parameter, DTensor):
            where = "on meta" if parameter.is_meta else "sharded"
            raise ValueError(f"{name} is {where}. Give lora= to from_pretrained, which builds such a model adapted.")
    if lora_of(model) is not None:
        raise ValueError("The model has adapters already.")
    device = next(model.parameters()).device
    apply_lora(model, lora)
    model.to(device)  # type: ignore[arg-type]
    finish_lora(model)
    return finished(model, None)


def builder(auto_class: str) -> type[AutoBuilder]:
    """The class of this project for a transformers auto class of this name, also one that is not listed above.

    Raises:
        ValueError: transformers has no such class.
    """
    from automodel_trainer.models.auto_classes import transformers_class

    theirs = transformers_class(auto_class)
    return type(auto_class, (AutoBuilder, theirs), {"auto_class": auto_class})
