"""A checkpoint written under one layout, read under another; what a failed or interrupted save leaves behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from automodel_trainer.checkpoint import (
    CheckpointError,
    check_checkpoint,
    folder,
    load_checkpoint,
    save_checkpoint,
    state,
    weights,
)
from automodel_trainer.checkpoint import optimizer as optimizer_states
from automodel_trainer.checkpoint.lightning_file import read_lightning_file
from automodel_trainer.checkpoint.optimizer import load_optimizers, snapshot_optimizers
from automodel_trainer.checkpoint.sources import model_folder
from tests.harness import make_strategy
from tests.pool import RankPool
from tests.processes import Job
from tests.tiny import tiny_model

LIGHTNING = {"epoch": 1, "global_step": 3, "loops": {}, "lr_schedulers": [{"last_epoch": 3}], "state_dict": {}}


def build(spec: str, world_size: int, seed: int) -> tuple[Any, torch.optim.Optimizer]:
    """A tied model with a frozen embedding-free layer and an extra buffer; two parameter groups, one never trained."""
    model = tiny_model(seed=seed, tie_word_embeddings=True, hidden_size=36, intermediate_size=66)  # uneven over 4 ranks
    model.register_buffer("counter", torch.full((3,), float(seed)))
    model.model.layers[0].mlp.requires_grad_(False)
    model = make_strategy(spec, world_size).parallelize(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() > 1]}, {"params": [p for p in trained if p.dim() == 1]}]
    groups[1]["weight_decay"] = 0.0
    return model, torch.optim.AdamW(groups, lr=0.1 * (seed + 1), betas=(0.8, 0.9))


def step(model: Any, optimizer: torch.optim.Optimizer) -> None:
    model(input_ids=torch.arange(24).view(2, 12), labels=torch.arange(24).view(2, 12)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def full(value: Any) -> Any:
    return value.full_tensor().clone() if isinstance(value, DTensor) else value


def snapshot(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    names = {id(p): n for n, p in model.named_parameters()}
    states = {f"{names[id(p)]}/{k}": full(v) for p, values in optimizer.state.items() for k, v in values.items()}
    weights = {name: full(value).detach().clone() for name, value in model.state_dict().items()}
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return {"weights": weights, "states": states, "groups": groups}


def save(spec: str, world_size: int, folder: Path, small_files: bool = False) -> dict[str, Any]:
    model, optimizer = build(spec, world_size, seed=1)
    step(model, optimizer)
    with pytest.MonkeyPatch.context() as patch:
        if small_files:
            patch.setattr(weights, "MIN_FILE_BYTES", 1 << 12)
        save_checkpoint(folder, LIGHTNING, model, [optimizer])
    return snapshot(model, optimizer)


def load(spec: str, world_size: int, folder: Path) -> dict[str, Any]:
    model, optimizer = build(spec, world_size, seed=2)
    loaded = load_checkpoint(folder, model, [optimizer])
    assert loaded["global_step"] == 3
    assert loaded["optimizer_states"] == []
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    placements = {str(getattr(s["exp_avg"], "placements", None)) for s in optimizer.state.values()}
    expected = {str(getattr(p, "placements", None)) for p in optimizer.state}
    return {**snapshot(model, optimizer), "tied": tied, "same_placements": placements == expected}


def assert_equal(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert got["groups"] == want["groups"]
    for part in ("weights", "states"):
        assert got[part].keys() == want[part].keys()
        for name, value in want[part].items():
            assert value.shape == got[part][name].shape, name
            assert value.dtype == got[part][name].dtype, name
            assert torch.equal(value, got[part][name]), name


def test_any_layout_reads_what_any_layout_wrote(pool: RankPool, tmp_path: Path) -> None:
    saved = pool.run(2, save, "fsdp2", 2, tmp_path / "a", True)[0]
    assert any(name.endswith("/step") for name in saved["states"])
    for number, (spec, world_size) in enumerate([("ddp", 1), ("fsdp2", 4), ("hsdp", 4), ("ddp", 2)]):
        for result in pool.run(world_size, load, spec, world_size, tmp_path / "a"):
            assert_equal(result, saved)
            assert result["tied"]
            assert result["same_placements"]
        again = pool.run(world_size, save_loaded, spec, world_size, tmp_path / "a", tmp_path / str(number))[0]
        assert_equal(again, saved)
        assert_equal(pool.run(1, load, "auto", 1, tmp_path / str(number))[0], saved)


def save_loaded(spec: str, world_size: int, source: Path, folder: Path) -> dict[str, Any]:
    model, optimizer = build(spec, world_size, seed=3)
    load_checkpoint(source, model, [optimizer])
    save_checkpoint(folder, LIGHTNING, model, [optimizer])
    return snapshot(model, optimizer)


def test_tensor_parallel_shards_on_top_of_fsdp(pool: RankPool, tmp_path: Path) -> None:
    assert pool.run(4, strided, tmp_path / "a") == [True] * 4


def strided(folder: Path) -> bool:
    """FSDP2 over tensor parallelism shards one dimension twice, the inner axis first."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    make_strategy("fsdp2", 4)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))

    def make(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        module = torch.nn.Sequential(torch.nn.Linear(4, 7))
        parallelize_module(module, mesh["tp"], {"0": ColwiseParallel()})
        fully_shard(module, mesh=mesh["dp"])
        return module, torch.optim.AdamW(module.parameters(), lr=0.1)

    first, optimizer = make(0)
    first(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert "Strided" in str(first[0].weight.placements)
    save_checkpoint(folder, LIGHTNING, first, [optimizer])
    second, other = make(1)
    load_checkpoint(folder, second, [other])
    states = zip(optimizer.state.values(), other.state.values())
    same_states = all(torch.equal(full(a["exp_avg_sq"]), full(b["exp_avg_sq"])) for a, b in states)
    return same_states and all(torch.equal(full(a), full(b)) for a, b in zip(first.parameters(), second.parameters()))


def test_model_is_a_hugging_face_folder(pool: RankPool, tmp_path: Path) -> None:
    saved = pool.run(4, save, "fsdp2", 4, tmp_path / "a", True)[0]
    assert len(list((tmp_path / "a" / "model").glob("*.safetensors"))) > 4
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "model")
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved["weights"][name]), name
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_model_folder_of_a_mixture_of_experts(tmp_path: Path) -> None:
    """Experts lie in it as in memory, in one tensor per layer; transformers reads that as well."""
    model = tiny_model("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    save_checkpoint(tmp_path / "a", LIGHTNING, model, [])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "model").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())


def test_nothing_is_pickled(pool: RankPool, tmp_path: Path) -> None:
    pool.run(2, save, "fsdp2", 2, tmp_path / "a")
    files = [file for file in (tmp_path / "a").rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".safetensors", ".json"}
    for file in files:
        content = file.read_bytes()
        if file.suffix == ".json":
            json.loads(content)
        else:
            assert content[:2] not in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05")


@pytest.mark.parametrize("file", ["model/model-00001-of-00001.safetensors", "trainer.json", "rank-00001.json"])
def test_damage_is_named(pool: RankPool, tmp_path: Path, file: str) -> None:
    if not (whole := tmp_path.parent / "whole").exists():
        pool.run(2, save, "fsdp2", 2, whole)
    shutil.copytree(whole, tmp_path / "a")
    check_checkpoint(tmp_path / "a")
    os.truncate(tmp_path / "a" / file, 100)
    with pytest.raises(ValueError, match=f"{file} is damaged"):
        check_checkpoint(tmp_path / "a")
    (tmp_path / "a" / file).unlink()
    with pytest.raises(AssertionError, match=f"ValueError: The checkpoint .* lacks {file}"):
        pool.run(2, load, "fsdp2", 2, tmp_path / "a")
    (tmp_path / "a" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"manifest.json is missing"):
        check_checkpoint(tmp_path / "a")
    with pytest.raises(ValueError, match="no such folder"):
        check_checkpoint(tmp_path / "b")


def test_folders_beside_a_checkpoint_are_told_from_damaged_ones(tmp_path: Path) -> None:
    """People give the folder of the run, the one of the checkpoints, a model, or a file."""
    checkpoint = tmp_path / "checkpoints" / "step-00000001"
    (checkpoint / "model").mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    (checkpoint.parent / "latest").symlink_to(checkpoint.name)
    (checkpoint / "model" / "config.json").write_text("{}")
    shutil.copytree(checkpoint / "model", tmp_path / "export")
    for given, message in (
        (tmp_path, "It holds checkpoints: give one, such as .*/checkpoints/latest"),
        (checkpoint.parent, "It holds checkpoints: give one, such as .*/checkpoints/latest"),
        (checkpoint / "model", "without training state. To resume give .*/step-00000001"),
        (tmp_path / "export", "without training state. To begin with its weights give it as the model"),
    ):
        with pytest.raises(ValueError, match=message):
            check_checkpoint(given)
    with pytest.raises(ValueError, match=r"neither a model nor a checkpoint\. It holds checkpoints: give one"):
        model_folder(tmp_path)
    with pytest.raises(ValueError, match=r"is a part of a checkpoint. Give its folder: .*/step-00000001"):
        read_lightning_file(checkpoint / "manifest.json")


def test_another_model_or_optimizer_is_refused(tmp_path: Path) -> None:
    model, optimizer = build("auto", 1, 1)
    step(model, optimizer)
    save_checkpoint(tmp_path / "a", LIGHTNING, model, [optimizer])
    wider = tiny_model(vocab_size=300, tie_word_embeddings=True, hidden_size=36, intermediate_size=66)
    with pytest.raises(ValueError, match="holds counter"):
        load_checkpoint(tmp_path / "a", wider, [])
    wider.register_buffer("counter", torch.zeros(3))
    with pytest.raises(ValueError, match=r"embed_tokens.weight has the shape \[264, 36\] .* but \[300, 36\]"):
        load_checkpoint(tmp_path / "a", wider, [])
    with pytest.raises(ValueError, match="state of AdamW, but the run uses SGD"):
        load_checkpoint(tmp_path / "a", model, [torch.optim.SGD(model.parameters())])
    half = [{"params": list(model.parameters())[:2]}, {"params": list(model.parameters())[2:]}]
    with pytest.raises(ValueError, match="is trained in only one of"):
        load_checkpoint(tmp_path / "a", model, [torch.optim.AdamW(half)])


class Master(torch.optim.SGD):
    """Keeps a copy of each parameter in fp32, whatever the parameter's dtype."""

    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter].setdefault("master", parameter.detach().float().clone())


@pytest.mark.parametrize("then", [torch.float32, torch.bfloat16])
def test_state_follows_the_dtype_of_its_parameter(tmp_path: Path, then: torch.dtype) -> None:
    """A run may go on in another precision. State with a dtype of its own keeps it; older files do not say."""
    now = torch.bfloat16 if then is torch.float32 else torch.float32
    for kind in (torch.optim.AdamW, Master):
        optimizers = {}
        for dtype in (then, now):
            model = torch.nn.Linear(3, 2).to(dtype)
            optimizers[dtype] = model, kind(model.parameters(), **({"fused": True} if kind is not Master else {}))
        model, optimizer = optimizers[then]
        model(torch.ones(1, 3, dtype=then)).sum().backward()
        optimizer.step()
        folder = tmp_path / kind.__name__
        folder.mkdir()
        snapshot_optimizers(model, [optimizer]).write(folder)
        other, loaded = optimizers[now]
        for old_file in (False, kind is torch.optim.AdamW):
            if old_file:
                groups = json.loads((folder / "groups.json").read_text())
                del groups[0]["groups"][0]["dtypes"]
                (folder / "groups.json").write_text(json.dumps(groups))
            load_optimizers(other, [loaded], folder)
            kinds = {value.dtype for entry in loaded.state.values() for value in entry.values() if value.dim()}
            assert kinds == ({torch.float32} if kind is Master and then is torch.bfloat16 else {now})
            other(torch.ones(1, 3, dtype=now)).sum().backward()
            loaded.step()


def test_state_that_is_no_json_is_refused_and_named(tmp_path: Path) -> None:
    checkpoint = {**LIGHTNING, "callbacks": {"net": {"act": torch.nn.ReLU()}}}
    with pytest.raises(ValueError, match=r"callbacks.net.act is a torch.nn.*ReLU"):
        save_checkpoint(tmp_path / "a", checkpoint, torch.nn.Linear(2, 2), [])
    assert list(tmp_path.iterdir()) == []


def fail_on_rank_1(folder: Path, which: str) -> tuple[str, int | None]:
    """A full disk on rank 1 only."""

    def full_disk(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    model, optimizer = build("fsdp2", 2, seed=1)
    step(model, optimizer)
    with pytest.MonkeyPatch.context() as patch:
        if int(os.environ["RANK"]) == 1:
            patch.setattr(
                *((optimizer_states, "write_safetensors") if which == "tensors" else (state, "write_text")), full_disk
            )
        try:
            save_checkpoint(folder, LIGHTNING, model, [optimizer])
        except CheckpointError as error:
            return str(error), error.errno
    return "no error", None


@pytest.mark.parametrize("which", ["tensors", "json"])
def test_full_disk_on_one_rank_fails_on_all_and_leaves_the_old(pool: RankPool, tmp_path: Path, which: str) -> None:
    old = pool.run(2, save, "fsdp2", 2, tmp_path / "a")[0]
    (first, number), second = pool.run(2, fail_on_rank_1, tmp_path / "a", which)
    assert "No space left on device" in first
    assert "on rank 1" in first
    assert number == errno.ENOSPC
    assert second == (first, number)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert_equal(pool.run(2, load, "fsdp2", 2, tmp_path / "a")[0], old)


def slow_save(base: Path, during: str) -> None:
    def slowly(*args: Any) -> None:
        print("writing", flush=True)
        time.sleep(60)

    module = torch.nn.Linear(3, 3)
    save_checkpoint(base / "step-00000001", LIGHTNING, module, [])
    owner, name = {"optimizer": (state.OptimizerSnapshot, "write"), "publish": (state, "publish")}[during]
    setattr(owner, name, slowly)
    save_checkpoint(base / "step-00000002", LIGHTNING, module, [])


@pytest.mark.parametrize("during", ["optimizer", "publish"])
def test_kill_during_a_save_leaves_the_one_before(tmp_path: Path, during: str) -> None:
    from automodel_trainer.checkpoint.runs import find_last

    base = tmp_path / "checkpoints"
    job = Job(tmp_path, slow_save, base, during)
    job.until("writing")
    job.signal(signal.SIGKILL)
    assert job.wait() == [-signal.SIGKILL]
    assert (base / "step-00000002.tmp" / "model").is_dir()
    assert find_last(base) == base / "step-00000001"
    module = torch.nn.Linear(3, 3)
    assert load_checkpoint(base / "step-00000001", module, [])["global_step"] == 3
    save_checkpoint(base / "step-00000003", LIGHTNING, module, [])
    assert sorted(path.name for path in base.iterdir()) == ["step-00000001", "step-00000003"]
    assert find_last(base) == base / "step-00000003"


def test_killed_while_a_checkpoint_is_replaced_the_old_one_is_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = torch.nn.Linear(3, 3)
    save_checkpoint(tmp_path / "mine", LIGHTNING, module, [])
    renamed: list[Path] = []

    class Killed(BaseException):
        pass

    def rename(path: Path, target: Path) -> None:
        if renamed:
            raise Killed
        renamed.append(path)
        os.rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(Killed):
            save_checkpoint(tmp_path / "mine", LIGHTNING, module, [])
    folder._IN_WORK.clear()  # as in a new process
    assert not (tmp_path / "mine").exists()
    save_checkpoint(tmp_path / "other", LIGHTNING, module, [])
    check_checkpoint(tmp_path / "mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "other"]


def test_random_numbers_go_on(pool: RankPool, tmp_path: Path) -> None:
    drawn = pool.run(2, draw_after_save, tmp_path / "a")
    assert pool.run(2, draw_after_load, tmp_path / "a", 2) == drawn
    other = pool.run(4, draw_after_load, tmp_path / "a", 4)
    assert other == pool.run(4, draw_after_load, tmp_path / "a", 4)
    assert len({str(numbers) for numbers in other + drawn}) == 6


def draw() -> list[float]:
    import random

    import numpy as np

    return [random.random(), float(np.random.rand()), float(np.random.randn()), float(torch.rand(()))]


def draw_after_save(folder: Path) -> list[float]:
    make_strategy("fsdp2", 2)
    torch.manual_seed(int(os.environ["RANK"]))
    torch.rand(3)
    save_checkpoint(folder, LIGHTNING, torch.nn.Linear(2, 2), [])
    return draw()


def draw_after_load(folder: Path, world_size: int) -> list[float]:
    make_strategy("fsdp2", world_size)
    time.sleep(0.01 * int(os.environ["RANK"]))
    load_checkpoint(folder, torch.nn.Linear(2, 2), [])
    return draw()
