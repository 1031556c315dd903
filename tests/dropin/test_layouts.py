"""A sharded model in loops that know nothing of us: it trains, saves, streams and generates as on one device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.fabric
import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from automodel_trainer import AutoModelForCausalLM, FSDP2Strategy, LoRAConfig, Trainer
from automodel_trainer.checkpoint.own_saving import save_by_export
from automodel_trainer.checkpoint.stream import stream_weights, weight_info
from automodel_trainer.distributed.agreement import rank
from automodel_trainer.strategies import StrategyRegistry
from automodel_trainer.strategies.base.clip import clip_grad_norm_
from tests.harness import once
from tests.limits import check_run, close
from tests.matrix import more
from tests.pool import RankPool
from tests.tiny import tiny_model, tiny_tokenizer

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
ROWS = torch.arange(6, 54).view(4, 12)
LEFT = {
    "input_ids": torch.tensor([[0, 0, 9, 11, 13], [7, 8, 9, 10, 11]]),
    "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
}
LORA = LoRAConfig(rank=4, init="orthogonal")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for name, model in {"dense": tiny_model("llama"), "moe": tiny_model("qwen3_moe", **MOE)}.items():
        for parameter in model.parameters():  # a tiny model's own weights hardly tell one token from another
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(folder / name)
    return folder


def full(tensor: Any) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def loop(model: PreTrainedModel, rows: torch.Tensor, clip: Any = torch.nn.utils.clip_grad_norm_) -> dict[int, float]:
    """Four steps as any torch user writes them; the losses, averaged over data-parallel ranks."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-2)
    losses = {}
    for step in range(4):
        parts = rows.chunk(2) if step == 1 else [rows]  # the second step accumulates
        total = torch.zeros(())
        for part in parts:
            loss = model(input_ids=part, labels=part).loss / len(parts)
            loss.backward()
            total = total + full(loss)
        clip(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if dist.is_initialized():
            dist.all_reduce(total)
            total /= dist.get_world_size()
        losses[step] = total.item()
    return losses


def generated(model: PreTrainedModel) -> list[torch.Tensor]:
    model.eval()
    options = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 0}
    return [
        model.generate(**LEFT, **options),
        model.generate(**LEFT, **options, use_cache=False),
        model.generate(**LEFT, **options, num_beams=2),
        model.generate(**LEFT, **options, stop_strings=["a", "the"], tokenizer=tiny_tokenizer()),
    ]


def on_ranks(spec: str, folder: Path, out: Path, lora: LoRAConfig | None) -> dict[str, Any]:
    """What a rank sees: a strategy given as a name, a plain loop, and everything that leaves the model."""
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 7)
    model = AutoModelForCausalLM.from_pretrained(folder, strategy=spec, lora=lora)
    other = AutoModelForCausalLM.from_pretrained(folder, strategy=spec)  # a reference model on the same mesh
    strategy = StrategyRegistry.get(spec).start()  # another one in the same processes
    seen: dict[str, Any] = {"untouched": {name: t.clone() for name, t in stream_weights(other)}}
    if lora is not None:
        model.save_pretrained(out / "init")
    pipeline = strategy.dims.pp > 1
    if not pipeline:
        seen["generated"] = generated(other)
        rows = ROWS[strategy.dp_rank :: strategy.dp_size]
        # torch's refuses experts, which lie on a mesh of their own
        clip = clip_grad_norm_ if "ep" in spec else torch.nn.utils.clip_grad_norm_
        seen["losses"] = loop(model, rows, clip)
    model.save_pretrained(out / "saved", is_main_process=rank() == 0)
    seen["info"] = {name: (tuple(i.shape), i.dtype) for name, i in weight_info(model).items()}
    seen["weights"] = {name: tensor.clone() for name, tensor in stream_weights(model)}
    seen["bf16"] = {tensor.dtype for _, tensor in stream_weights(model, torch.bfloat16)}
    seen["names"] = list(weight_info(model, merge_adapters=False))
    if lora is not None:
        seen["adapter"] = {name: t.clone() for name, t in stream_weights(model, merge_adapters=False)}
    if pipeline:
        with pytest.raises(ValueError, match="only without gradients"):
            model.train()(input_ids=ROWS)
    strategy.stop()
    return seen


def alone(model: PreTrainedModel, dtype: torch.dtype) -> tuple[dict[int, float], PreTrainedModel]:
    model = copy.deepcopy(model).to(dtype)
    return loop(model, ROWS), model


def plain(folder: Path) -> PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")  # also in fp64


def weights_of(model: PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    """The weights as transformers saves them."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def wanted(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """What one device makes of a base: losses and weights, in fp64 and fp32, and what it generates."""

    @once
    def of(kind: str) -> Any:
        start, folder = plain(bases / kind), tmp_path_factory.mktemp("wanted")
        runs = [alone(start, dtype) for dtype in (torch.float64, torch.float32)]
        files = [weights_of(model, folder / str(i)) for i, (_, model) in enumerate(runs)]
        return runs[0][0], runs[1][0], *files, generated(start), load_file(bases / kind / "model.safetensors")

    return of


@pytest.mark.parametrize(
    ("spec", "world_size", "kind"),
    [
        ("ddp", 2, "dense"), ("fsdp2", 2, "dense"), ("fsdp2:tp=2", 2, "dense"), ("fsdp2:ep=2", 2, "moe"),
        ("3d:pp=2", 2, "dense"), more("fsdp2:cp=2", 2, "dense"), more("hsdp", 4, "dense"),
        more("fsdp2:tp=2", 4, "moe"),
    ],
)  # fmt: skip
def test_a_plain_loop_on_every_layout(
    pool: RankPool, bases: Path, tmp_path: Path, wanted: Callable[[str], Any], spec: str, world_size: int, kind: str
) -> None:
    exact, near, exact_weights, near_weights, tokens, untouched = wanted(kind)
    ranks = pool.run(world_size, on_ranks, spec, bases / kind, tmp_path, None)
    for seen in ranks:
        assert seen["untouched"].keys() == untouched.keys()
        assert all(torch.equal(seen["untouched"][name], tensor) for name, tensor in untouched.items())
        if "losses" in seen:
            check_run(seen["losses"], exact, near, ROWS.numel(), "loss")
            check_run(seen["weights"], exact_weights, near_weights, ROWS.numel())
            assert all(torch.equal(a, b) for a, b in zip(seen["generated"], tokens))
        assert seen["info"] == {name: (tuple(t.shape), t.dtype) for name, t in seen["weights"].items()}
        assert seen["bf16"] == {torch.bfloat16}
        assert seen["names"] == list(seen["info"])
    saved, written = load_file(tmp_path / "saved" / "model.safetensors"), ranks[0]["weights"]
    assert saved.keys() == written.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in written.items())


def test_adapters_in_a_plain_loop(pool: RankPool, bases: Path, tmp_path: Path) -> None:
    layouts = [("fsdp2", "dense"), ("ddp", "dense"), ("fsdp2:tp=2", "dense"), ("fsdp2", "moe"), ("3d:pp=2", "dense")]
    for spec, kind in layouts:
        out = tmp_path / f"{spec}-{kind}".replace(":", "-")
        lora = LORA if kind == "dense" else LoRAConfig(rank=4)
        seen = pool.run(2, on_ranks, spec, bases / kind, out, lora)[0]
        runs = []
        for dtype in (torch.float64, torch.float32):
            model = PeftModel.from_pretrained(plain(bases / kind), out / "init", is_trainable=True)
            runs.append(alone(model, dtype))  # type: ignore[arg-type]
        if "losses" in seen:  # a pipeline refuses plain loops
            check_run(seen["losses"], runs[0][0], runs[1][0], ROWS.numel(), "loss")
        merged = PeftModel.from_pretrained(plain(bases / kind), out / "saved").merge_and_unload()
        merged = weights_of(merged, out / "merged")
        assert merged.keys() == seen["weights"].keys()
        for name, tensor in merged.items():
            close(seen["weights"][name], tensor, name=name)
        saved = load_file(out / "saved" / "adapter_model.safetensors")
        assert saved.keys() == seen["adapter"].keys() == set(seen["names"])
        assert all(torch.equal(saved[name], tensor) for name, tensor in seen["adapter"].items())


def with_peft(model: PreTrainedModel) -> None:
    """A forward in training of PEFT's adapters on a sharded model; one in evaluation is nobody's business."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.train()(input_ids=ROWS, labels=ROWS)


def other_tools(folder: Path) -> dict[str, Any]:
    """GradScaler, an average of weights, torch.compile, unequal use of parameters, and refusals."""
    strategy = FSDP2Strategy().start(precision="fp32", device="cpu")
    assert strategy.start() is strategy
    model = AutoModelForCausalLM.from_pretrained(folder, strategy)
    average = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = full(model.lm_head.weight)
    compiled = torch.compile(model, backend="eager")
    mine = ROWS[strategy.dp_rank :: strategy.dp_size]
    scaler.scale(compiled(input_ids=mine, labels=mine).loss).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    for name, parameter in model.named_parameters():
        average[name].lerp_(parameter.detach(), 0.5)
    after, averaged = full(model.lm_head.weight), full(average["lm_head.weight"])
    told = {}
    for name, call in {
        "megatron": lambda: AutoModelForCausalLM.from_pretrained(folder, "megatron_fsdp").train()(input_ids=ROWS),
        "sizes": lambda: AutoModelForCausalLM.from_pretrained(folder, "fsdp2:tp=3"),
        "name": lambda: AutoModelForCausalLM.from_pretrained(folder, "fsdp3"),
        "object": lambda: AutoModelForCausalLM.from_pretrained(folder, 3),
        "trainer's": lambda: AutoModelForCausalLM.from_pretrained(folder, Trainer(logger=False).strategy),
        "device": lambda: AutoModelForCausalLM.from_pretrained(folder, strategy, device="cpu"),
        "variant": lambda: model.save_pretrained(folder / "x", variant="fp16"),
        "peft": lambda: with_peft(AutoModelForCausalLM.from_pretrained(folder, strategy)),
        "peft, cut": lambda: with_peft(AutoModelForCausalLM.from_pretrained(folder, "fsdp2:tp=2")),
        "only transformers": lambda: AutoModelForCausalLM.from_pretrained(folder, strategy, device_map="auto"),
    }.items():
        with pytest.raises(ValueError, match=r".") as error:
            call()
        told[name] = str(error.value)
    strategy.stop()
    assert not strategy.has_started
    return {"before": before, "after": after, "averaged": averaged, "told": told}


WORDS = {
    "megatron": "NVIDIA GPUs only", "sizes": "tp=3", "name": "Did you mean 'fsdp2'", "object": "no layout",
    "trainer's": "belongs to a Trainer", "device": "leave out device=", "variant": "variant= is not honoured",
    "only transformers": "places", "peft": "give lora=LoRAConfig(…)", "peft, cut": "came into the model after it was",
}  # fmt: skip


def test_tools_of_torch_and_refusals(pool: RankPool, bases: Path) -> None:
    start = plain(bases / "dense")
    start(input_ids=ROWS, labels=ROWS).loss.backward()
    step = start.lm_head.weight.detach() - 0.1 * start.lm_head.weight.grad
    for seen in pool.run(2, other_tools, bases / "dense"):
        close(seen["after"], step, terms=ROWS.numel())
        close(seen["averaged"], (seen["before"] + seen["after"]) / 2)
        for name, words in WORDS.items():
            assert words in seen["told"][name], seen["told"]
    with pytest.raises(ValueError, match=r"not for Fabric: call FSDP2Strategy\(…\)\.start\(\), load the model"):
        lightning.fabric.Fabric(strategy=FSDP2Strategy())  # the way that it names: docs/own_loop.md


def test_push_to_hub_uploads_once(bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(bases / "dense", lora=LORA)
    sent: list[set[str]] = []

    def upload(folder_path: Path, **kwargs: Any) -> None:
        sent.append({file.name for file in Path(folder_path).iterdir()})

    class Repository:
        repo_id = "org/name"

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *args, **kwargs: Repository())
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda self, **kwargs: upload(**kwargs))
    model.save_pretrained(tmp_path / "name", push_to_hub=True)
    assert sent == [{"adapter_config.json", "adapter_model.safetensors"}]
    again = copy.deepcopy(model)
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "adapter_model.safetensors").is_file()
    save_by_export(again)
