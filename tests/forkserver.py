"""What the server of forked processes imports: they begin with all of it, and do not look through it for garbage."""

import gc
import importlib

gc.disable()  # imports make none

from tests.pool import look_once_for_plugins, seldom_look_for_garbage  # noqa: E402

for name in (
    "pytest",
    "tests.callbacks.runs",
    "tests.harness",
    "automodel_trainer.lightning_cli",
    "transformers.models.llama.modeling_llama",
    "torch._dynamo",
    "torch._inductor.compile_fx",  # which aot_eager has too, and torchao
    "torch.distributed.checkpoint",
    "torch.distributed.tensor.experimental",
    "torch.distributed.tensor.parallel",
    "torch.utils.tensorboard",
    "peft",
    "networkx",
    "s3fs",  # which Lightning imports, if it is there, to look at any path
):
    importlib.import_module(name)

look_once_for_plugins()
seldom_look_for_garbage()
importlib.import_module("automodel_trainer.callbacks").GarbageCollection._user_freezes()  # it is counted here, once
