"""Write docs/models.md: what works for every family of transformers that AutoModelForCausalLM builds.

python docs/model_matrix.py                                      # hours on two cores
python docs/model_matrix.py --jobs 16                            # 16 families side by side
python docs/model_matrix.py --minutes 5                          # stops early with exit code 3; run it again to go on
python docs/model_matrix.py --families llama mamba2 --columns packed "tp=2" --again

Configs are made by script: the config class's own defaults, a small table of corrections, and `small_copy`. Every
family runs in a process of its own, every cell has a time limit. Results are kept as JSON lines beside the page.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tests

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from automodel_trainer import CausalLMModule, Trainer
from automodel_trainer.callbacks import Ledger
from automodel_trainer.models.lora import LoRAConfig
from automodel_trainer.models.small_copy import ordinary_tokens, small_copy
from automodel_trainer.strategies import FSDP2Strategy
from automodel_trainer.verification.ranks import Processes
from automodel_trainer.verification.verify import verify
from tests.tiny import tiny_tokenizer

Cell = dict[str, str]
PAGE = Path(__file__).with_name("models.md")
RESULTS = Path(__file__).with_name("models.jsonl")
START, END = "<!-- table -->", "<!-- end of table -->"
LIMIT = 150  # seconds a cell
UNFINISHED = 3
CORRECTIONS: dict[str, dict[str, Any]] = {
    # Defaults that transformers itself cannot build or run.
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "deepseek_v2": {"num_experts_per_tok": 2, "moe_intermediate_size": 1408},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    # Defaults that do not show what the family is.
    "lfm2": {"layer_types": ["conv", "full_attention"] * 16},
    # Encoders by default.
    **{
        name: {"is_decoder": True}
        for name in (
            "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
            "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta",
            "xlm-roberta-xl",
        )
    },
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
}  # fmt: skip


def tiny(family: str) -> PreTrainedConfig:
    """A small config of a family, with a layer of each kind."""
    config = AutoConfig.for_model(family, **CORRECTIONS.get(family, {}))
    small = small_copy(config, "AutoModelForCausalLM", vocab_size=264)
    if small.config_class is not type(config):
        raise ValueError(f"{type(small).__name__} is built of a part of its config, which no auto class knows")
    return small.config


def module_of(config: PreTrainedConfig, **options: Any) -> CausalLMModule:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    return CausalLMModule(model, tokenizer=tiny_tokenizer(), **options)


def rows(config: PreTrainedConfig, packed: bool) -> list[list[dict[str, Any]]]:
    """Eight micro-batches of one row: documents that share it, or one with padding."""
    generator, tokens = torch.Generator().manual_seed(0), ordinary_tokens(config)
    found = []
    for index in range(8):
        ids = tokens[torch.randint(len(tokens), (1, 32), generator=generator)]
        labels, places = ids.clone(), torch.arange(32)[None]
        row = {"input_ids": ids, "labels": labels}
        if packed:
            cut = 9 + index
            labels[:, cut] = -100
            row["position_ids"] = torch.cat([places[:, :cut], places[:, : 32 - cut]], dim=1)
        else:
            labels[:, 32 - index :] = -100
            row |= {"position_ids": places, "attention_mask": (places < 32 - index).long(), "packed": False}
        found.append([row])
    return found


def against_one_device(strategy: Any, devices: int, **options: Any) -> Callable[[PreTrainedConfig], Cell]:
    """Three steps on a layout against plain torch on one device: the largest error."""

    def run(config: PreTrainedConfig) -> Cell:
        module = module_of(config, **options)
        packed = module.isolation.packed == "positions"
        report = verify(module, rows(config, packed), strategy, devices, length=32, launch=Processes("fork", LIMIT))
        worst = max(quantity.error for quantity in report.quantities)
        if report.passed:
            return {"text": f"{worst:.0e}"}
        return {"text": f"**{worst:.0e}**", "note": "; ".join(report.findings), "kind": "bug"}

    return run


def packed_alone(config: PreTrainedConfig) -> Cell:
    """How far a packed document is from the document alone; padded where the model cannot be packed."""
    found = module_of(config).isolation
    if found.padded_obstacle or not found.checked:
        return {"text": "refused", "note": str(found.padded_obstacle or found.packed_obstacle)}
    if found.causal_obstacle:
        return {"text": "refused", "note": found.causal_obstacle}
    if found.packed is None:
        return {"text": "padded", "note": str(found.packed_obstacle)}
    return {"text": f"{found.error:.0e}"}


_loaded: dict[str, tuple[CausalLMModule, PreTrainedModel]] = {}


def saved_and_loaded(config: PreTrainedConfig) -> tuple[CausalLMModule, PreTrainedModel]:
    """A module after one step, and its model as transformers loads it from the folder that the Trainer saved."""
    key = str(config)
    if key not in _loaded:
        _loaded[key] = _save_and_load(config)
    return _loaded[key]


def _save_and_load(config: PreTrainedConfig) -> tuple[CausalLMModule, PreTrainedModel]:
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    module = CausalLMModule(model, tokenizer=tiny_tokenizer())
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_progress_bar", "enable_checkpointing"), False)
    quiet["callbacks"] = [Ledger(allow=["no_grad"])]  # some families have parts that a loss on tokens never reaches
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(default_root_dir=folder, max_steps=1, accelerator="cpu", devices=1, precision="fp32", **quiet)
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.fit(module, rows(config, module.isolation.packed == "positions"))
        module.model.eval()
        saved = trainer.save_pretrained(Path(folder) / "saved")
        return module, AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).eval()


def export(config: PreTrainedConfig) -> Cell:
    """Trained, saved, and loaded by transformers: how far the logits are apart."""
    ours, reloaded = saved_and_loaded(config)
    ids = ordinary_tokens(config)[:20][None]
    with torch.no_grad():
        got, wanted = (model(input_ids=ids, use_cache=False).logits for model in (ours.model, reloaded))
    return _number(float((got - wanted).abs().max() / wanted.std()), 1e-4)


def generate(config: PreTrainedConfig) -> Cell:
    """Greedy answers of the trained model that differ from those of the same weights in plain transformers."""
    ours, reloaded = saved_and_loaded(config)
    ids = ordinary_tokens(config)[:12][None]
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    try:
        wanted = reloaded.generate(ids, **options)
    except Exception as error:
        return {"text": "—", "note": f"transformers' own generate fails: {_said(error)}", "kind": "transformers"}
    return _number(float((ours.generate(ids, **options) != wanted).sum()), 0.5)


def _number(error: float, allowed: float) -> Cell:
    text = f"{error:.0e}" if error else "0"
    return {"text": text} if error <= allowed else {"text": f"**{text}**", "kind": "bug"}


# The last two run a backward pass in the process itself, and no rank may be forked after that.
COLUMNS: dict[str, Callable[[PreTrainedConfig], Cell]] = {
    "packed": packed_alone,
    "trains": against_one_device("fsdp2", 1),
    "tp=2": against_one_device("fsdp2:tp=2", 2),
    "cp=2": against_one_device("fsdp2:cp=2", 2),
    "pp=2": against_one_device("3d:pp=2", 2),
    "LoRA": against_one_device("fsdp2", 1, lora=LoRAConfig(rank=4)),
    "compile": against_one_device(FSDP2Strategy(compile=True, compile_backend="aot_eager"), 1),
    "export": export,
    "generate": generate,
}


def families() -> list[str]:
    """Every model type that AutoModelForCausalLM builds."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def measure(family: str, columns: Sequence[str], limit: float = LIMIT) -> dict[str, Cell]:
    """The cells of a family, in a process that a crash or a time limit ends, and another one for what is left."""
    found: dict[str, Cell] = {}
    while left := [column for column in COLUMNS if column in columns and column not in found]:
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_cells, args=(family, left, sender))
        process.start()
        sender.close()
        for column in left:
            cell = _received(receiver, process, limit)
            found[column] = cell
            if cell["kind"] == "config":  # the other columns would only say it again
                found |= dict.fromkeys(left, cell)
            if cell["kind"] == "config" or cell.pop("ended", False):
                break
        _end(process)
    return found


def _received(receiver: Any, process: Any, limit: float) -> Any:
    if not receiver.poll(limit):
        return {"text": "**bug**", "note": f"no answer in {limit:g} s", "kind": "bug", "ended": True}
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        note = f"the process died with exit code {process.exitcode}"
        return {"text": "**bug**", "note": note, "kind": "bug", "ended": True}


def _cells(family: str, columns: Sequence[str], sender: Any) -> None:
    os.setsid()  # so that ranks end with this process
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    try:
        config = tiny(family)
    except Exception as error:
        sender.send({"text": "—", "note": f"no small copy: {_said(error)}", "kind": "config"})
        return
    for column in columns:
        sender.send(_cell(config, column))


def _cell(config: PreTrainedConfig, column: str) -> Cell:
    try:
        return {"kind": "right", **COLUMNS[column](config)}
    except ValueError as error:
        if _ours(error):
            return {"text": "refused", "note": _said(error), "kind": "refused"}
        return {"text": "**bug**", "note": _said(error), "kind": "bug"}
    except Exception as error:
        return {"text": "**bug**", "note": _said(error), "kind": "bug"}


def _ours(error: BaseException) -> bool:
    """Whether a ValueError is raised by this project's code: a refusal in words."""
    told = error.__cause__ if isinstance(error.__cause__, RuntimeError) else None  # of a rank, with its traceback
    frames = traceback.extract_tb(error.__traceback__)
    last = str(told).rstrip().rpartition('  File "')[2] if told else frames[-1].filename
    return "automodel_trainer" in last or "/strategies/" in last or "/callbacks/" in last


def _said(error: BaseException) -> str:
    """The error in one line; of a rank, which sends its traceback, the first error in it."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, ValueError):
        return lines[0]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\w*: ", line)]
    return raised[0][:300] if raised else f"{type(error).__name__}: {lines[0]}"[:300]


def _end(process: Any) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.join()


def load(path: Path) -> dict[tuple[str, str], Cell]:
    """Results that are kept, by family and column; the last one of each counts."""
    lines = path.read_text().splitlines() if path.is_file() else []
    records = [json.loads(line) for line in lines]
    return {(r["family"], r["column"]): r["cell"] for r in records}


def write_page(results: dict[tuple[str, str], Cell]) -> None:
    """The table, its totals and its notes."""
    notes: dict[str, int] = {}
    titles = " | ".join(f"`{column}`" if "=" in column else column for column in COLUMNS)
    rule = "| --- " * (len(COLUMNS) + 1) + "|"
    lines = [f"| family | {titles} |", rule]
    totals: dict[str, Counter[str]] = {column: Counter() for column in COLUMNS}
    for family in families():
        cells = []
        for column in COLUMNS:
            cell = results.get((family, column), {"text": "not run", "kind": "not run"})
            totals[column][cell["text"] if cell["text"] in ("refused", "padded") else cell.get("kind", "right")] += 1
            note = cell.get("note")
            cells.append(cell["text"] + (f" ({notes.setdefault(note, len(notes) + 1)})" if note else ""))
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    kinds = ("right", "padded", "refused", "transformers", "bug", "config", "not run")
    head = [f"| cells | {titles} |", rule]
    head += [f"| {kind} | " + " | ".join(str(totals[c][kind]) for c in COLUMNS) + " |" for kind in kinds]
    said = [f"{number}. {' '.join(n.split()).replace('|', '/').replace('<', '&lt;')}" for n, number in notes.items()]
    before, _, rest = PAGE.read_text().partition(START)
    text = "\n".join([*head, "", *lines, "", *said])
    PAGE.write_text(before + START + "\n" + text + "\n" + END + rest.partition(END)[2])


def _measure_all(left: dict[str, list[str]], args: argparse.Namespace) -> bool:
    """Measure families, several side by side, and keep each result as it comes. False if time ran out."""
    end = time.monotonic() + 60 * args.minutes
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("fork")) as pool:
        running = {pool.submit(_measure_before, end, family, columns): family for family, columns in left.items()}
        done = [_keep(args.file, running[future], future.result()) for future in as_completed(running)]
    return all(done)


def _measure_before(end: float, family: str, columns: Sequence[str]) -> dict[str, Cell] | None:
    return measure(family, columns) if time.monotonic() < end else None


def _keep(path: Path, family: str, cells: dict[str, Cell] | None) -> bool:
    with path.open("a") as file:
        for column, cell in (cells or {}).items():
            file.write(json.dumps({"family": family, "column": column, "cell": cell}) + "\n")
            print(f"{family}, {column}: {cell}", flush=True)
    return cells is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="*", default=families(), help="all by default")
    parser.add_argument("--columns", nargs="*", default=list(COLUMNS), help=f"of {', '.join(COLUMNS)}")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this time, with exit code 3")
    parser.add_argument("--jobs", type=int, default=1, help="families measured side by side")
    parser.add_argument("--again", action="store_true", help="also cells that are there")
    parser.add_argument("--file", type=Path, default=RESULTS, help="where results are kept")
    args = parser.parse_args()
    results = load(args.file)
    left = {family: [c for c in args.columns if args.again or (family, c) not in results] for family in args.families}
    complete = _measure_all({f: columns for f, columns in left.items() if columns}, args)
    results = load(args.file)
    if args.file == RESULTS:
        write_page(results)
    bugs = [key for key, cell in results.items() if cell.get("kind") == "bug"]
    print(f"{len(results)} cells; bugs: {bugs or 'none'}")
    sys.exit(UNFINISHED if not complete else int(bool(bugs)))


if __name__ == "__main__":
    main()
