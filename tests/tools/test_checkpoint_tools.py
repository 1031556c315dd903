"""`amt inspect | reshard | merge | export` on a checkpoint of a real run, on one device."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from automodel_trainer import CausalLMModule, LoRAConfig, MockDataModule, Trainer
from automodel_trainer.cli import main
from automodel_trainer.tools.export import compare
from automodel_trainer.tools.inspect import inspect
from automodel_trainer.tools.merge import merge
from automodel_trainer.tools.reshard import reshard
from tests.processes import call, run_code
from tests.tiny import tiny_model, tiny_tokenizer
from tests.tools.test_merge import MOE

IDS = torch.arange(6, 70).view(2, 32)


def trained(root: Path, family: str = "llama", lora: LoRAConfig | None = None, steps: int = 2, **config: Any) -> Path:
    """The checkpoint of a short run from the folder `root`/base."""
    if not (root / "base").exists():
        tiny_model(family, **config).save_pretrained(root / "base")
        tiny_tokenizer().save_pretrained(root / "base")
    quiet = {"enable_progress_bar": False, "enable_ledger": False, "logger": False}
    trainer = Trainer(accelerator="cpu", max_steps=steps, default_root_dir=root, **quiet)  # type: ignore[arg-type]
    data = MockDataModule(264, seq_len=16, num_samples=16, global_batch_size=2, micro_batch_size=1)
    saved = trainer.fit(CausalLMModule(root / "base", lora=lora, lr=1e-2), data)
    assert saved is not None
    return saved


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("run"))


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_merge_writes_the_checkpoint_as_one_model(run: Path, tmp_path: Path) -> None:
    merged = merge(run, tmp_path / "merged", max_shard_size="30KB")
    assert len(list(merged.glob("*.safetensors"))) > 2
    assert torch.equal(logits(merged), logits(run / "model"))
    assert transformers.AutoTokenizer.from_pretrained(merged).chat_template
    half = merge(merged, tmp_path / "half", dtype=torch.bfloat16)
    assert [file.name for file in half.glob("*.safetensors*")] == ["model.safetensors"]
    expected = {name: tensor.bfloat16() for name, tensor in all_tensors(run / "model").items()}
    found = all_tensors(half)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"


def test_merge_names_weights_as_the_hub_does(tmp_path: Path) -> None:
    """A model with fused experts in memory: its checkpoint has them fused, the Hub has them one by one."""
    saved = trained(tmp_path, "qwen3_moe", steps=1, **MOE)
    assert any("experts.gate_up_proj" in name for name in all_tensors(saved / "model"))
    merged = merge(saved, tmp_path / "merged")
    assert all_tensors(merged).keys() == all_tensors(tmp_path / "base").keys()
    torch.testing.assert_close(logits(merged), logits(saved / "model"), atol=0, rtol=0)


@pytest.mark.parametrize("shards", [1, 3, 21])
def test_reshard(shards: int, run: Path, tmp_path: Path) -> None:
    source, folder = all_tensors(run / "model"), reshard(run / "model", tmp_path / "model", shards)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == shards
    found = all_tensors(folder)
    assert found.keys() == source.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in source.items())
    if shards == 3:
        sizes = [file.stat().st_size for file in files]
        assert max(sizes) - min(sizes) < max(tensor.nbytes for tensor in source.values()), (
            "a boundary is half a tensor off"
        )
    transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_a_resharded_checkpoint_trains_on(run: Path, tmp_path: Path) -> None:
    resharded = reshard(run, tmp_path / "step-00000002", 4)
    assert inspect(resharded)["health"] == "whole"
    after = []
    for number, checkpoint in enumerate((run, resharded)):
        quiet = {"enable_progress_bar": False, "enable_ledger": False, "logger": False}
        trainer = Trainer(accelerator="cpu", max_steps=4, default_root_dir=tmp_path / str(number), **quiet)  # type: ignore[arg-type]
        data = MockDataModule(264, seq_len=16, num_samples=16, global_batch_size=2, micro_batch_size=1)
        saved = trainer.fit(CausalLMModule(run.parents[1] / "base", lr=1e-2), data, ckpt_path=checkpoint)
        after.append(all_tensors(saved / "model"))  # type: ignore[operator]
    assert all(torch.equal(tensor, after[1][name]) for name, tensor in after[0].items())


def test_inspect_tells_what_there_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = inspect(run)
    weights = all_tensors(run / "model")
    numbers = sum(tensor.numel() for tensor in weights.values())
    assert facts["kind"] == "checkpoint"
    assert (facts["step"], facts["world_size"], facts["health"]) == (2, 1, "whole")
    assert facts["run"] == str(run.parent)
    assert facts["weights"]["numbers"] == numbers
    assert facts["weights"]["bytes"] == {"float32": 4 * numbers}
    assert facts["weights"]["architectures"] == ["LlamaForCausalLM"]
    assert facts["optimizer"]["class"] == "AdamW"
    assert facts["optimizer"]["bytes"]["float32"] >= 8 * numbers, "two moments of each"
    assert facts["hyperparameters"]["lr"] == 1e-2
    assert facts["hyperparameters"]["kernels"]["lora"] == "auto"
    assert facts["data"]["batches_yielded"] == 2
    main(["inspect", str(run)])
    shown = capsys.readouterr().out
    assert "step" in shown
    assert "LlamaForCausalLM" in shown
    main(["inspect", str(run), "--json"])
    assert json.loads(capsys.readouterr().out)["step"] == 2
    assert inspect(run / "model")["kind"] == "model"


def test_inspect_finds_damage(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run, tmp_path / "copy")
    file = min((tmp_path / "copy" / "model").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(tmp_path / "copy")])
    assert ended.value.code == 1
    assert f"{file} is damaged" in capsys.readouterr().out.replace("\n", "")
    (tmp_path / "copy" / "trainer.json").write_text("{")
    facts = inspect(tmp_path / "copy")
    assert facts["step"].startswith("cannot be read")
    with pytest.raises(ValueError, match="damaged"):
        merge(tmp_path / "copy", tmp_path / "merged")
    with pytest.raises(ValueError, match="neither a folder"):
        inspect(tmp_path / "nothing")


def test_a_checkpoint_in_object_storage(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    url = f"file://{run}"
    assert inspect(url)["step"] == 2
    assert all_tensors(merge(url, tmp_path / "merged")).keys() == all_tensors(run / "model").keys()
    with pytest.raises(ValueError, match="is not a complete checkpoint"):
        inspect(f"file://{tmp_path}/step-00000001")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_is_checked(dtype: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["export", str(run), "--output", str(tmp_path / "out"), "--dtype", dtype, "--check"])
    assert "KL(source ‖ export)" in capsys.readouterr().out
    result = compare(run, tmp_path / "out")
    assert (result.mean == 0) == (dtype == "float32")
    assert 0 <= result.mean <= result.largest < 1e-2


def test_export_of_an_adapter_is_checked(tmp_path: Path) -> None:
    saved = trained(tmp_path, lora=LoRAConfig(rank=4))
    assert inspect(saved / "model")["kind"] == "adapter"
    main(["export", str(saved), "--output", str(tmp_path / "out"), "--check"])
    assert compare(saved, tmp_path / "out").mean < 1e-6
    assert compare(tmp_path / "base", tmp_path / "out").mean > 1e-6, "the adapter does something"


def test_an_export_that_computes_something_else_is_refused(run: Path, tmp_path: Path) -> None:
    """One tensor of the source is another after the export: swapped layers keep every shape."""
    folder = merge(run, tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    first, second = (f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1))
    tensors[first], tensors[second] = tensors[second].clone(), tensors[first].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    result = compare(run, folder)
    assert result.mean > result.limit


def test_what_cannot_be_done_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="21 tensors cannot be split into 22 files"):
        reshard(run, tmp_path / "out", 22)
    with pytest.raises(ValueError, match="not an adapter: leave out the base"):
        merge(run, tmp_path / "out", base=tmp_path)
    weights = all_tensors(run / "model")
    name = next(name for name in weights if "down_proj" in name)
    shutil.copytree(run / "model", tmp_path / "fp8")
    for file in (tmp_path / "fp8").glob("*.safetensors*"):
        file.unlink()
    save_file({**weights, name: weights[name].to(torch.float8_e4m3fn)}, tmp_path / "fp8" / "model.safetensors")
    with pytest.raises(ValueError, match="quantized weights cannot be cast"):
        merge(tmp_path / "fp8", tmp_path / "out", dtype=torch.bfloat16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fp8"], "nothing half-made stays"


_MEASURE = """
import sys, threading, time
from automodel_trainer.tools.merge import merge
from automodel_trainer.tools.reshard import reshard
import torch
def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
before, peak = resident(), [0]
def measured(task):
    peak[0] = 0
    task()
    print((peak[0] - before) // 1024)
def watch():
    while True:
        peak[0] = max(peak[0], resident())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
source, output = sys.argv[1:]
measured(lambda: merge(source, output + "/merged", dtype=torch.bfloat16))
measured(lambda: reshard(source, output + "/resharded", 2))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own account of memory")
def test_memory_is_bounded_by_a_few_tensors(tmp_path: Path) -> None:
    """About 400 MB in three files; the largest tensor is 8 MB."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 12, "head_dim": 64}
    model = tiny_model(**sizes, num_attention_heads=16, num_key_value_heads=16)
    total = sum(p.numel() * 4 for p in model.parameters()) / 2**20
    model.save_pretrained(tmp_path / "source", max_shard_size="150MB")
    del model
    printed = call(tmp_path, run_code, _MEASURE, tmp_path / "measure.py", str(tmp_path / "source"), str(tmp_path))
    assert total > 400
    merged, resharded = (int(line) for line in printed.splitlines() if line.isdigit())
    assert merged < 0.15 * total
    assert resharded < 0.15 * total
