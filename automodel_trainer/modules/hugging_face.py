"""HuggingFaceModule: the base of every objective that trains a Hugging Face model."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, is_dataclass
from functools import cached_property
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from automodel_trainer._lightning import call_hook
from automodel_trainer.checkpoint.state import TOKENIZER_KEY
from automodel_trainer.data.base import MicroBatchDataModule
from automodel_trainer.data.chat import ChatDataModule
from automodel_trainer.data.sizes import check_micro_batch
from automodel_trainer.models.auto_classes import CLASSIFIERS
from automodel_trainer.models.kernels import KernelsConfig
from automodel_trainer.models.limits import is_rotary, position_limit, vocabulary_size
from automodel_trainer.models.lora import LoRAConfig
from automodel_trainer.modules.balance import BalanceConfig
from automodel_trainer.modules.documents import documents_of
from automodel_trainer.modules.evaluation import EvaluatedModule, as_list
from automodel_trainer.modules.isolation import packs
from automodel_trainer.modules.metrics import FiniteGuard, LossWindow
from automodel_trainer.modules.optim import (
    OptimizerConfig,
    SchedulerConfig,
    build_optimizer,
    build_scheduler,
    check_clip,
    check_lr,
    parameters_of,
)
from automodel_trainer.modules.step_hooks import StepHooks
from automodel_trainer.nn.configs import as_config
from automodel_trainer.nn.schedule import follow_new_groups, follow_set_rates, rescale
from automodel_trainer.strategies import MeshStrategy
from automodel_trainer.strategies.base.objective import MicroBatch

_WINDOW_KEY = "loss_window"
_NOTHING = nullcontext()


class HuggingFaceModule(EvaluatedModule):
    """Builds a Hugging Face model, trains, evaluates and saves it. A subclass defines what is learned.

    A subclass sets `auto_class` and implements `loss`. The rest of the contract (`Objective`) has defaults.

    Optimization is manual: a batch is the list of micro-batches of one optimizer step, and the strategy runs them. The
    loss is summed over the targets of the *global* batch and divided by their number. So it does not depend on
    accumulation, the number of ranks or ragged batches. State-dict keys are the Hugging Face keys.

    Args:
        model: a folder or Hub id, or a `PreTrainedModel` (real, or on meta with its path in `name_or_path`).
            Of a `PeftModel` with a LoRA adapter that adapter is trained; the object has its values when `fit` ends.
        tokenizer: a tokenizer or its path; by default the model's own.
        lora: low-rank adapters to train on the frozen model; None trains the whole model.
        lr: the peak learning rate.
        optimizer: configuration, class path, or a callable that takes parameter groups.
        scheduler: configuration or name of the schedule.
        gradient_clip_val: largest global gradient norm; 0 measures it without clipping. `Trainer(gradient_clip_val=)`
            takes precedence.
        neftune_alpha: strength of NEFTune noise (5 in the paper); 0 is off.
        kernels: the kernels to compute with; by default the hardware decides.
        balance: what keeps the load of a mixture's experts even; by default what the model's config says.
        trust_remote_code: run code that comes with the checkpoint.
        revision: branch, tag or commit of a Hub repository.
        config_overrides: attributes of the model's config to change.

    Attributes:
        data_class: the data module of data that are given to `fit` as a path or rows.

    `lora`, `optimizer`, `scheduler`, `kernels` and `balance` may be dicts of the options of their classes, as in YAML.
    Raises:
        ValueError: as `BuiltModule`.
        allow_unused_weights: train a part of what the checkpoint holds (the text model without its vision tower, say).
            The rest is missing in what is saved.
    """

    data_class: ClassVar[type[MicroBatchDataModule]] = ChatDataModule

    def __init__(
        self,
        model: str | os.PathLike[str] | PreTrainedModel,
        *,
        tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase | None = None,
        lora: LoRAConfig | dict[str, Any] | None = None,
        lr: float = 2e-5,
        optimizer: OptimizerConfig | dict[str, Any] | str | Callable[..., Optimizer] = OptimizerConfig(),  # noqa: B008
        scheduler: SchedulerConfig | dict[str, Any] | str = SchedulerConfig(),  # noqa: B008
        gradient_clip_val: float = 1.0,
        neftune_alpha: float = 0.0,
        kernels: KernelsConfig | dict[str, Any] = KernelsConfig(),  # noqa: B008
        balance: BalanceConfig | dict[str, Any] = BalanceConfig(),  # noqa: B008
        trust_remote_code: bool = False,
        revision: str | None = None,
        config_overrides: dict[str, Any] | None = None,
        allow_unused_weights: bool = False,
    ) -> None:
        lora = None if lora is None else as_config(LoRAConfig, lora, "lora")
        kernels = as_config(KernelsConfig, kernels, "kernels")
        balance = as_config(BalanceConfig, balance, "balance")
        if isinstance(optimizer, Mapping):
            optimizer = as_config(OptimizerConfig, optimizer, "optimizer")
        if isinstance(scheduler, Mapping):
            scheduler = as_config(SchedulerConfig, scheduler, "scheduler")
        super().__init__(
            model,
            tokenizer=tokenizer,
            lora=lora,
            neftune_alpha=neftune_alpha,
            kernels=kernels,
            balance=balance,
            trust_remote_code=trust_remote_code,
            revision=revision,
            config_overrides=config_overrides,
            allow_unused_weights=allow_unused_weights,
        )
        self.automatic_optimization = False
        check_lr(lr)
        check_clip(gradient_clip_val)
        self.lr = lr
        self._groups = 0
        self._hooks = StepHooks(self)
        self.optimizer_config = optimizer
        self.scheduler_config = scheduler
        self.gradient_clip_val = gradient_clip_val
        self.metrics = self.build_metrics()
        self._window = LossWindow()
        self._guard: FiniteGuard | None = None
        self._grad_norm: Tensor | None = None
        self._lr: float | Tensor = lr
        self.save_hyperparameters(
            {
                "model": model if isinstance(model, (str, os.PathLike)) else model.name_or_path,
                "lora": lora and asdict(lora),
                "lr": lr,
                "optimizer": _plain(optimizer),
                "scheduler": _plain(scheduler),
                "gradient_clip_val": gradient_clip_val,
                "neftune_alpha": neftune_alpha,
                "kernels": asdict(kernels),
                "balance": asdict(balance),
            }
        )

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.optimizer_config, self.model, self.lr, self.lr_of())
        scheduler = build_scheduler(self.scheduler_config, optimizer, _planned_steps(self.trainer))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_of(self) -> Callable[[str], float] | None:
        """The peak learning rate of a parameter, by its name; None: `lr` for all."""
        return None

    # --- training -------------------------------------------------------------------------------------------------

    def check_batch(self, batch: Any) -> None:
        """Compare ids, labels and positions with the model's sizes; see `Objective.check_batch`.

        Data modules of this project have compared theirs before the run, unless they stream.
        """
        data = getattr(self.trainer, "datamodule", None)
        if not (isinstance(data, MicroBatchDataModule) and "train" in data.rows):
            for micro_batch in as_list(batch):
                check_micro_batch(micro_batch, *self._sizes)

    @cached_property
    def _sizes(self) -> tuple[int | None, int | None, bool, int | None]:
        """The arguments of `check_micro_batch`."""
        config = self.model.config
        vocabulary = vocabulary_size(config, self.model)
        of_classifier = config.num_labels if self.auto_class in CLASSIFIERS else None
        classes = vocabulary if self.labels_are_tokens else of_classifier
        return vocabulary, position_limit(config), is_rotary(config), classes

    def training_step(self, batch: Sequence[MicroBatch] | MicroBatch, batch_idx: int) -> dict[str, Tensor] | None:
        """One optimizer step: forward and backward of every micro-batch, clip, optimizer, schedule. Collective.

        Returns:
            `loss`, the mean over the supervised tokens of the global batch (0-dim, detached), if a callback of the
            user's, or `training_step` or `on_train_batch_end` of a subclass, may look at it; else None.
        """
        micro_batches = as_list(batch)
        self.check_rows(micro_batches)
        trainer: Any = self.trainer
        strategy = self.strategy
        optimizer: Any = self.optimizers()
        assert not isinstance(optimizer, list)
        if vars(optimizer.optimizer).setdefault("planned_lr", self.lr) is not self.lr:
            self._follow_lr(trainer, optimizer.optimizer)
        taken = strategy.take_gradients(self, micro_batches)
        if taken is None:
            return None
        loss_sum, tokens = taken
        hooks = self._hooks(trainer.callbacks)
        self.after_backward(micro_batches)
        if "on_after_backward" in hooks:
            call_hook(trainer, "on_after_backward")
        self._grad_norm = self._clip(trainer, optimizer, hooks)
        lr = optimizer.param_groups[0]["lr"]
        self._lr = lr.clone() if isinstance(lr, Tensor) else lr  # the scheduler overwrites a tensor in place
        self._update(trainer, optimizer, batch_idx, hooks)
        self._observe(trainer, loss_sum, tokens, micro_batches)
        if "on_train_batch_end" not in hooks:
            return None
        return {"loss": strategy.sum_over_tokens(loss_sum.clone()) / tokens}

    def _follow_lr(self, trainer: Any, optimizer: Any) -> None:
        """Let schedules follow `lr` if it was set since the first step, as LearningRateFinder does.

        Raises:
            ValueError: it was 0.
        """
        before, optimizer.planned_lr = float(optimizer.planned_lr), self.lr
        if before == float(self.lr):
            return
        if not before:
            raise ValueError(f"lr was 0, and a schedule of zeros cannot go on from lr={float(self.lr)}. Give lr > 0.")
        for config in trainer.lr_scheduler_configs:
            rescale(config.scheduler, float(self.lr) / before)

    def _clip(self, trainer: Any, optimizer: Any, hooks: frozenset[str]) -> Tensor:
        """Clip gradients; return their global norm before, 0-dim."""
        value = self._clip_value(trainer)
        if "configure_gradient_clipping" not in hooks:
            return self.strategy.clip_grad_norm_(parameters_of(optimizer), value)
        norm = self.strategy.clip_grad_norm_(parameters_of(optimizer), None)
        self.configure_gradient_clipping(optimizer, value, GradClipAlgorithmType.NORM)
        return norm

    def _update(self, trainer: Any, optimizer: Any, batch_idx: int, hooks: frozenset[str]) -> None:
        """Step the optimizer, router biases and schedules, and drop the gradients; by a user's hooks, if any."""
        if "optimizer_step" in hooks:
            self.optimizer_step(trainer.current_epoch, batch_idx, optimizer, lambda: None)
        else:
            optimizer.step()
        if self._balance is not None:
            self._balance.move_biases(self.strategy)
        new_groups = len(optimizer.param_groups) != self._groups  # a callback has added some
        self._groups = len(optimizer.param_groups)
        for config in trainer.lr_scheduler_configs:
            if new_groups:
                follow_new_groups(config.scheduler)
            follow_set_rates(config.scheduler)
            if not self.moves(config):
                continue
            if "lr_scheduler_step" in hooks:
                self.lr_scheduler_step(config.scheduler, None)
            else:
                config.scheduler.step()
        if "on_before_zero_grad" in hooks:
            call_hook(trainer, "on_before_zero_grad", optimizer)
        if "optimizer_zero_grad" in hooks:
            self.optimizer_zero_grad(trainer.current_epoch, batch_idx, optimizer)
        else:
            optimizer.zero_grad()

    @staticmethod
    def moves(config: LRSchedulerConfig) -> bool:
        """Whether each optimizer step moves this schedule. Others move by the epoch, or on a metric, in the loop."""
        return config.interval == "step" and config.frequency == 1 and not config.reduce_on_plateau

    def clip_gradients(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the global norm of all gradients, on every layout. For `configure_gradient_clipping` of a subclass.

        Raises:
            ValueError: another algorithm is asked for.
        """
        if gradient_clip_algorithm not in (None, "norm", GradClipAlgorithmType.NORM):
            raise ValueError(
                f"gradient_clip_algorithm={gradient_clip_algorithm!r} is not computed here. Allowed: norm."
            )
        self.strategy.clip_grad_norm_(parameters_of(optimizer), gradient_clip_val)

    def in_step(
        self, strategy: MeshStrategy, micro_batches: Sequence[MicroBatch], num_tokens: Tensor
    ) -> AbstractContextManager[None]:
        if self._balance is None:
            return _NOTHING
        return self._balance.step(strategy, self, micro_batches, num_tokens)

    def token_marks(self, micro_batch: MicroBatch) -> Tensor | None:
        if self._balance is None:
            return None
        marks = documents_of(micro_batch).marks
        return marks.view(1, -1) if self.gives_document_lengths and packs(micro_batch) else marks

    def side_loss(self, marks: Tensor | None) -> Tensor | None:
        return None if self._balance is None or marks is None else self._balance.side_loss(marks)

    def after_backward(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Look at the gradients of a step before they are clipped. The default does nothing."""

    def _clip_value(self, trainer: pl.Trainer) -> float:
        asked = getattr(trainer, "requested_gradient_clip_val", None)
        return self.gradient_clip_val if asked is None else float(asked)

    def _observe(self, trainer: Any, loss_sum: Tensor, tokens: Tensor, micro_batches: Sequence[MicroBatch]) -> None:
        assert self._grad_norm is not None
        every = trainer.log_every_n_steps
        if self._guard is None:
            self._guard = FiniteGuard(keep=max(every, 1))
        ids = [i for micro_batch in micro_batches for i in micro_batch.get("sample_ids", [])]
        step = trainer.global_step
        self._window.add(loss_sum, tokens)
        self._guard.add(step, loss_sum, self._grad_norm, ids)
        log_step = every > 0 and step % every == 0
        if log_step or self.device.type == "cpu":  # on a GPU the check waits for the device; on a CPU it is free
            self.check_finite()
        if log_step:
            self._log_window()

    def _log_window(self) -> None:
        loss = self._loss_of(*self._window.pop())
        self.log_dict({"train_loss": loss, "grad_norm": self._grad_norm, "lr": self._lr})  # type: ignore[dict-item]

    def on_train_epoch_end(self) -> None:
        """Log the loss since the last log step, for callbacks that look at `train_loss` after an epoch. Collective."""
        if self._window and self.trainer.log_every_n_steps:  # type: ignore[attr-defined]
            loss_sum, tokens = self._window.sums()
            self.log("train_loss", self._loss_of(loss_sum.clone(), tokens), logger=False)

    def _loss_of(self, loss_sum: Tensor, tokens: Tensor) -> Tensor:
        return (self.strategy.sum_over_tokens(loss_sum) / tokens).float()

    def check_finite(self) -> None:
        """Raise if any step so far had a loss or gradient norm that was not finite. Collective; waits for the device.

        Raises:
            ValueError: names the step and its sample ids. Checkpoints written before that step are intact.
        """
        first = self._guard.first_bad() if self._guard is not None else None
        if first is None:
            return
        assert self._guard is not None
        first = first.clone()  # the reduction writes in place, and the guard keeps its own
        if self.strategy.world_size > 1:
            dist.all_reduce(first, op=dist.ReduceOp.MIN)
        if first.isinf():
            return
        step = int(first.item())
        ids = self._guard.samples_of(step)
        if self.strategy.dp_size > 1:
            gathered: list[Any] = [None] * self.strategy.world_size
            dist.all_gather_object(gathered, ids)
            ids = sorted({i for some in gathered if some for i in some})
        raise ValueError(
            f"The loss or the gradient of step {step} was not finite (NaN or infinity). Samples of that step: {ids}. "
            "Training stops here and writes no more checkpoints; the last one is from an earlier step. Look at these "
            "samples, lower lr, or use precision='fp32' or 'bf16'."
        )

    def on_train_end(self) -> None:
        self.check_finite()

    # --- state ----------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the sums that the next log step averages, so that a resumed run logs the same numbers. Collective."""
        if self.brings_tokenizer:  # else it is untouched in the model's folder
            checkpoint[TOKENIZER_KEY] = self.saved_tokenizer
        if self._window:
            loss_sum, tokens = self._window.sums()
            whole = self.strategy.sum_over_tokens(loss_sum.clone())
            checkpoint[_WINDOW_KEY] = {"loss_sum": float(whole), "tokens": int(tokens)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._window = LossWindow()
        if _WINDOW_KEY in checkpoint:
            saved, device = checkpoint[_WINDOW_KEY], self.strategy.root_device
            # The checkpoint holds the sum over all ranks. The run may resume on another number of ranks, so each rank
            # takes an equal share: the next log step adds them up again.
            ranks = self.strategy.sum_over_tokens(torch.ones((), dtype=torch.float64, device=device))
            share = torch.tensor(saved["loss_sum"], dtype=torch.float64, device=device) / ranks
            self._window.add(share, torch.tensor(saved["tokens"], device=device))


def _plain(config: Any) -> Any:
    return asdict(config) if is_dataclass(config) and not isinstance(config, type) else str(config)


def _planned_steps(trainer: pl.Trainer) -> int | None:
    """The optimizer steps of a run, or None if they are not known. Lightning's own Trainer counts one per batch."""
    ours = getattr(trainer, "planned_steps", None)
    if ours is not None:
        steps: int | None = ours()
        return steps
    if trainer.max_steps > 0:
        return trainer.max_steps
    counted = trainer.estimated_stepping_batches
    return int(counted) if math.isfinite(counted) else None
