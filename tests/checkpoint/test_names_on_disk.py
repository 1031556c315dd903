"""A sharded model reads and writes the names of the Hub: FSDP2 gives it another class, by which transformers goes."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from automodel_trainer.auto import AutoModelForCausalLM, AutoModelForImageTextToText
from automodel_trainer.checkpoint.export import export_pretrained
from tests.pool import RankPool
from tests.tiny import tiny_model
from tests.vlm.families import model_of

KINDS = {"llava": AutoModelForImageTextToText, "gpt_neox": AutoModelForCausalLM}


def through(root: Path) -> list[str]:
    """Each model, sharded and saved. Returns the names of their classes."""
    kinds = []
    for name, auto in KINDS.items():
        model = auto.from_pretrained(root / name, strategy="fsdp2")
        export_pretrained(model, root / f"{name} saved")
        kinds.append(type(model).__name__)
    return kinds


def test_names_are_those_of_the_hub(pool: RankPool, tmp_path: Path) -> None:
    model_of("llava").save_pretrained(tmp_path / "llava")
    tiny_model("gpt_neox").save_pretrained(tmp_path / "gpt_neox")
    for kinds in pool.run(2, through, tmp_path):
        assert kinds == ["FSDPLlavaForConditionalGeneration", "FSDPGPTNeoXForCausalLM"]
    for name, own in (("llava", "language_model.lm_head.weight"), ("gpt_neox", "embed_out.weight")):
        want, got = (load_file(tmp_path / f"{name}{part}" / "model.safetensors") for part in ("", " saved"))
        assert own in want
        assert got.keys() == want.keys()
        assert all(got[key].equal(tensor) for key, tensor in want.items()), name
