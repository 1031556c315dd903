"""Trainer: a Lightning Trainer that takes Hugging Face models and data as they are."""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.rank_zero import rank_zero_info

import automodel_trainer.load_from_checkpoint  # noqa: F401  Lightning's loader learns of checkpoint folders
from automodel_trainer._lightning import (
    assigned_checkpoint,
    defaults_from_env_vars,
    drop_advertisement,
    end_ranks_on_sigterm,
    install_checkpoint_connector,
    install_quiet_epoch_loop,
    keep_quiet_about_trees,
    uncompiled,
)
from automodel_trainer.accelerators import resolve_devices
from automodel_trainer.callbacks._loggers import upload_folders
from automodel_trainer.callbacks.defaults import default_callbacks
from automodel_trainer.callbacks.lightning_callbacks import support_callbacks
from automodel_trainer.callbacks.preemption import preemption_of
from automodel_trainer.callbacks.requeue import asks_for_requeue
from automodel_trainer.callbacks.trainer_html import trainer_html
from automodel_trainer.checkpoint.remote import is_remote, local_root
from automodel_trainer.cluster.environment import with_environment
from automodel_trainer.cluster.fit import Workers, fit_on
from automodel_trainer.connect import Model, accumulating, connect, without
from automodel_trainer.data.adapt import as_loaders, len_or_none, one_of
from automodel_trainer.data.base import MicroBatchDataModule
from automodel_trainer.data.preview import Preview
from automodel_trainer.distributed.launch import launched_sizes
from automodel_trainer.distributed.ray_worker import ray_context
from automodel_trainer.limits import DEFAULT_EPOCHS, check_step, upper_limit
from automodel_trainer.modules import HuggingFaceModule
from automodel_trainer.resume import (
    check_folder,
    check_resume,
    checkpoint_path,
    requeued_checkpoint,
    saved_before_restart,
)
from automodel_trainer.saves import SavesPretrained
from automodel_trainer.strategies import MeshStrategy, Objective
from automodel_trainer.strategies.base.precision import canonical_precision
from automodel_trainer.verification.ranks import Launcher
from automodel_trainer.verification.report import Report
from automodel_trainer.verification.verify import verify

LOG_EVERY = 10


class Trainer(SavesPretrained):
    """`lightning.pytorch.Trainer` for Hugging Face models on any layout of devices.

    It takes every argument of Lightning's Trainer with the same meaning. These are new or mean more:

    Args:
        strategy: a name (`auto`, `ddp`, `fsdp2`, `hsdp`, …), a name with sizes (`"fsdp2:dp_shard=2"`), or an object.
        precision: `fp32`, `bf16` (fp32 master weights, bf16 compute), `bf16-true`, or one of Lightning's names.
        log_every_n_steps: optimizer steps between two log steps. Only log steps wait for the device.
        accumulate_grad_batches: micro-batches per optimizer step and rank, if the data module has no
            `global_batch_size`.
        max_time: save and stop before this much time has passed since `fit` began (see `Preemption`). A resumed run
            gets the full time again.
        gradient_clip_val: largest global gradient norm; None leaves it to the module (`HuggingFaceModule`: 1.0).
        enable_ledger: print after the first step what is trained, in which dtypes and on which mesh; stop on a
            surprise.
        enable_throughput: log tokens per second, MFU, memory and data wait.

    Raises:
        ValueError: an argument is unknown or not allowed; the message says what is.
    """

    @defaults_from_env_vars
    def __init__(
        self,
        *,
        accelerator: str | Accelerator = "auto",
        strategy: str | Strategy = "auto",
        devices: list[int] | str | int = "auto",
        num_nodes: int = 1,
        precision: str | int | None = None,
        logger: Logger | Iterable[Logger] | bool | None = None,
        callbacks: list[Callback] | Callback | None = None,
        fast_dev_run: int | bool = False,
        max_epochs: int | None = None,
        min_epochs: int | None = None,
        max_steps: int = -1,
        min_steps: int | None = None,
        max_time: str | timedelta | dict[str, int] | None = None,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        overfit_batches: int | float = 0.0,
        val_check_interval: int | float | str | timedelta | dict[str, int] | None = None,
        check_val_every_n_epoch: int | None = 1,
        num_sanity_val_steps: int | None = None,
        log_every_n_steps: int = LOG_EVERY,
        enable_checkpointing: bool | None = None,
        enable_progress_bar: bool | None = None,
        enable_model_summary: bool = False,
        enable_ledger: bool = True,
        enable_throughput: bool = True,
        accumulate_grad_batches: int = 1,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
        deterministic: bool | Literal["warn"] | None = None,
        benchmark: bool | None = None,
        inference_mode: bool = False,
        use_distributed_sampler: bool = True,
        profiler: Profiler | str | None = None,
        detect_anomaly: bool = False,
        barebones: bool = False,
        plugins: Any = None,
        sync_batchnorm: bool = False,
        reload_dataloaders_every_n_epochs: int = 0,
        default_root_dir: str | os.PathLike[str] | None = None,
        enable_autolog_hparams: bool = True,
        model_registry: str | None = None,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        self._fits_min_steps = min_steps is not None and max_epochs is None and max_steps == -1 and max_time is None
        max_epochs = upper_limit(max_epochs, max_steps, min_epochs, min_steps, max_time)
        devices, num_nodes = launched_sizes(devices, num_nodes)
        accelerator, strategy = resolve_devices(accelerator, strategy)
        plugins = with_environment(plugins)
        check_step(gradient_clip_val, accumulate_grad_batches)
        self.requested_gradient_clip_val = gradient_clip_val
        self.requested_accumulation = accumulate_grad_batches
        self.arguments = arguments
        self.resume: str = "all"
        self.resumed_path: str | None = None  # the checkpoint that the run goes on from, or takes its weights of
        self.evaluated_path: str | None = None  # the checkpoint whose weights were evaluated last
        self.extra_steps = 0  # beyond epochs × steps per epoch: of epochs with another batch size, or other data
        drop_advertisement()
        keep_quiet_about_trees()
        super().__init__(
            accelerator=accelerator,
            strategy=strategy,
            devices=devices,
            num_nodes=num_nodes,
            precision=canonical_precision(precision),  # type: ignore[arg-type]
            logger=logger,
            callbacks=default_callbacks(
                callbacks,
                checkpointing=enable_checkpointing is not False and not (barebones or fast_dev_run),
                progress_bar=enable_progress_bar is not False and not barebones,
                ledger=enable_ledger and not barebones,
                throughput=enable_throughput and not barebones,
                watchdog=not barebones,
                garbage_collection=not barebones,
                max_time=max_time,
                folders=isinstance(strategy, MeshStrategy),
                reports=ray_context() is not None,
                budget=isinstance(strategy, MeshStrategy) and strategy.memory is not None,
                requeues=asks_for_requeue(plugins) and not fast_dev_run,
            ),
            fast_dev_run=fast_dev_run,
            max_epochs=max_epochs,
            min_epochs=min_epochs,
            max_steps=max_steps,
            min_steps=min_steps,
            # `Preemption` has it: Lightning's timer leaves no time to save, and every step waits for rank 0.
            max_time=None,
            limit_train_batches=limit_train_batches,
            limit_val_batches=limit_val_batches,
            limit_test_batches=limit_test_batches,
            limit_predict_batches=limit_predict_batches,
            overfit_batches=overfit_batches,
            val_check_interval=val_check_interval,
            check_val_every_n_epoch=check_val_every_n_epoch,
            num_sanity_val_steps=num_sanity_val_steps,
            log_every_n_steps=None if barebones and log_every_n_steps == LOG_EVERY else log_every_n_steps,
            enable_checkpointing=enable_checkpointing,
            enable_progress_bar=enable_progress_bar,
            enable_model_summary=enable_model_summary,
            accumulate_grad_batches=accumulate_grad_batches,
            gradient_clip_val=gradient_clip_val,
            gradient_clip_algorithm=gradient_clip_algorithm,
            deterministic=deterministic,
            benchmark=benchmark,
            inference_mode=inference_mode,
            use_distributed_sampler=use_distributed_sampler,
            profiler=profiler,
            detect_anomaly=detect_anomaly,
            barebones=barebones,
            plugins=plugins,
            sync_batchnorm=sync_batchnorm,
            reload_dataloaders_every_n_epochs=reload_dataloaders_every_n_epochs,
            default_root_dir=None if default_root_dir is None else str(default_root_dir),
            enable_autolog_hparams=enable_autolog_hparams,
            model_registry=model_registry,
        )
        install_quiet_epoch_loop(self)
        end_ranks_on_sigterm(self)
        install_checkpoint_connector(self)
        if is_remote(self.default_root_dir):
            rank_zero_info(
                f"Checkpoints and Lightning's logs go to {self.default_root_dir}; the ledger, the configuration and "
                f"reports go to {local_root(self.default_root_dir)}."
            )

    # --- entry points ---------------------------------------------------------------------------------------------

    @without("data", "on", "workers")
    def fit(  # type: ignore[override]
        self,
        model: Model,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: pl.LightningDataModule | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        weights_only: bool | None = None,
        *,
        resume: Literal["all", "data", "weights"] = "all",
        data: Any = None,
        on: str | None = None,
        workers: Workers | None = None,
    ) -> Path | None:
        """Train a model on data.

        Args:
            model: a Hub id or folder, a `PreTrainedModel` (real, or on meta with its path), or a LightningModule.
            train_dataloaders: the data: a path or Hub id of a chat or instruction set (jsonl, json, parquet), a
                `Dataset` or `DatasetDict`, a list of rows or batches, a DataLoader or several (as Lightning has them),
                or a LightningDataModule.
            val_dataloaders, datamodule: as Lightning has them; `val_dataloaders` may be a list of batches.
            ckpt_path: the checkpoint to resume from: a folder, a URL, `"last"`, `"best"`, `"last-whole"` (the newest
                that is not damaged; `"last"` raises if the newest is damaged and names the file), or `"auto"` (the
                same, or none if there is none). After a restart by torchrun, the run's own last checkpoint is used;
                so it is without a `ckpt_path` in a job that Slurm has queued again (`"hpc"`).
            weights_only: as Lightning has it.
            resume: what to take from the checkpoint of `ckpt_path`. "all" goes on where it was. "data" keeps weights,
                optimizer and step, and begins with the first row and epoch of other data. "weights" starts a new run
                from its weights. Settings that differ from the checkpoint's are taken over or refused
                (docs/resume.md has the list); the ledger prints them.
            data: another name of `train_dataloaders`.
            on: run on the workers of a Ray cluster: "ray", or "ray://HOST:PORT" (docs/guides/ray.md).
            workers: how many workers, or the least and the largest number for a run that is resized.

        Returns:
            the newest checkpoint of the run, or None if it wrote none.

        Raises:
            ValueError: model, data and trainer do not fit together, or the checkpoint cannot go on so; the message
                says what to change.
        """
        data = one_of("data", data, "train_dataloaders", train_dataloaders)
        if on is not None or workers is not None:
            given = {"model": model, "train_dataloaders": data, "val_dataloaders": val_dataloaders, "resume": resume}
            given |= {"datamodule": datamodule, "ckpt_path": ckpt_path, "weights_only": weights_only}
            return fit_on(self, on, workers, given)
        module, datamodule, loader = connect(model, data, datamodule)
        if isinstance(uncompiled(module), Objective):
            # Lightning refuses both under manual optimization. The module clips, and the data module accumulates.
            self.accumulate_grad_batches, self.gradient_clip_val = 1, None
            loader = accumulating(self.requested_accumulation, datamodule, loader)
            if self.gradient_clip_algorithm == GradClipAlgorithmType.VALUE:
                raise ValueError(
                    f"gradient_clip_algorithm='value' does not work with {type(module).__name__}, which clips the "
                    "global norm. Leave it out, or clip by value in a LightningModule of your own."
                )
        else:
            self.accumulate_grad_batches = self.requested_accumulation
            self.gradient_clip_val = self.requested_gradient_clip_val
        self._training_data = datamodule or loader
        if self._fits_min_steps:
            self.fit_loop.max_epochs = self._epochs_for_min_steps()
        upload_folders(self.loggers)
        support_callbacks(self)
        super().fit(
            module,
            train_dataloaders=loader,
            val_dataloaders=as_loaders(val_dataloaders),
            datamodule=datamodule,
            ckpt_path=self._resumed_path(ckpt_path, resume),
            weights_only=weights_only,
        )
        last = getattr(self.checkpoint_callback, "last_model_path", None)
        return Path(last) if last else None

    def _resumed_path(self, ckpt_path: str | os.PathLike[str] | None, resume: str) -> str | None:
        """The checkpoint that Lightning restores; of one that only gives its weights it is not told."""
        check_resume(ckpt_path, resume)
        self.resume, self.extra_steps = "all", 0
        self.resumed_path = saved_before_restart(self, ckpt_path)
        if self.resumed_path is None:
            assigned = assigned_checkpoint(self) if ckpt_path is None else None
            self.resumed_path = checkpoint_path(self, assigned or ckpt_path) or requeued_checkpoint(self, ckpt_path)
            if self.resumed_path is not None and resume != "all":
                check_folder(self.resumed_path, resume)
                self.resume = resume
            if assigned is not None:
                return None  # Lightning has it
        return None if self.resume == "weights" else self.resumed_path

    @without("data")
    def validate(  # type: ignore[override]
        self,
        model: Model | None = None,
        dataloaders: Any = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        verbose: bool = True,
        datamodule: pl.LightningDataModule | None = None,
        weights_only: bool | None = None,
        *,
        data: Any = None,
    ) -> Any:
        """Evaluate on the validation data; arguments as in `fit`. Returns Lightning's list of metrics.

        After `fit`, without a model and a `ckpt_path`, the best checkpoint is evaluated, as Lightning does.
        """
        arguments = self._evaluation_arguments(model, data, dataloaders, datamodule, "validation", ckpt_path)
        return super().validate(**arguments, verbose=verbose, weights_only=weights_only)

    @without("data")
    def test(  # type: ignore[override]
        self,
        model: Model | None = None,
        dataloaders: Any = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        verbose: bool = True,
        datamodule: pl.LightningDataModule | None = None,
        weights_only: bool | None = None,
        *,
        data: Any = None,
    ) -> Any:
        """Evaluate on the test data; arguments as in `fit`. Returns Lightning's list of metrics.

        After `fit`, without a model and a `ckpt_path`, the best checkpoint is evaluated, as Lightning does.
        """
        arguments = self._evaluation_arguments(model, data, dataloaders, datamodule, "test", ckpt_path)
        return super().test(**arguments, verbose=verbose, weights_only=weights_only)

    @without("data")
    def predict(  # type: ignore[override]
        self,
        model: Model | None = None,
        dataloaders: Any = None,
        datamodule: pl.LightningDataModule | None = None,
        return_predictions: bool | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        weights_only: bool | None = None,
        *,
        data: Any = None,
    ) -> Any:
        """Predict on data; arguments as in `fit`.

        Returns Lightning's list of predictions. Those of a `HuggingFaceModule` come from its `predict`.
        """
        arguments = self._evaluation_arguments(model, data, dataloaders, datamodule, "predict", ckpt_path)
        return super().predict(**arguments, return_predictions=return_predictions, weights_only=weights_only)

    def verify(
        self, model: Model, data: Any, *, devices: int | None = None, full: bool = False, launch: Launcher | None = None
    ) -> Report:
        """Check that this Trainer's strategy computes the same as one device, for a model and data. Prints a table.

        A small copy of the model (same architecture, random weights) takes three optimizer steps on one device and on
        the layout. Loss, module outputs, gradients and weights are compared. Ranks are processes on this machine's CPU.

        Args:
            model, data: as in `fit`; only the first batches of the data are used.
            devices: the number of ranks; None takes as few as the layout's sizes allow.
            full: run on this machine's GPUs.
            launch: starts the ranks; None starts processes on this machine.

        Raises:
            ValueError: the layout refuses this model, the module is not a `HuggingFaceModule`, or the data has no
                labels.
        """
        module, datamodule, loader = connect(model, data, None)
        if not isinstance(module, HuggingFaceModule):
            raise ValueError(
                "verify runs an objective of this project (CausalLMModule, or another subclass of HuggingFaceModule), "
                f"not {type(module).__name__}."
            )
        report = verify(module, datamodule or loader, self.strategy, devices, full=full, launch=launch)
        report.print()
        return report

    def preview(self, model: Model, data: Any, rows: int = 1) -> Preview:
        """The first batch of a run that `fit` would begin, with what of it is trained. Nothing is trained here.

        Args:
            model, data: as in `fit`.
            rows: the number of rows to show.

        Raises:
            ValueError: the data is no text of this project's data modules, or `rows` is less than 1.
        """
        _, datamodule, _ = connect(model, data, None)
        if not isinstance(datamodule, MicroBatchDataModule):
            raise ValueError(
                f"preview cannot show {type(data).__name__}. Give it a path, a data set or rows, or a "
                "data module of automodel_trainer, for example ChatDataModule."
            )
        return datamodule.preview(rows)

    def _repr_html_(self) -> str:
        """How it would train, and what it has trained, in a notebook."""
        return trainer_html(self)

    # --- what modules and callbacks ask ---------------------------------------------------------------------------

    @property
    def micro_batches_per_step(self) -> int:
        """Micro-batches per optimizer step and rank, for data without a `global_batch_size`."""
        return self.requested_accumulation

    def planned_steps(self) -> int | None:
        """The optimizer steps of this run, or None if they are not known before it starts."""
        steps = self._steps_per_epoch()
        epochs = self.max_epochs
        by_epochs = None if steps is None or epochs is None or epochs < 0 else steps * epochs + self.extra_steps
        by_steps = None if self.max_steps in (-1, None) else self.max_steps
        return min((n for n in (by_epochs, by_steps) if n is not None), default=None)

    def _epochs_for_min_steps(self) -> int:
        """As many epochs as `min_steps` needs, where nothing limits the run from above."""
        steps = self._steps_per_epoch()
        if steps is None:
            raise ValueError(
                f"min_steps={self.min_steps} needs an upper limit too, because it is not known here how many steps an "
                f"epoch has: give max_steps, max_epochs (-1: none) or max_time. The default of {DEFAULT_EPOCHS} epochs "
                "may have fewer steps."
            )
        return max(DEFAULT_EPOCHS, self.min_epochs or 0, -(-(self.min_steps or 0) // steps))

    def _steps_per_epoch(self) -> int | None:
        data = getattr(self, "_training_data", None)
        steps = data.steps_per_epoch if isinstance(data, MicroBatchDataModule) else len_or_none(data)
        if steps is None:
            return None
        limit = self.limit_train_batches
        limited = min(steps, limit) if isinstance(limit, int) else int(steps * limit)
        return max(1, limited // self.accumulate_grad_batches)

    @property
    def stopped_by(self) -> str | None:
        """The signal that stopped the last run early, or "max_time"; None if it ran to its end."""
        preemption = preemption_of(self)
        return None if preemption is None else preemption.stopped_by

    @property
    def exit_code(self) -> int:
        """The exit code for this process: 0, 75 if the run should be started again, 130 after Ctrl-C (`Preemption`).

        Ranks other than the first always get 0: a launcher takes any other code as a failure.
        """
        preemption = preemption_of(self)
        return 0 if preemption is None or not self.is_global_zero else preemption.exit_code

    # --- connecting model, data and trainer -----------------------------------------------------------------------

    def _evaluation_arguments(
        self, model: Model | None, data: Any, dataloaders: Any, datamodule: Any, role: str, ckpt_path: Any
    ) -> dict[str, Any]:
        if model is None and ckpt_path is None and len(self.checkpoint_callbacks) > 1:
            ckpt_path = "best"  # Lightning would look at the first callback alone
        path = self.evaluated_path = checkpoint_path(self, ckpt_path)
        data = one_of("data", data, "dataloaders", dataloaders)
        if model is None:
            if self.lightning_module is None:
                raise ValueError("Give a model: this Trainer has not run one yet.")
            if data is None and datamodule is None:  # Lightning uses the data of the last run
                return {"model": None, "dataloaders": None, "datamodule": None, "ckpt_path": path}
            _, datamodule, loader = connect(self.lightning_module, data, datamodule, role)
            # No model: Lightning then chooses the best checkpoint of the run.
            return {"model": None, "dataloaders": loader, "datamodule": datamodule, "ckpt_path": path}
        module, datamodule, loader = connect(model, data, datamodule, role)
        return {"model": module, "dataloaders": loader, "datamodule": datamodule, "ckpt_path": path}
