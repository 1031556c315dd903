"""The token cache: tokenized samples on disk, written once and read by every rank and every later run.

There is one folder per key under `~/.cache/automodel_trainer` (or `$AMT_CACHE`), in the Arrow format of `datasets`.
It is safe to delete at any time: the next run builds it again.
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

from automodel_trainer.data.arrow_rows import NO_SPACE, no_space
from automodel_trainer.data.locked_folder import lock_in
from automodel_trainer.data.sources import quiet

FORMAT_VERSION = 2
"""Part of every key. Increase it when the same rows and settings give other tokens or columns than before."""


_RULES = ("normalizer", "pre_tokenizer", "post_processor", "special_tokens", "settings")


def cache_root() -> Path:
    """The folder of all caches: `$AMT_CACHE`, or `~/.cache/automodel_trainer` if that is not set."""
    return Path(os.environ.get("AMT_CACHE") or "~/.cache/automodel_trainer").expanduser()


def cache_key(data: str, tokenizer: Any, settings: dict[str, Any]) -> str:
    """The name of a cache: a hash of the data's fingerprint, the tokenizer's content and the settings.

    Args:
        data: fingerprint of the data.
        tokenizer: the tokenizer; see `tokenizer_content`.
        settings: every other value that the samples depend on.
    """
    parts = [FORMAT_VERSION, data, tokenizer_content(tokenizer), settings]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def tokenizer_content(tokenizer: Any) -> dict[str, Any]:
    """Everything that determines a tokenizer's output, including its chat template, but not where it came from."""
    content = {
        "class": type(tokenizer).__name__,
        "chat_template": tokenizer.chat_template,
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    }
    if getattr(tokenizer, "is_fast", False):
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        # Each call sets padding and truncation anew, so the tokens of a sample do not depend on them.
        content["backend"] = {key: value for key, value in backend.items() if key not in ("padding", "truncation")}
    else:
        content["vocab"] = tokenizer.get_vocab()
        content["settings"] = {key: str(value) for key, value in tokenizer.init_kwargs.items()}
    return content


def tokenizer_rules(tokenizer: Any) -> dict[str, str]:
    """How a tokenizer cuts texts, beside its vocabulary and its chat template."""
    content = tokenizer_content(tokenizer)
    rules = {**content.pop("backend", {}), **content}
    return {key: json.dumps(value, sort_keys=True) for key, value in rules.items() if key in _RULES}


def load_or_build(key: str, build: Callable[[Path], Dataset]) -> Dataset:
    """Load the cached data set for `key`, or build it first.

    Many processes may call this at once: one builds under a file lock, the others wait and then read. A cache gets its
    final name only when it is complete, so a killed run leaves nothing that a later run could mistake for a cache.

    Args:
        key: name of the cache, see `cache_key`.
        build: builds the data set. It gets an empty folder for temporary files, which is deleted afterwards.
    """
    folder = cache_root() / key
    if not folder.is_dir():
        wanted = folder.parent
        root, lock = lock_in(
            wanted,
            key,
            lambda error, temporary: (
                f"The token cache {wanted} cannot be written ({error}): tokens are kept in {temporary} for this "
                "run only. Set AMT_CACHE to a folder that can be written, or cache=False to keep them in memory."
            ),
        )
        folder = root / key
        with lock:
            if not folder.is_dir():
                _write(folder, build)
    dataset = load_from_disk(str(folder))
    assert isinstance(dataset, Dataset)
    return dataset


def _write(folder: Path, build: Callable[[Path], Dataset]) -> None:
    for left_over in folder.parent.glob(f"{folder.name}.tmp*"):  # we hold the lock, so these are of a killed run
        shutil.rmtree(left_over, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.tmp", dir=folder.parent, ignore_cleanup_errors=True) as tmp:
        scratch, done = Path(tmp, "scratch"), Path(tmp, "done")
        scratch.mkdir()
        try:
            samples = build(scratch)
            with quiet():
                samples.save_to_disk(str(done))
        except OSError as error:
            if error.errno in NO_SPACE:
                raise ValueError(no_space(folder.parent, "tokens", "AMT_CACHE")) from error
            raise
        os.replace(done, folder)
