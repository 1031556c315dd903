"""CausalLMModule: next-token training of a Hugging Face language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from automodel_trainer.models._routers import asks_for_logits
from automodel_trainer.models.kernels import kernels_in_use
from automodel_trainer.models.packed_inputs import document_inputs, lengths_of
from automodel_trainer.modules.evaluation import as_list
from automodel_trainer.modules.hugging_face import HuggingFaceModule
from automodel_trainer.modules.isolation import packs
from automodel_trainer.modules.loss import next_token_targets, summed_loss, supervised_tokens, token_losses
from automodel_trainer.modules.metrics import TokenMetrics
from automodel_trainer.modules.source_losses import SourceLosses
from automodel_trainer.strategies.base.objective import MicroBatch

_SOURCES_KEY = "source_losses"


class CausalLMModule(HuggingFaceModule):
    """Trains a causal language model on next-token prediction.

    The loss is the sum of token losses divided by the supervised tokens of the *global* batch. Of a mixture the loss of
    each source is logged as `train_loss/NAME`, without auxiliary losses. It takes the arguments of `HuggingFaceModule`.
    """

    auto_class = "AutoModelForCausalLM"
    defers_logits = True
    takes_document_lengths = True
    predicts_next_token = True
    _sources: SourceLosses | None = None
    _saved_sources: dict[str, Any] | None = None

    def split(self, micro_batch: MicroBatch) -> tuple[dict[str, Any], Any]:
        inputs, labels = super().split(micro_batch)
        # Training needs no cache, and with a cache transformers ignores the document boundaries of packed rows.
        inputs["use_cache"] = False
        config = getattr(self.model, "config", None)
        if config is not None and asks_for_logits(config):  # of routers; `Balance` computes their loss
            inputs["output_router_logits"] = False
        targets = next_token_targets(labels)
        sources = None
        if self._sources is not None and "sources" in micro_batch:
            sources = micro_batch["sources"][:, None].expand_as(targets)
        if self.gives_document_lengths and packs(micro_batch):
            lengths = micro_batch.get("document_lengths") or lengths_of(micro_batch["position_ids"])
            inputs, targets = document_inputs(inputs, lengths), targets.view(1, -1)
            sources = None if sources is None else sources.reshape(1, -1)
        return inputs, targets if sources is None else (targets, sources)

    def loss(self, outputs: Any, targets: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        groups = None
        if isinstance(targets, tuple):
            targets, sources = targets
            assert self._sources is not None, "split gives sources only then"
            groups = self._sources.groups(sources)
        return summed_loss(outputs.logits, targets, kernels_in_use(self.model).loss, groups)

    def count(self, micro_batch: MicroBatch) -> Tensor:
        return supervised_tokens(micro_batch["labels"])

    # --- the loss of each source of a mixture ---------------------------------------------------------------------

    def on_train_start(self) -> None:
        super().on_train_start()
        names = getattr(getattr(self.trainer, "datamodule", None), "source_names", [])
        self._sources = None
        if not names:
            return
        if self.strategy.replicas > 1:
            rank_zero_warn(
                "The loss of each source is not logged: replica groups that come and go count all rows together."
            )
            return
        if (kernel := kernels_in_use(self.model).loss) is not None:
            rank_zero_warn(
                f"The loss of each source is not logged: kernels loss={kernel.name!r} computes the sum of all tokens "
                "alone. Use kernels: {loss: chunked} for it."
            )
            return
        self._sources = SourceLosses(names, self.strategy)
        if self._saved_sources is not None:
            self._sources.restore(self._saved_sources)
            self._saved_sources = None

    def training_step(self, batch: Sequence[MicroBatch] | MicroBatch, batch_idx: int) -> dict[str, Tensor] | None:
        if self._sources is not None:
            self._sources.count(as_list(batch))
        return super().training_step(batch, batch_idx)

    def _log_window(self) -> None:
        super()._log_window()
        if self._sources is not None:
            self.log_dict({f"train_loss/{name}": loss for name, loss in self._sources.pop().items()})

    def on_train_end(self) -> None:
        super().on_train_end()
        self._sources = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self._sources is not None:
            checkpoint[_SOURCES_KEY] = self._sources.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._saved_sources = checkpoint.get(_SOURCES_KEY)

    def build_metrics(self) -> Metric:
        return TokenMetrics()

    def predict(self, micro_batch: MicroBatch) -> dict[str, Any]:
        """The log-probability of every supervised token: fp32 `[b, s]`, aligned with `input_ids`, 0 elsewhere."""
        losses = self.per_token(micro_batch, token_losses, torch.float32).view_as(micro_batch["labels"])
        return {"log_probs": F.pad(-losses[:, :-1], (1, 0))}
