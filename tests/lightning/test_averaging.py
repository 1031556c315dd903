"""Lightning's callbacks that average weights, under every layout: what they average, save and resume."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.demos.boring_classes import BoringModel
from safetensors.torch import load_file
from torch.optim import swa_utils

from automodel_trainer import CausalLMModule, LoRAConfig, MockDataModule
from automodel_trainer.callbacks import DCPCheckpoint
from tests.lightning.boring import WHOLE_EPOCHS, make
from tests.pool import RankPool
from tests.tiny import tiny_model

Weights = dict[str, torch.Tensor]


def trained(module: Any) -> Weights:
    """The trained weights of a module, whole."""
    found = {name: p.detach() for name, p in module.model.named_parameters() if p.requires_grad}
    return {name: getattr(p, "full_tensor", lambda p=p: p)().float().clone() for name, p in found.items()}


class Recorder(Callback):
    """Keeps the weights at the start of each epoch and after each step, and those that validations see."""

    def __init__(self) -> None:
        self.epochs: list[Weights] = []
        self.steps: list[Weights] = []
        self.validated: list[Weights] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.epochs.append(trained(pl_module))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step > len(self.steps):
            self.steps.append(trained(pl_module))

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.validated.append(trained(pl_module))


def fit(root: Path, strategy: str, precision: str, lora: bool, averaging: Callback, ckpt: Any = None) -> Any:
    """Two epochs of four steps, a validation after each; a checkpoint after step 4."""
    recorder, config = Recorder(), LoRAConfig(rank=4) if lora else None
    trainer = make(
        root,
        strategy=strategy,
        devices="auto",
        precision=precision,
        max_epochs=2,
        callbacks=[recorder, averaging, DCPCheckpoint(every_n_train_steps=4, save_top_k=-1, filename="{step}")],
        **WHOLE_EPOCHS,
    )
    module = CausalLMModule(tiny_model(), lr=1e-2, lora=config, scheduler="constant")
    data = MockDataModule(264, seq_len=16, micro_batch_size=1, global_batch_size=4, num_samples=16, val_samples=4)
    trainer.fit(module, data, ckpt_path=ckpt)
    return recorder, trained(module)


def average_moving(root: str, strategy: str, precision: str, lora: bool) -> dict[str, Any]:
    """Distances on one rank: of the end from the moving average of all steps, of the resumed end, of the saved file."""
    recorder, end = fit(Path(root) / "a", strategy, precision, lora, EMAWeightAveraging(decay=0.5))
    average = recorder.steps[0]
    for step in recorder.steps[1:]:
        average = {name: 0.5 * (average[name] + step[name]) for name in step}
    saved = next((Path(root) / "a").glob("**/step=4"))
    recorded, resumed = fit(Path(root) / "b", strategy, precision, lora, EMAWeightAveraging(decay=0.5), saved)
    extra = [name for file in (saved / "extra").glob("*.safetensors") for name in load_file(file)]
    return {
        "average": distance(average, end),
        "resumed": distance(resumed, end),
        "validated": distance(recorder.validated[-1], end),
        "continued": distance(recorded.steps[-1], recorder.steps[-1]),
        "trained": distance(recorder.steps[-1], end),
        "extra": extra,
        "steps": recorder.steps[-1],
    }


def distance(one: Weights, other: Weights) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


LAYOUTS = [("fsdp2", "fp32"), ("fsdp2", "bf16-mixed"), ("hsdp:dp_replicate=2", "fp32"), ("fsdp2:tp=2", "fp32")]


@pytest.mark.parametrize(("strategy", "precision", "lora"), [(*LAYOUTS[i], i % 2 == 1) for i in range(4)])
def test_a_moving_average(pool: RankPool, tmp_path: Path, strategy: str, precision: str, lora: bool) -> None:
    """It is that of the weights after each step, validations see it, and it is saved and resumed bit for bit."""
    one = average_moving(str(tmp_path / "one"), "fsdp2", precision, lora)
    for found in (one, *pool.run(2, average_moving, str(tmp_path / "two"), strategy, precision, lora)):
        assert found["average"] < 1e-6
        assert found["resumed"] == found["continued"] == found["validated"] == 0.0
        assert found["trained"] > 1e-4, "the average is not what was trained last"
        assert lora is not any("embed_tokens" in name for name in found["extra"]), "no frozen base beside adapters"
        if precision == "fp32":
            assert distance(found["steps"], one["steps"]) < 1e-4


def average_of_epochs(root: str, strategy: str, precision: str, lora: bool) -> tuple[float, float]:
    """The distance of the end from the mean of the weights at the starts of epochs, and from the last of them."""
    averaging = StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1, annealing_epochs=1)
    recorder, end = fit(Path(root), strategy, precision, lora, averaging)
    mean = {name: (recorder.epochs[0][name] + recorder.epochs[1][name]) / 2 for name in end}
    return distance(mean, end), distance(recorder.epochs[-1], end)


@pytest.mark.parametrize("lora", [False, True])
def test_an_average_of_epochs(pool: RankPool, tmp_path: Path, lora: bool) -> None:
    """Before, it copied a module whose model was not built yet, and averaged nothing."""
    found = [average_of_epochs(str(tmp_path), "ddp", "fp32", lora)]
    for strategy, precision in LAYOUTS[1:2] if lora else LAYOUTS[::3]:
        found += pool.run(2, average_of_epochs, str(tmp_path), strategy, precision, lora)
    assert all(mean < 1e-6 < 1e-4 < last for mean, last in found)


def average_of_steps(root: str) -> tuple[float, float]:
    """Distances of the end from the mean of the weights after all steps, and from the last. Lists as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(swa_utils, "_get_foreach_kernels_supported_devices", lambda: ["cpu"])
        recorder, end = fit(Path(root), "fsdp2", "fp32", False, WeightAveraging())
    steps = recorder.steps
    return distance({name: sum(step[name] for step in steps) / len(steps) for name in end}, end), distance(
        steps[-1], end
    )


def test_an_average_of_all_steps(pool: RankPool, tmp_path: Path) -> None:
    """`WeightAveraging` has no function of its own."""
    assert all(mean < 1e-6 < 1e-4 < last for mean, last in pool.run(2, average_of_steps, str(tmp_path)))


def refused(strategy: str, root: str, own: bool) -> str:
    averaging: Any = EMAWeightAveraging(decay=0.5)
    try:
        if own:
            make(root, strategy=strategy, devices="auto", callbacks=[averaging]).fit(BoringModel())
        else:
            fit(Path(root), strategy, "fp32", False, averaging)
    except ValueError as error:
        return str(error)
    return ""


def test_what_cannot_be_averaged_is_refused(pool: RankPool, tmp_path: Path) -> None:
    for own, strategy, message in [(False, "3d:pp=2", "set pp=1"), (True, "fsdp2", "Use strategy='ddp'")]:
        assert all(message in found for found in pool.run(2, refused, strategy, str(tmp_path), own))


class Copies(Callback):
    """Copies a sharded model when training begins, compares the two and stops."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        original, other = pl_module.model, copy.deepcopy(pl_module.model)
        assert original.state_dict().keys() == other.state_dict().keys()
        for (name, one), (other_name, two) in zip(original.named_parameters(), other.named_parameters(), strict=True):
            assert name == other_name
            shared = one.to_local().data_ptr() == two.to_local().data_ptr()
            assert shared is not one.requires_grad
            assert torch.equal(one.full_tensor(), two.full_tensor())
        with pytest.raises(RuntimeError, match="cannot run"):
            other(input_ids=torch.zeros(1, 4, dtype=torch.long))
        trainer.should_stop = True


def copied(root: str) -> None:
    fit(Path(root), "fsdp2", "fp32", True, Copies())


def test_a_copy_of_a_sharded_model_holds_weights_alone(pool: RankPool, tmp_path: Path) -> None:
    pool.run(2, copied, str(tmp_path))
