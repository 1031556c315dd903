"""The token cache: tokenised samples on disk, written once and read by every rank and every later run.

A folder per key under `~/.cache/automodel_trainer` (`AMT_CACHE` names another place), in the arrow format of
`datasets`. Delete it at any time: it is only ever rebuilt.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk
from filelock import FileLock

from automodel_trainer.data.sources import quiet

FORMAT_VERSION = 1
"""Raise it when the same rows and settings would give other tokens or other columns than before."""


def cache_root() -> Path:
    """The folder of all caches: `$AMT_CACHE`, else `~/.cache/automodel_trainer`."""
    return Path(os.environ.get("AMT_CACHE") or "~/.cache/automodel_trainer").expanduser()


def cache_key(data: str, tokenizer: Any, settings: dict[str, Any]) -> str:
    """The name of a cache: a hash of the data's fingerprint, the tokenizer's content and the settings."""
    parts = [FORMAT_VERSION, data, tokenizer_content(tokenizer), settings]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def tokenizer_content(tokenizer: Any) -> dict[str, Any]:
    """What decides the tokens a tokenizer makes, its chat template included, wherever it was loaded from."""
    content = {
        "class": type(tokenizer).__name__,
        "chat_template": tokenizer.chat_template,
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    }
    if getattr(tokenizer, "is_fast", False):
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        # Padding and truncation are switched on and off by each call; the tokens of a sample do not depend on them.
        content["backend"] = {key: value for key, value in backend.items() if key not in ("padding", "truncation")}
    else:
        content["vocab"] = tokenizer.get_vocab()
        content["settings"] = {key: str(value) for key, value in tokenizer.init_kwargs.items()}
    return content


def load_or_build(key: str, build: Callable[[Path], Dataset]) -> Dataset:
    """The cached data set of that key, built first if there is none.

    Safe to call from many processes at once: one builds under a file lock, the others wait for it and read. What is
    half written never has the final name, so a killed run leaves nothing that a later one could take for a cache.

    Args:
        key: the name of the cache, see `cache_key`.
        build: makes the data set; it gets an empty folder for files of its own, gone when it is done.
    """
    folder = cache_root() / key
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                _write(folder, build)
    dataset = load_from_disk(str(folder))
    assert isinstance(dataset, Dataset)
    return dataset


def _write(folder: Path, build: Callable[[Path], Dataset]) -> None:
    for left_over in folder.parent.glob(f"{folder.name}.tmp*"):  # of a run that was killed: we hold the lock
        shutil.rmtree(left_over, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.tmp", dir=folder.parent, ignore_cleanup_errors=True) as tmp:
        scratch, done = Path(tmp, "scratch"), Path(tmp, "done")
        scratch.mkdir()
        samples = build(scratch)
        with quiet():
            samples.save_to_disk(str(done))
        os.replace(done, folder)
