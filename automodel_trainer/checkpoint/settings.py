"""The settings of a run, and what each means where it differs from the checkpoint that the run goes on from.

`SETTINGS` is the whole list. A name is the key in YAML, such as `model.lora.rank`. Settings that a user's own module or
data module adds are taken over: their code has used the new value by the time the checkpoint is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from itertools import takewhile
from typing import Any

from automodel_trainer.checkpoint.given import same

RESUME = ("all", "data", "weights")
"""What a run takes from a checkpoint: everything; all but its place in the data; or its weights alone."""


class Meaning(StrEnum):
    """What it means that a setting of a run differs from the checkpoint's."""

    TAKEN_OVER = "taken over"  # the run's value counts from its first step on
    REFUSED = "refused"  # the checkpoint cannot go on so; the reason says why
    NEW_DATA = "asked for by resume='data'"  # refused, unless the user asks for other data


@dataclass(frozen=True)
class Setting:
    """One line of the list.

    Attributes:
        name: the setting, or a glob over settings.
        meaning: what a difference means.
        reason: why it is refused; for one that is taken over, how, if that is not plain.
    """

    name: str
    meaning: Meaning
    reason: str = ""


_TAKEN, _REFUSED, _DATA = Meaning.TAKEN_OVER, Meaning.REFUSED, Meaning.NEW_DATA
_OTHER_ADAPTER = "the adapters in the checkpoint mean something else under it"
_BEGUN = "the adapters have their initial values already, so it would be ignored"
_ROWS = "it decides what the rows of the data are, so the place in the data is lost"
_OTHER_FUNCTION = "the model would compute something else with the same weights"


# What a difference means, the settings' common beginning, their names, and the reason.
_TABLE: tuple[tuple[Meaning, str, str, str], ...] = (
    # --- optimization
    (_TAKEN, "model.", "lr", "with the schedule, from the first step on; the optimizer's moments stay"),
    (_TAKEN, "model.", "lr.*", "by the name of each parameter, also where the parts are others"),
    (_REFUSED, "model.", "optimizer.name", "the optimizer's state means nothing to another optimizer"),
    (_TAKEN, "model.optimizer.", "weight_decay args args.*", ""),
    (_TAKEN, "model.", "optimizer", ""),
    (
        _TAKEN,
        "model.",
        "scheduler scheduler.name scheduler.warmup_steps scheduler.warmup_ratio scheduler.min_lr_ratio "
        "scheduler.decay_ratio",
        "the step keeps its number; its learning rate is the new schedule's",
    ),
    (_TAKEN, "model.", "gradient_clip_val neftune_alpha", ""),
    # --- the model
    (_TAKEN, "model.", "model", "weights come from the checkpoint; those of a frozen base must be the same"),
    (_REFUSED, "model.", "base_weights base_values", "the adapters were trained on other base weights"),
    (_TAKEN, "model.", "revision trust_remote_code allow_unused_weights kernels.* balance balance.*", ""),
    (
        _TAKEN,
        "model.config.",
        "*drop* *loss* *coef* *_token_id use_cache output_* initializer_* return_dict *_implementation dtype",
        "",
    ),
    (_REFUSED, "model.", "config.*", _OTHER_FUNCTION),
    (_REFUSED, "model.", "tokenizer", "the model has learned other tokens: the embeddings would be mixed up"),
    (_TAKEN, "model.", "tokenizer_rules", "the tokens mean the same; texts may be cut otherwise (data.rows tells)"),
    (_REFUSED, "model.", "processor", "the model has learned pictures that were prepared otherwise"),
    (_REFUSED, "model.", "freeze", "other weights are trained"),
    (_REFUSED, "model.", "lora", "adapters and the whole model are trained by different weights"),
    (_REFUSED, "model.lora.", "rank alpha target_modules exclude use_rslora use_dora", _OTHER_ADAPTER),
    (_REFUSED, "model.lora.", "modules_to_save", "other weights are trained"),
    (_REFUSED, "model.lora.", "init adapter seed", _BEGUN),
    (_TAKEN, "model.lora.", "dropout lr_ratio modules_to_save_lr quantize", ""),
    # --- the data
    (
        _TAKEN,
        "data.",
        "micro_batch_size global_batch_size drop_last",
        "each row of an epoch is seen once, and the schedule spans the steps that are left",
    ),
    (_TAKEN, "data.", "seed", "the epoch under way keeps its order; later ones have the new one"),
    (_TAKEN, "data.", "num_workers cache validation test", ""),
    (_DATA, "data.", "rows", "the training rows are others"),
    (_DATA, "data.", "seq_len packing loss_on val_split columns overlong text_column shuffle_buffer", _ROWS),
    (
        _DATA,
        "data.",
        "temperature split document_end token_dtype streaming vocab_size num_samples chat_template class",
        _ROWS,
    ),
    (_DATA, "data.", "image_mark min_pixels max_pixels videos video_fps", _ROWS),
    (_TAKEN, "data.", "image_root processor", "if the rows and what prepares their pictures are the same"),
    (_TAKEN, "data.", "train", "if the rows are the same; a stream is told by its name"),
    (_DATA, "data.", "stream", "a stream's place is that in its source"),
    (_TAKEN, "data.", "val_samples", ""),
    (_TAKEN, "data.", "rows_per_batch", "in a loader of your own only between epochs"),
    # --- the run
    (
        _TAKEN,
        "trainer.",
        "max_steps max_epochs limit_train_batches overfit_batches",
        "the schedule spans the new length, from the first step on",
    ),
    (_TAKEN, "trainer.", "accumulate_grad_batches", "as a batch size"),
    (_TAKEN, "trainer.", "max_time min_epochs min_steps gradient_clip_val gradient_clip_algorithm", ""),
    (
        _TAKEN,
        "trainer.",
        "strategy strategy.* accelerator devices num_nodes layout precision sync_batchnorm plugins",
        "weights and optimizer state are read into the new layout",
    ),
    (
        _TAKEN,
        "trainer.",
        "logger callbacks callbacks.* fast_dev_run limit_val_batches limit_test_batches limit_predict_batches "
        "val_check_interval check_val_every_n_epoch num_sanity_val_steps log_every_n_steps "
        "enable_checkpointing enable_progress_bar enable_model_summary enable_ledger enable_throughput "
        "deterministic benchmark inference_mode use_distributed_sampler profiler detect_anomaly barebones "
        "reload_dataloaders_every_n_epochs default_root_dir enable_autolog_hparams model_registry",
        "",
    ),
)
SETTINGS = tuple(
    Setting(f"{prefix}{name}", meaning, reason) for meaning, prefix, names, reason in _TABLE for name in names.split()
)
BASE, GIVEN_BASE = "model.base_weights", "model.base_values"
"""The base of adapters: its files, or the values of an object that was given."""
ROWS = "data.rows"
"""The content of the training data, where it is known."""
_OF_ADAPTERS = ("model.lora", BASE, GIVEN_BASE)
SHOWN = 60  # characters of a value


@dataclass(frozen=True)
class Change:
    """A setting that differs from the checkpoint's.

    Attributes:
        name: the setting.
        then: its value in the run that wrote the checkpoint.
        now: its value in this run.
        setting: its line of the list.
    """

    name: str
    then: Any
    now: Any
    setting: Setting

    def __str__(self) -> str:
        then, now = _text(self.then), _text(self.now)
        start = 0
        if max(len(then), len(now)) > SHOWN:  # where they differ is shown
            alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(then, now)))
            start = max(0, alike - SHOWN // 3)
        return f"{self.name} {_cut(then, start)} → {_cut(now, start)}"


def setting_of(name: str) -> Setting:
    """The line of the list for a setting: one of that very name, or else the first glob that matches."""
    exact = next((setting for setting in SETTINGS if setting.name == name), None)
    found = exact or next((setting for setting in SETTINGS if fnmatchcase(name, setting.name)), None)
    return found or Setting(name, Meaning.TAKEN_OVER)


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """What differs between two runs, in the order of the second. A setting that only one of them has is left out."""
    then, now = _with_scale(then), _with_scale(now)
    return [
        Change(name, then[name], now[name], setting_of(name))
        for name in now
        if name in then and not same(then[name], now[name])
    ]


def _with_scale(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """An alpha that was not given is 2 · rank (`LoRAConfig`), and one that was given so is no other."""
    rank = settings.get("model.lora.rank")
    return settings if rank is None or settings.get("model.lora.alpha") else {**settings, "model.lora.alpha": 2 * rank}


def computes_otherwise(changed: Iterable[Change]) -> list[Change]:
    """The changes under which a checkpoint's weights compute something else."""
    reasons = (_OTHER_FUNCTION, _OTHER_ADAPTER)
    return [change for change in changed if change.name in (BASE, GIVEN_BASE) or change.setting.reason in reasons]


def refuse(changed: Iterable[Change], resume: str, checkpoint: object) -> None:
    """Refuse what a checkpoint cannot go on with.

    Args:
        changed: what differs from the checkpoint.
        resume: one of `RESUME`.
        checkpoint: named in the message.

    Raises:
        ValueError: names each setting with both values, the reason, and what to do.
    """
    kinds = {"all": (Meaning.REFUSED, Meaning.NEW_DATA), "data": (Meaning.REFUSED,), "weights": ()}[resume]
    refused = [change for change in changed if change.setting.meaning in kinds]
    if resume == "weights":
        refused = [change for change in changed if change.name.startswith(_OF_ADAPTERS)]
        refused = [change for change in refused if change.setting.meaning is Meaning.REFUSED]
    if not refused:
        return
    lines = [f"  {change}: {change.setting.reason}" for change in refused]
    if resume == "weights":
        way = "Give these settings their old values, or start from the exported model or LoRAConfig(adapter=…/model)."
    else:
        ways = ["give these settings their old values"]
        if any(change.setting.meaning is Meaning.NEW_DATA for change in refused):
            ways.append("keep the optimizer and begin with this data: fit(resume='data'), --resume data")
        ways.append(_new_run(refused))
        way = "Either " + "; or ".join(ways) + "."
    raise ValueError(f"{checkpoint} cannot go on with what has changed:\n" + "\n".join(lines) + f"\n{way}")


def _new_run(refused: Iterable[Change]) -> str:
    """How to begin a new run with what a checkpoint has, as far as its weights fit."""
    names = [change.name for change in refused]
    if any(name.startswith(_OF_ADAPTERS) for name in names):
        return "start a new run from the exported model (amt export) or LoRAConfig(adapter=…/model)"
    fit = ", which must have the shapes of the model" if any(n.startswith("model.config.") for n in names) else ""
    return f"start a new run from the checkpoint's weights{fit}: fit(resume='weights'), --resume weights"


def _text(value: Any) -> str:
    """A value of a setting as text: numbers short, and all on one line."""
    return re.sub(r"\s+", " ", f"{value:g}" if isinstance(value, float) else str(value))


def _cut(text: str, start: int) -> str:
    """At most `SHOWN` characters of a text, from `start` on."""
    text = f"…{text[start:]}" if start else text
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
