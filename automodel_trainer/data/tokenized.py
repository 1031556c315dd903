"""TokenDataModule: pre-training on tokens that were prepared before."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from automodel_trainer.data.base import MicroBatchDataModule
from automodel_trainer.data.mixture import check_temperature
from automodel_trainer.data.option_checks import check_packing
from automodel_trainer.data.rows import Rows, StreamRows, digest
from automodel_trainer.data.token_files import TokenFile, parse_split

_SPLITS = ("train", "validation", "test")


class TokenDataModule(MicroBatchDataModule):
    """Files of tokens for pre-training: Megatron's `.bin` with `.idx`, or a plain `.bin` of nanoGPT or llm.c.

    Documents are laid end to end and cut into rows of `seq_len` tokens, as in `TextDataModule`. They do not attend to
    each other. Files are memory-mapped, so a corpus of any size is ready at once. `amt tokenize` writes them.

    Args:
        train: a `.bin` file, a Megatron prefix, a folder of shards, or a blend `[{path, weight, name}, …]`.
        validation: the same, for validation, or several by name (`{name: path}`). None: the part that `split` gives.
        split: shares of the documents of `train` for training, validation and test, in Megatron's form ("969,30,1").
        tokenizer: a tokenizer or the path of one, for previews. None: the model's. It was applied already.
        seq_len: tokens per row.
        micro_batch_size: rows per forward pass on one rank.
        global_batch_size: rows per optimizer step over all ranks. None: one micro-batch on each data-parallel rank,
            times the Trainer's accumulation.
        packing: lay documents end to end; they do not attend to each other. False: a row holds tokens of one document.
            "auto": lay them end to end if the model can keep them apart.
        document_end: id of the token that ends a document in a plain file; "eos": the tokenizer's; None: the documents
            of a plain file are not told apart.
        token_dtype: of a plain file without a header: `uint16` or `uint32`. None: uint16; a file that looks like wider
            tokens is refused.
        seed: determines the order of the rows in each epoch.
        num_workers: processes that build micro-batches ahead of time.
        drop_last: drop the last global batch of an epoch if it is incomplete, instead of filling it up.
        temperature: of a blend: shares are weight ^ (1 / temperature).

    Raises:
        ValueError: a file is missing or damaged, or an option has a bad value.
    """

    def __init__(
        self,
        train: str | Any,
        validation: str | Any | None = None,
        *,
        split: str = "1",
        tokenizer: str | Any | None = None,
        seq_len: int = 2048,
        micro_batch_size: int = 1,
        global_batch_size: int | None = None,
        packing: bool | Literal["auto"] = "auto",
        document_end: int | str | None = "eos",
        token_dtype: str | None = None,
        seed: int = 0,
        num_workers: int = 0,
        drop_last: bool = False,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(
            tokenizer=tokenizer,
            seq_len=seq_len,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            seed=seed,
            num_workers=num_workers,
            drop_last=drop_last,
        )
        if token_dtype not in (None, "uint16", "uint32"):
            raise ValueError(f"token_dtype={token_dtype!r} is unknown. Allowed: 'uint16', 'uint32', or null.")
        if isinstance(document_end, str) and document_end != "eos":
            raise ValueError(f"document_end={document_end!r} is unknown. Allowed: a token id, 'eos', or null.")
        check_packing(packing)
        self.packing = packing
        self.shares = parse_split(split)
        if validation is not None and self.shares[1]:
            raise ValueError(f"validation and split={split!r} are both given: set only one of them.")
        self.train, self.validation, self.split = train, validation, split
        self.document_end, self.token_dtype = document_end, token_dtype
        self.temperature = check_temperature(temperature)

    def build_rows(self) -> dict[str, Rows]:
        """Map the files and cut them into rows.

        Raises:
            ValueError: a file is missing or damaged, or a split has no document.
        """
        if not self.shares[0]:
            raise ValueError(f"split={self.split!r} leaves nothing for training. The first number must be above 0.")
        rows = self.training_rows(self.train, self.temperature, self._split_rows, self.seed)
        if self.validation is not None:
            rows.update(self.evaluation_rows("validation", self.validation, lambda split, data: self._whole(data)))
        return rows

    def _split_rows(self, source: Any) -> dict[str, Rows]:
        files = self._open(source)
        rows: dict[str, Rows] = {}
        begin = 0.0
        for split, share in zip(_SPLITS, self.shares):
            parts = [file.pieces_of(*_range(file.documents, begin, begin + share)) for file in files]
            begin += share
            if share and (not any(map(len, parts))):
                count = sum(file.documents for file in files)
                raise ValueError(
                    f"split={self.split!r} leaves no document of {source} for {split}: it has {count:,} in "
                    f"{len(files)} file(s). Give {split} a larger share or 0, or more documents (document_end tells "
                    "those of a plain file apart)."
                )
            if share:
                rows[split] = self._rows(files, parts, split)
        return rows

    def _whole(self, source: Any) -> Rows:
        files = self._open(source)
        return self._rows(files, [file.pieces_of(0, file.documents) for file in files], "whole")

    def _rows(self, files: list[TokenFile], pieces: list[np.ndarray], split: str) -> Rows:
        store = _Joined(files)
        chosen = np.concatenate([part + start for part, start in zip(pieces, store.starts)])
        key = digest(*(file.fingerprint for file in files), split, self.split, self.seq_len, self.packs)
        return StreamRows(store, chosen, self.seq_len, key, self.packs)  # type: ignore[arg-type]

    def _open(self, source: Any) -> list[TokenFile]:
        path = Path(source).expanduser()
        names = sorted(str(file) for file in path.glob("*.bin")) if path.is_dir() else [str(path)]
        if not names:
            raise ValueError(f"{path} holds no .bin file. Give a file, a prefix, or a folder of shards.")
        end = self.document_end
        if end == "eos":
            end = getattr(self.load_tokenizer(), "eos_token_id", None) if self.tokenizer is not None else None
        return [TokenFile(name, end if isinstance(end, int) else None, self.token_dtype) for name in names]


class _Joined:
    """Several files as one store."""

    def __init__(self, files: list[TokenFile]) -> None:
        self.files = files
        self.starts = np.concatenate([[0], np.cumsum([len(file) for file in files])])[:-1]
        self.lengths = np.concatenate([file.lengths for file in files])
        documents = np.concatenate([[0], np.cumsum([file.documents for file in files])])
        self.sample_ids = np.concatenate([file.sample_ids + start for file, start in zip(files, documents)])

    def highest(self) -> tuple[int, int]:
        """The highest token id, and a document that has it."""
        return max(file.highest() for file in self.files)

    def fetch(self, indices: list[int]) -> list[Any]:
        """The pieces with these indices; their sample ids count over all files."""
        owners = np.searchsorted(self.starts, indices, side="right") - 1
        found = []
        for owner, index in zip(owners, indices):
            piece = self.files[owner].fetch([index - int(self.starts[owner])])[0]
            found.append(piece._replace(sample_id=int(self.sample_ids[index])))
        return found


def _range(documents: int, begin: float, end: float) -> tuple[int, int]:
    return round(begin * documents), round(end * documents)
