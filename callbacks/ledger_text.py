"""The text of the ledger."""

from __future__ import annotations

from typing import Any

from automodel_trainer.callbacks.console import Row
from automodel_trainer.models.kernels.attention import attention_text
from automodel_trainer.nn.text import listed
from automodel_trainer.nn.tiles import TILE

Facts = dict[str, Any]
_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
MEMORY = (("parameters", "model"), ("gradients", "gradients"), ("optimizer state", "optimizer"))


def ledger_rows(facts: Facts) -> list[Row]:
    """The lines of the ledger, in reading order.

    Args:
        facts: model, gradients, optimizer and run; see `ledger_facts.py`.
    """
    model, gradients, run = facts["model"], facts["gradients"], facts["run"]
    rows = [
        ("model", model["class"] + (f" from {model['source']}" if model["source"] else "")),
        ("parameters", _parameters(model)),
        ("per device", ", ".join(f"{name} {_memory(facts[key]['bytes'])}" for name, key in MEMORY)),
    ]
    if model.get("frozen_parts"):
        rows.append(("frozen", model["frozen_parts"]))
    if idle := model.get("idle"):
        rows.append(("frozen", f"{len(idle)} parameters that no forward reaches: {listed(idle, 3)}"))
    if model["lora"]:
        rows.append(("adapters", model["lora"]))
    if model["tied"] or model["untied"]:
        rows.append(("tied weights", "; ".join([*model["tied"], *(f"⚠ {pair}" for pair in model["untied"])])))
    rows += [("gradients", text) for text in _gradients(gradients)]
    if model.get("read_dense"):
        rows.append(("checkpoint", f"its weights are quantized ({model['read_dense']}); they were read as dense ones"))
    if model["fp8"]:
        rows.append(("fp8", model["fp8"]))
    if model["attention"]:
        rows.append(("attention", ", ".join(map(attention_text, model["attention"]))))
    if model.get("experts"):
        rows.append(("experts", model["experts"]))
    if model["kernels"]:
        rows.append(("kernels", "; ".join(f"{name}: {text}" for name, text in model["kernels"].items())))
    if model.get("kernel_costs"):
        rows.append(("kernel costs", "; ".join(f"{name}: {text}" for name, text in model["kernel_costs"].items())))
    rows += [
        ("layout", _layout(run)),
        *_pipeline(run.get("pipeline")),
        ("batch", batch_text(run["batch"])),
        ("optimizer", _optimizer(facts["optimizer"])),
        *_left_out(facts["optimizer"]["left_out"]),
        ("steps", _steps(run)),
        ("data", run["data"]),
        *([("rows", run["rows"])] if run.get("rows") else []),
        ("checkpoints", run["checkpoints"] or "off"),
    ]
    if run.get("resumed"):
        rows += _resumed(run["resumed"])
    if run.get("returned"):
        rows.append(("replica group", f"is back among the others: {run['returned']}"))
    if run.get("allocator"):  # only on a GPU
        rows.append(("memory", _allocation(run)))
    if run.get("budget"):
        rows.append(("memory budget", f"{run['budget']['given']} chose {run['budget']['text']}"))
    if run.get("bytes_per_block") is not None:
        mode = run["activation_checkpointing"]
        how = f" with activation checkpointing {mode}" if mode else ""
        rows.append(("activations", f"a block keeps {memory_text(run['bytes_per_block'])} until its backward{how}"))
    if run.get("offloaded"):
        rows.append(("host memory", _offloaded(run["offloaded"])))
    if run.get("watchdog"):
        rows.append(("watchdog", f"ends the run if a rank hangs for {run['watchdog']:g} s or disappears"))
    return rows


_TAKES = {"all": "goes on from", "data": "goes on, with new data, from", "weights": "begins with the weights of"}


def _resumed(resumed: Facts) -> list[Row]:
    rows = [("resume", f"{_TAKES[resumed['takes']]} {resumed['checkpoint']} (step {resumed['step']:,})")]
    changed = resumed["rows"] or ["nothing"]
    return [*rows, ("changed", changed[0]), *(("", text) for text in changed[1:])]


def _allocation(run: Facts) -> str:
    every = run.get("garbage_collection")
    garbage = f"garbage collected every {every} steps, on all ranks at once" if every else "garbage collected by Python"
    return f"{run['allocator']}; {garbage}"


def _offloaded(host: Facts) -> str:
    results = host.get("results", "none")  # runs of before kept none
    what = "inputs of blocks" + ("" if results == "none" else f" and {results} results of attention")
    over = [how for how, said in (("stays on the device", "full"), ("is computed again", "again")) if host.get(said)]
    more = f", and what is over {' or '.join(over)}" if over else ""
    return f"{what} take {memory_text(host['bytes'])} of at most {memory_text(host['limit'])}{more}"


def batch_text(batch: Facts) -> str:
    """Batch sizes as text, for example `micro 2 × accumulation 4 × dp 8 = global 64 rows, ≤ 131,072 tokens`."""
    arithmetic = f"micro {batch['micro']} × accumulation {batch['accumulation']} × dp {batch['dp']}"
    tokens = f", ≤ {batch['tokens']:,} tokens" if batch["tokens"] else ""
    return f"{arithmetic} = global {batch['global']:,} rows{tokens}"


def memory_text(count: float) -> str:
    """A number of bytes as MiB or GiB."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def _parameters(model: Facts) -> str:
    share = model["trained"] / max(1, model["trained"] + model["frozen"])
    percent = f"{share:.0%}" if share in (0, 1) else f"{share:.2%}"
    return f"{model['trained']:,} trained ({percent}), {model['frozen']:,} frozen"


def _memory(sizes: dict[str, int]) -> str:
    return " + ".join(f"{_SHORT.get(dtype, dtype)} {memory_text(size)}" for dtype, size in sizes.items()) or "none"


def _gradients(gradients: Facts) -> list[str]:
    missing, zero = gradients["missing"], gradients["all_zero"]
    lines = [f"⚠ none for {len(missing)} of {gradients['tensors']}: {listed(missing, 3)}"] if missing else []
    if zero:
        lines.append(f"⚠ all zero for {len(zero)} of {gradients['tensors']}: {listed(zero, 3)}")
    return lines or [f"all {gradients['tensors']} trained tensors have one"]


def _layout(run: Facts) -> str:
    mesh = " × ".join(f"{name} {size}" for name, size in run["mesh"].items())
    parts = [f"{run['strategy']} ({mesh})" if mesh else run["strategy"], f"{run['world_size']} × {run['device']}"]
    parts.append(f"precision {run['precision']}")
    if run["activation_checkpointing"]:
        parts.append(f"activation checkpointing {run['activation_checkpointing']}")
    if tiled := run.get("tiled"):
        how = f"tiles of {TILE:,} tokens" if tiled["tiles"] == "auto" else f"{tiled['tiles']} tiles"
        parts.append(f"{tiled['mlps']} MLPs in {how}")
    if run["compile"]:
        options = [f"{name}={value}" for name, value in (run["compile_options"] or {}).items()]
        parts.append(f"blocks compiled ({', '.join([run['compile'], *options])})")
    return ", ".join(parts)


def _pipeline(pipeline: Facts | None) -> list[Row]:
    """The pipeline schedule and its picture, one line per rank."""
    if not pipeline:
        return []
    layers = " + ".join(map(str, pipeline["layers"]))
    text = f"{pipeline['schedule']}, layers {layers}, predicted bubble {pipeline['bubble']:.1%}"
    return [("pipeline", text), *(("", line) for line in (*pipeline["picture"], pipeline["legend"]))]


def _optimizer(optimizer: Facts) -> str:
    name = optimizer["class"] + " (fused)" * optimizer["fused"]
    schedule = f", schedule {optimizer['schedule']}" if optimizer["schedule"] else ""
    return f"{name}, lr {optimizer['lr']:g}, weight decay {optimizer['weight_decay']:g}{schedule}"


def _left_out(names: list[str]) -> list[Row]:
    return [("not optimized", f"⚠ {len(names)} trainable: {listed(names, 3)}")] if names else []


def _steps(run: Facts) -> str:
    planned = f"{run['steps']:,} planned" if run["steps"] else "until the data ends"
    epochs = run["max_epochs"]
    known = [f"{run['steps_per_epoch']:,} per epoch"] if run["steps_per_epoch"] else []
    if epochs is not None and epochs > 0:
        known.append(f"at most {epochs} epoch" + "s" * (epochs > 1))
    return planned + (f" ({', '.join(known)})" if known else "")
