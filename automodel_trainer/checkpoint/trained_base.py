"""Tell whether a base model is the one that the adapter of a checkpoint was trained on."""

from __future__ import annotations

from pathlib import Path

from automodel_trainer.checkpoint.settings import BASE
from automodel_trainer.checkpoint.state import RUN_KEY, read_lightning_state
from automodel_trainer.models.files import weight_fingerprint


def other_base(adapter: Path, base: Path) -> str | None:
    """What to say of a base with other weights than the adapter was trained on; None if they are the same.

    Also None where it cannot be known: the adapter lies outside of a checkpoint, or the base has no files.

    Args:
        adapter: the folder of an adapter, in a checkpoint or elsewhere.
        base: the folder of a model.
    """
    if not (adapter.parent / "trainer.json").is_file():
        return None
    then = read_lightning_state(adapter.parent).get(RUN_KEY, {}).get("settings", {}).get(BASE)
    now = weight_fingerprint(base)
    if then is None or now is None or then == now:
        return None
    return f"the weights in {base} are others than those that the adapter in {adapter} was trained on"
