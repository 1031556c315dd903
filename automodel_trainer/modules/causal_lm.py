"""CausalLMModule: next-token training of a Hugging Face language model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from automodel_trainer.models._transformers import packing_without_sync
from automodel_trainer.models.auto import AutoModelForCausalLM, add_adapters, fill_from_folder, load_config
from automodel_trainer.models.files import resolve_folder
from automodel_trainer.models.kernels import KernelsConfig, apply_kernels, check_compiled
from automodel_trainer.models.lora import LoRAConfig, choose_lora_kernel, finish_lora, lora_of
from automodel_trainer.modules.loss import next_token_targets, summed_loss, supervised_tokens, token_losses
from automodel_trainer.modules.metrics import FiniteGuard, LossWindow, TokenMetrics
from automodel_trainer.modules.neftune import add_neftune
from automodel_trainer.modules.optim import (
    OptimizerConfig,
    SchedulerConfig,
    build_optimizer,
    build_scheduler,
    parameters_of,
)
from automodel_trainer.strategies import MeshStrategy, Objective
from automodel_trainer.strategies.deferred_logits import defer_logits
from automodel_trainer.strategies.precision import hold_in

MicroBatch = dict[str, Any]
_WINDOW_KEY = "loss_window"
# What a model's forward is given of a micro-batch. The rest (labels, sample ids) is ours.
_MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


class CausalLMModule(Objective, pl.LightningModule):
    """Trains a causal language model on next-token prediction.

    Optimization is manual: a batch is the list of micro-batches of one optimizer step, which the strategy runs. The
    loss is the sum of token losses over the supervised tokens of the *global* batch, so it does not depend on
    accumulation, on the number of ranks or on ragged batches. State-dict keys are the Hugging Face keys.

    Args:
        model: a folder or Hub id, or a `PreTrainedModel` (real, or on meta with its path in `name_or_path`).
        tokenizer: a tokenizer or its path; by default the model's own.
        lora: low-rank adapters to train on the frozen model; None trains the whole model.
        lr: the highest learning rate.
        optimizer: configuration, class path, or a callable that takes parameter groups.
        scheduler: configuration or name of the schedule.
        gradient_clip_val: largest global gradient norm; 0 only measures it. `Trainer(gradient_clip_val=)` goes first.
        neftune_alpha: strength of NEFTune noise (5 in the paper); 0 is off.
        kernels: what the model computes with; by default chosen by the hardware.
        trust_remote_code: run code that comes with the checkpoint.
        revision: branch, tag or commit of a Hub repository.
        config_overrides: attributes of the model's config to change.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | PreTrainedModel,
        *,
        tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase | None = None,
        lora: LoRAConfig | None = None,
        lr: float = 2e-5,
        optimizer: OptimizerConfig | str | Callable[..., Optimizer] = OptimizerConfig(),  # noqa: B008
        scheduler: SchedulerConfig | str = SchedulerConfig(),  # noqa: B008
        gradient_clip_val: float = 1.0,
        neftune_alpha: float = 0.0,
        kernels: KernelsConfig = KernelsConfig(),  # noqa: B008
        trust_remote_code: bool = False,
        revision: str | None = None,
        config_overrides: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.lora = lora
        self.lr = lr
        self.optimizer_config = optimizer
        self.scheduler_config = scheduler
        self.gradient_clip_val = gradient_clip_val
        self.neftune_alpha = neftune_alpha
        self.kernels = kernels
        self.trust_remote_code = trust_remote_code
        self.revision = revision
        self.config_overrides = config_overrides or {}
        if isinstance(model, PreTrainedModel) and (revision is not None or config_overrides):
            raise ValueError(
                "revision and config_overrides are for a model that is still to be loaded, and this one is an object. "
                "Change its config before you make it, or give its folder or Hub id."
            )
        self._reference = (model,)  # in a tuple: the model to train is `self.model`, and no second submodule
        self._tokenizer = tokenizer
        self.model: Any = None
        self.metrics = TokenMetrics()
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
            }
        )

    # --- building -------------------------------------------------------------------------------------------------

    @cached_property
    def source(self) -> Path | None:
        """The folder that weights and tokenizer come from; None for a model that was made in memory."""
        (reference,) = self._reference
        if isinstance(reference, (str, os.PathLike)):
            return resolve_folder(reference, self.revision)
        name = reference.name_or_path
        return Path(name) if name and os.path.isdir(name) else None

    @property
    def model_config(self) -> PreTrainedConfig:
        """The model's config, also before the model is built."""
        (reference,) = self._reference
        if isinstance(reference, PreTrainedModel):
            return reference.config
        assert self.source is not None
        return load_config(self.source, self.trust_remote_code, self.config_overrides)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded when it is first asked for.

        Raises:
            ValueError: the model is an object without a folder, and no tokenizer was given.
        """
        if isinstance(self._tokenizer, PreTrainedTokenizerBase):
            return self._tokenizer
        folder = resolve_folder(self._tokenizer) if self._tokenizer is not None else self.source
        if folder is None:
            raise ValueError(
                "This model was made in memory and names no folder with a tokenizer: give CausalLMModule(tokenizer=…)."
            )
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=self.trust_remote_code)

    @property
    def tokenizer_or_none(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer if there is one to be had."""
        return self.tokenizer if self._tokenizer is not None or self.source is not None else None

    def configure_model(self) -> None:
        """Build the model on the strategy's mesh. Called by the Trainer once the processes have started."""
        if self.model is not None:
            return
        check_compiled(self.kernels, self.strategy.compiles)
        # Lightning calls this with the GPU as the default device; the builder says for itself what lies where.
        with torch.device("cpu"):
            self.model = self._build()
        packing_without_sync(self.model)
        if self.kernels.on(self.strategy.root_device).loss != "whole":
            defer_logits(self.model)
        if self.neftune_alpha:
            add_neftune(self.model.get_input_embeddings(), self.neftune_alpha)
        self.model.train()

    def _build(self) -> PreTrainedModel:
        (reference,) = self._reference
        if isinstance(reference, PreTrainedModel):
            return self._adopt(reference)
        return AutoModelForCausalLM.from_pretrained(
            self.source or reference,
            self.strategy,
            trust_remote_code=self.trust_remote_code,
            lora=self.lora,
            kernels=self.kernels,
            **self.config_overrides,
        )

    def _adopt(self, model: PreTrainedModel) -> PreTrainedModel:
        dtype = self.strategy.dtypes.parameters
        if lora_of(model) is not None:  # built with adapters, perhaps trained ones, and in the dtypes it wants
            if self.lora is not None:
                raise ValueError("The model has adapters already: leave out CausalLMModule(lora=…) to go on with them.")
            if self.kernels.fp8 is not None:
                raise ValueError(
                    f"fp8={self.kernels.fp8!r} is put in before adapters, and this model has some already. Build it "
                    "with AutoModelForCausalLM.from_pretrained(lora=…, kernels=KernelsConfig(fp8=…)) instead."
                )
            apply_kernels(model, self.kernels, self.strategy.root_device)
            self.strategy.parallelize(model)
            choose_lora_kernel(model)
            return model
        # Optimizer state follows the parameters: a bf16 checkpoint is trained from fp32 master weights.
        hold_in(model, dtype)
        apply_kernels(model, self.kernels, self.strategy.root_device)
        if self.lora is not None:
            add_adapters(model, self.lora, self.strategy)
        if not any(parameter.is_meta for parameter in model.parameters()):
            self.strategy.parallelize(model)
            finish_lora(model)
            return model
        if self.source is None:
            raise ValueError(
                f"The model is on meta, and its name_or_path {model.name_or_path!r} is no folder to read weights from."
            )
        fill_from_folder(model, self.source, self.strategy)
        return model

    @property
    def strategy(self) -> MeshStrategy:
        """The Trainer's strategy.

        Raises:
            ValueError: it is not one that can run this module.
        """
        strategy = self.trainer.strategy
        if not isinstance(strategy, MeshStrategy):
            raise ValueError(
                f"{type(self).__name__} runs on automodel_trainer's strategies, not on {type(strategy).__name__}. "
                "Use automodel_trainer.Trainer(strategy='auto' | 'ddp' | 'fsdp2' | 'hsdp' | …)."
            )
        return strategy

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.optimizer_config, self.model, self.lr)
        planned = getattr(self.trainer, "planned_steps", lambda: None)()
        scheduler = build_scheduler(self.scheduler_config, optimizer, planned)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # --- the objective --------------------------------------------------------------------------------------------

    def forward(self, **inputs: Any) -> Any:
        """The model's own forward."""
        return self.model(**inputs)

    def split(self, micro_batch: MicroBatch) -> tuple[dict[str, Any], Tensor]:
        inputs = {key: micro_batch[key] for key in _MODEL_INPUTS if micro_batch.get(key) is not None}
        if micro_batch.get("packed") is False:
            del inputs["position_ids"]  # 0, 1, 2, …: without them attention needs no mask, only its causal kernel
        # A cache is of no use in training, and with one transformers ignores the document boundaries of packed rows.
        inputs["use_cache"] = False
        return inputs, next_token_targets(micro_batch["labels"])

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        loss = summed_loss(outputs.logits, targets, self.kernels.on(targets.device).loss)
        balance = getattr(outputs, "aux_loss", None)  # mixture-of-experts models that were asked for it
        if balance is not None:
            loss = loss + self.model.config.router_aux_loss_coef * balance * (targets != -100).sum()
        return loss

    # --- training -------------------------------------------------------------------------------------------------

    def training_step(self, batch: Sequence[MicroBatch] | MicroBatch, batch_idx: int) -> None:
        micro_batches = _as_list(batch)
        strategy = self.strategy
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        assert not isinstance(optimizer, list)
        tokens = strategy.sum_over_rows(
            torch.stack([supervised_tokens(micro_batch["labels"]) for micro_batch in micro_batches]).sum()
        )
        loss_sum = strategy.forward_backward(self, micro_batches, tokens)
        self._grad_norm = strategy.clip_grad_norm_(parameters_of(optimizer), self._clip_value)
        lr = optimizer.param_groups[0]["lr"]
        self._lr = lr.clone() if isinstance(lr, Tensor) else lr  # the scheduler fills a tensor in place
        optimizer.step()
        scheduler.step()  # type: ignore[union-attr, call-arg]
        optimizer.zero_grad()
        self._observe(loss_sum, tokens, micro_batches)

    @property
    def _clip_value(self) -> float:
        asked = getattr(self.trainer, "requested_gradient_clip_val", None)
        return self.gradient_clip_val if asked is None else float(asked)

    def _observe(self, loss_sum: Tensor, tokens: Tensor, micro_batches: Sequence[MicroBatch]) -> None:
        assert self._grad_norm is not None
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self._guard is None:
            self._guard = FiniteGuard(keep=max(every, 1))
        ids = [i for micro_batch in micro_batches for i in micro_batch.get("sample_ids", [])]
        step = self.trainer.global_step
        self._window.add(loss_sum, tokens)
        self._guard.add(step, loss_sum, self._grad_norm, ids)
        log_step = every > 0 and step % every == 0
        if log_step or self.device.type == "cpu":  # on CPU looking costs nothing
            self.check_finite()
        if log_step:
            self._log_window()

    def _log_window(self) -> None:
        loss_sum, tokens = self._window.pop()
        loss = self.strategy.sum_over_tokens(loss_sum) / tokens
        self.log_dict({"train_loss": loss.float(), "grad_norm": self._grad_norm, "lr": self._lr})  # type: ignore[dict-item]

    def check_finite(self) -> None:
        """Stop if any step so far had a loss or a gradient that was not finite. Collective; waits for the device.

        Raises:
            ValueError: names the step and its sample ids. Checkpoints written before that step are intact.
        """
        first = self._guard.first_bad() if self._guard is not None else None
        if first is None:
            return
        assert self._guard is not None
        first = first.clone()
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
            "Training stops here and writes no further checkpoint; the last one is from before. Look at these samples, "
            "lower lr, or use precision='fp32' or 'bf16'."
        )

    def on_train_end(self) -> None:
        self.check_finite()

    # --- evaluation -----------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._start_evaluation()

    def on_test_epoch_start(self) -> None:
        self._start_evaluation()

    def _start_evaluation(self) -> None:
        self.metrics.to(self.strategy.root_device)
        self.metrics.reset()

    def validation_step(self, batch: Sequence[MicroBatch] | MicroBatch, batch_idx: int) -> None:
        self._evaluate(batch)

    def test_step(self, batch: Sequence[MicroBatch] | MicroBatch, batch_idx: int) -> None:
        self._evaluate(batch)

    def _evaluate(self, batch: Sequence[MicroBatch] | MicroBatch) -> None:
        for micro_batch in _as_list(batch):
            with self.strategy.split_sequence(*self.split(micro_batch)) as (inputs, targets):
                logits = self.strategy.forward(self.model, inputs).logits
            if logits is not None:  # they may be on one rank of a pipeline only: it counts for all
                self.metrics.update(logits, targets)

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def _log_evaluation(self, prefix: str) -> None:
        values = self.metrics.compute()
        self.metrics.reset()
        # equal on all ranks already; `sync_dist` only says so to Lightning
        self.log_dict({f"{prefix}_{name}": value.float() for name, value in values.items()}, sync_dist=True)

    def predict_step(self, batch: Sequence[MicroBatch] | MicroBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Score the data: per micro-batch the log-probability of every supervised token, fp32 `[b, s]` aligned with
        `input_ids` (0 elsewhere), with `labels` and `sample_ids`."""
        scored = []
        for micro_batch in _as_list(batch):
            with self.strategy.split_sequence(*self.split(micro_batch)) as (inputs, targets):
                losses = self._losses(inputs, targets)
            losses = self.strategy.gather_sequence(losses, micro_batch["labels"].shape[1])
            named: dict[str, Any] = {key: micro_batch[key] for key in ("labels", "sample_ids") if key in micro_batch}
            scored.append({"log_probs": torch.nn.functional.pad(-losses[:, :-1], (1, 0)), **named})
        return scored

    def _losses(self, inputs: dict[str, Any], targets: Tensor) -> Tensor:
        """Per token, fp32 `[b, s]`, on every rank."""
        logits = self.strategy.forward(self.model, inputs).logits
        return self.strategy.from_logits(
            lambda: token_losses(logits, targets).view_as(targets), targets.shape, torch.float32
        )

    @torch.no_grad()
    def generate(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        """`transformers`' generate on the laid-out model. Collective: every rank calls it with the same arguments."""
        return self.model.generate(input_ids, **kwargs)

    # --- state ----------------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The model's: keys are the Hugging Face keys."""
        return self.model.state_dict(*args, **kwargs) if self.model is not None else {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the next log step will average over, so that a resumed run logs the same numbers. Collective."""
        if self._window:
            loss_sum, tokens = self._window.sums()
            whole = self.strategy.sum_over_tokens(loss_sum.clone())
            checkpoint[_WINDOW_KEY] = {"loss_sum": float(whole), "tokens": int(tokens)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._window = LossWindow()
        if _WINDOW_KEY in checkpoint:
            saved, device = checkpoint[_WINDOW_KEY], self.strategy.root_device
            ranks = self.strategy.sum_over_tokens(torch.ones((), dtype=torch.float64, device=device))
            share = torch.tensor(saved["loss_sum"], dtype=torch.float64, device=device) / ranks
            self._window.add(share, torch.tensor(saved["tokens"], device=device))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        return self.model.load_state_dict(state_dict, strict=strict, assign=assign)


def _as_list(batch: Sequence[MicroBatch] | MicroBatch) -> Sequence[MicroBatch]:
    """A loader of plain batches (a user's own DataLoader) yields one micro-batch per step."""
    return [dict(batch)] if isinstance(batch, Mapping) else batch


def _plain(config: Any) -> Any:
    return asdict(config) if is_dataclass(config) and not isinstance(config, type) else str(config)
