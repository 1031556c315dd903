"""The base of all data modules: batch sizes, this rank's share, preparation, loaders and the summary."""

from __future__ import annotations

import os
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

from datasets import DatasetDict
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from automodel_trainer.data.batches import MicroBatch
from automodel_trainer.data.global_batch import GlobalBatch
from automodel_trainer.data.loader import MicroBatchLoader
from automodel_trainer.data.mixture import MixtureRows, Source, named_splits, parse_sources
from automodel_trainer.data.option_checks import check_global_batch, check_whole
from automodel_trainer.data.preview import Preview
from automodel_trainer.data.rows import Rows, SampleRows
from automodel_trainer.data.sizes import check_positions, check_tokens


class TrainLoader(Protocol):
    """A sized loader with the state that Lightning saves. It yields lists of micro-batches.

    Attributes:
        batches_yielded: global batches yielded so far in this epoch (in a stream, since its start).
    """

    batches_yielded: int

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[list[MicroBatch]]: ...

    def state_dict(self) -> dict[str, Any]:
        """The position in the data."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position."""
        ...


class MicroBatchDataModule(LightningDataModule):
    """A data module that yields one list of micro-batches per optimizer step: this rank's share of a global batch.

    It also works without a Trainer: call `dm.setup("fit")`, then iterate over `dm.train_dataloader()`.

    Args:
        tokenizer: a tokenizer, or a path to load one from. None: the Trainer sets the model's.
        seq_len: tokens per row.
        micro_batch_size: rows per forward pass on one rank.
        global_batch_size: rows per optimizer step over all ranks. None: one micro-batch on each data-parallel rank,
            times the Trainer's accumulation.
        seed: determines the order of the rows in each epoch.
        num_workers: processes that build micro-batches ahead of time.
        drop_last: drop the last global batch of an epoch if it is incomplete, instead of filling it up.

    Attributes:
        packing: whether several documents share a row (packed micro-batches instead of padded ones). "auto": where the
            model keeps them apart, which `choose_packing` is told; without a model they do.
        rows_hold_documents: rows can hold several documents.
        rows: the rows of each split, once `prepare` was called.
        positions: how many positions the model has, once `check_sizes` was called; None: no limit.

    Raises:
        ValueError: a size is too small.
    """

    packing: bool | Literal["auto"] = "auto"
    rows_hold_documents: bool = True
    labels_are_tokens: bool = True  # of the micro-batches: the ids of `input_ids` themselves, as next-token loss has it

    def __init__(
        self,
        *,
        tokenizer: Any = None,
        seq_len: int = 2048,
        micro_batch_size: int = 1,
        global_batch_size: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__()
        check_whole("micro_batch_size", micro_batch_size, 1)
        if global_batch_size is not None:
            check_whole("global_batch_size", global_batch_size, 1)
        check_whole("num_workers", num_workers, 0)
        check_whole("seed", seed, 0)
        check_whole("seq_len", seq_len, 0)
        if seq_len < 2:
            raise ValueError(f"seq_len={seq_len} must be at least 2: a token and the next one, which it predicts.")
        self.tokenizer = tokenizer
        self.seq_len = seq_len
        self.micro_batch_size = micro_batch_size
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.drop_last = drop_last
        self.rows: dict[str, Rows] = {}
        self.positions: int | None = None
        self._prepared = False
        self._source: str | None = None
        self._obstacle: str | None = None
        self._train_loader: TrainLoader | None = None
        self._train_state: dict[str, Any] | None = None

    @abstractmethod
    def build_rows(self) -> dict[str, Rows]:
        """Read, tokenize and pack the data.

        Returns:
            The rows of "train" (unless streamed), and of "validation" and "test" if there are any.
        """

    def training_rows(
        self, train: Any, temperature: float, build: Callable[[Any], dict[str, Rows]], seed: int
    ) -> dict[str, Rows]:
        """The rows of `train`, which may be a mixture: "train", and "validation" and "test", whole or by name.

        Args:
            train: a source, or a list of `{path, weight, epochs, name}`.
            temperature: see `MixtureRows`.
            build: makes the rows of one source: "train", and perhaps "validation" and "test".
            seed: see `MixtureRows`.
        """
        sources = parse_sources(train)
        if sources is None:
            return build(train)
        parts = [self._rows_of_source(source, build) for source in sources]
        rows: dict[str, Rows] = {"train": MixtureRows(sources, [part["train"] for part in parts], temperature, seed)}
        for source, part in zip(sources, parts):
            rows.update({f"{split}/{source.name}": part[split] for split in ("validation", "test") if split in part})
        return rows

    def _rows_of_source(self, source: Source, build: Callable[[Any], dict[str, Rows]]) -> dict[str, Rows]:
        """The rows of one source of a mixture; its name stands in warnings and errors."""
        self._source = source.name
        try:
            return build(source.path)
        except ValueError as error:
            if self.called("train") in str(error):
                raise
            raise ValueError(f"{self.called('train')}: {error}") from error
        finally:
            self._source = None

    def called(self, split: str) -> str:
        """What messages call a split: with the name of the source of a mixture whose rows are made."""
        return split if self._source is None else f"{split}/{self._source}"

    def evaluation_rows(self, split: str, data: Any, build: Callable[[str, Any], Rows]) -> dict[str, Rows]:
        """The rows of a split: of one set, or of several by name (`{name: data}`)."""
        if isinstance(data, dict) and not isinstance(data, DatasetDict):  # which holds splits, one of them this
            return {f"{split}/{name}": build(f"{split}/{name}", part) for name, part in data.items()}
        return {split: build(split, data)}

    def prepare(self) -> None:
        """Read, tokenize and pack the data once. Every rank calls this before the process group exists.

        Raises:
            ValueError: the data cannot be used for training. The message says why.
        """
        if self._prepared:
            return
        self.rows = self.build_rows()
        self._prepared = True
        for split in self._copies_of_train():
            rank_zero_info(f"{split} has the samples of the training data: its loss shows what is learned by heart.")
        rank_zero_info(self.summary())

    def _copies_of_train(self) -> list[str]:
        """Evaluation sets with the samples of the training set, in the same order."""
        stores = {name: rows.store for name, rows in self.rows.items() if isinstance(rows, SampleRows)}
        train = stores.pop("train", None)
        if train is None:
            return []
        return [name for name, store in stores.items() if store is not train and store.looks_like(train)]

    def check_sizes(self, vocabulary: int | None, positions: int | None, rotary: bool) -> None:
        """Compare the prepared data with the sizes of a model.

        Args:
            vocabulary: the number of token ids that the model embeds; None: unknown.
            positions: the number of positions that it has; None: no limit.
            rotary: whether the positions are rotary, so that the model can be told that it has more.

        Raises:
            ValueError: the data has a token or a position that the model lacks. The message names it.
        """
        self.positions = positions
        for split, rows in self.rows.items():
            if vocabulary is not None:
                tokenizer = None if isinstance(self.tokenizer, str | os.PathLike) else self.tokenizer
                check_tokens(split, rows, vocabulary, tokenizer)
            if positions is not None:
                check_positions(split, rows, positions, rotary)

    @property
    def packs(self) -> bool:
        """Whether several documents share a row."""
        return self.packing is True or (self.packing == "auto" and self._obstacle is None)

    @property
    def packing_obstacle(self) -> str | None:
        """Why documents do not share a row although `packing` is "auto"; None if they do, or nothing was said."""
        return self._obstacle if self.packing == "auto" else None

    def choose_packing(self, obstacle: str | None) -> None:
        """Pack documents, or pad them, as the model allows. Rows that were made otherwise are made anew.

        Args:
            obstacle: why the model cannot keep the documents of a row apart; None: it can.

        Raises:
            ValueError: it cannot, and `packing` is True.
        """
        if not self.rows_hold_documents:
            return
        if self.packing is True and obstacle is not None:
            raise ValueError(
                f"packing=True puts several documents into a row, and this model cannot keep them apart: {obstacle}. "
                "Set packing='auto' or packing=False: one document a row, padded, and rows of similar length together."
            )
        before = self.packs
        self._obstacle = obstacle
        if self.packs != before and self._prepared:
            self.rows, self._prepared = {}, False

    def setup(self, stage: str | None = None) -> None:
        """Prepare the data if that was not done yet, and check that the batch sizes fit this layout.

        Raises:
            ValueError: `global_batch_size` does not fit, or `drop_last` leaves no batch.
        """
        self.prepare()
        size = self.rows_per_step
        if "train" in self.rows and self.steps_per_epoch == 0:
            raise ValueError(
                f"drop_last leaves nothing to train on: the data has {len(self.rows['train'])} rows, and a global "
                f"batch needs {size}. Lower global_batch_size or set drop_last=False."
            )

    def summary(self) -> str:
        """A description of the data, one line per split."""
        lines = []
        for split, rows in self.rows.items():
            lines.append(f"{split}: {rows.stats.describe()}")
            if isinstance(rows, MixtureRows):
                lines += [f"  {line}" for line in rows.describe_shares()]
        return "\n".join(lines)

    @property
    def source_names(self) -> list[str]:
        """The names of the sources of a mixture, in the order of the micro-batches' `sources`; empty for another."""
        rows = self.rows.get("train")
        return [source.name for source in rows.sources] if isinstance(rows, MixtureRows) else []

    def describe_shares(self) -> list[str]:
        """A line for each source of a mixture: its share of the tokens, and what upsampling that means."""
        rows = self.rows.get("train")
        return rows.describe_shares() if isinstance(rows, MixtureRows) else []

    @property
    def dp_rank(self) -> int:
        """This rank's index among the data-parallel ranks (those that see different data)."""
        return self._data_parallel()[0]

    @property
    def dp_size(self) -> int:
        """The number of data-parallel ranks."""
        return self._data_parallel()[1]

    @property
    def replicas(self) -> int:
        """The number of replica groups that come and go, if the strategy has such; else 1."""
        return getattr(getattr(self.trainer, "strategy", None), "replicas", 1)

    @property
    def rows_per_step(self) -> int:
        """Rows per optimizer step over all ranks.

        Raises:
            ValueError: `global_batch_size` is not a multiple of `micro_batch_size * dp_size`, or contradicts the
                Trainer's accumulation.
        """
        unit = self.micro_batch_size * self.dp_size * self.replicas
        accumulation = getattr(self.trainer, "micro_batches_per_step", 1)
        if self.global_batch_size is None:
            return unit * accumulation
        check_global_batch(self.global_batch_size, self.micro_batch_size, self.dp_size * self.replicas)
        if accumulation not in (1, self.global_batch_size // unit):
            raise ValueError(
                f"accumulate_grad_batches={accumulation} makes {unit * accumulation} rows per step (times "
                f"micro_batch_size={self.micro_batch_size} and dp_size={unit // self.micro_batch_size}), but "
                f"global_batch_size is {self.global_batch_size}. Set only one of the two."
            )
        return self.global_batch_size

    @property
    def steps_per_epoch(self) -> int:
        """Global batches per training epoch: the number of optimizer steps."""
        self.prepare()
        full, rest = divmod(len(self._rows_of("train")), self.rows_per_step)
        return full + (1 if rest and not self.drop_last else 0)

    def train_dataloader(self) -> TrainLoader:
        """The loader of the training rows. On resume it starts at the checkpoint's position."""
        self._train_loader = self.build_train_loader()
        if self._train_state is not None:
            self._train_loader.load_state_dict(self._train_state)
            self._train_state = None
        return self._train_loader

    def state_dict(self) -> dict[str, Any]:
        """The position in the training data.

        Lightning also saves the state of the loader. But it does not restore it from a checkpoint that was written at
        the end of an epoch, or if the loader was created before the checkpoint was read.
        """
        return {} if self._train_loader is None else {"train_loader": self._train_loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the position in the training data, now or when the loader is created."""
        state, loader = state_dict.get("train_loader"), self._train_loader
        if state is not None and loader is not None and loader.batches_yielded == 0:
            loader.load_state_dict(state)
        else:
            self._train_state = state

    def forget_position(self) -> None:
        """Begin with the first row again, whatever position was restored."""
        self._train_state = None
        if self._train_loader is not None:
            self._train_loader = None

    def build_train_loader(self) -> TrainLoader:
        """A loader that starts at the beginning of the Trainer's current epoch."""
        trainer = self.trainer
        # We do not use Lightning's `current_epoch`: it is one behind while a checkpoint from the end of an epoch loads.
        progress: Any = None if trainer is None else trainer.fit_loop.epoch_progress.current
        return MicroBatchLoader(
            self._rows_of("train"),
            global_batch_size=self.rows_per_step,
            seed=self.seed,
            epoch=0 if progress is None else progress.processed,
            shuffle=not getattr(trainer, "overfit_batches", 0),  # it repeats the same batches in every epoch
            drop_last=self.drop_last,
            num_workers=self.num_workers,
            limit=self._limit(),
            deals_late=self.replicas > 1,
            **self._layout(),
        )

    def val_dataloader(self) -> Any:
        """The loader of the validation rows, or one by name for each set; an empty list without validation data."""
        if self._has("validation"):
            return self._evaluation_loaders("validation")
        # Lightning skips validation if there is no loader. Its warning about that is noise.
        warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
        return []

    def test_dataloader(self) -> Any:
        """The loader of the test rows, or one by name for each set.

        Raises:
            ValueError: there is no test data.
        """
        return self._evaluation_loaders("test")

    def predict_dataloader(self) -> Any:
        """The loader of the test rows, or of the validation rows if there are none.

        Raises:
            ValueError: there is neither.
        """
        return self._evaluation_loaders("test" if self._has("test") else "validation")

    def first_batch(self, split: str = "train") -> list[MicroBatch]:
        """The first list of micro-batches that this rank gets, for previews."""
        self.setup("fit")
        loader = self.build_train_loader() if split == "train" else self._evaluation_loader(split)
        batch = next(iter(loader))
        if isinstance(batch, GlobalBatch):
            batch.deal(self.dp_rank, self.dp_size * self.replicas)
        return batch

    def preview(self, rows: int = 1, split: str = "train") -> Preview:
        """The first batch with what of it is trained, to be looked at: in colour in a notebook, as text by `print`.

        `Trainer.preview` packs as a model needs it, and gives the data the model's tokenizer.

        Args:
            rows: the number of rows to show.
            split: `train`, `validation` or `test`.

        Raises:
            ValueError: there is no tokenizer, or no data for this split, or `rows` is less than 1.
        """
        batch = self.first_batch(split)
        return Preview(batch, self.load_tokenizer(), rows, self.pictures_of if split == "train" else None)

    @property
    def pictures_of(self) -> Callable[[int], Sequence[Any]] | None:
        """The pictures (PIL) of a row that is trained on, by its number; None: rows have none, or several sources."""
        return getattr(self.rows.get("train"), "pictures_of", None)

    def pad_id(self) -> int:
        """Token id for padding. Any id works, because padding is neither attended to nor trained."""
        ids = (getattr(self.tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
        return next((i for i in ids if isinstance(i, int)), 0)

    def load_tokenizer(self) -> Any:
        """The tokenizer, loaded first if a path was given.

        Raises:
            ValueError: there is no tokenizer.
        """
        if isinstance(self.tokenizer, str | os.PathLike):
            from transformers import AutoTokenizer

            self.tokenizer = AutoTokenizer.from_pretrained(self.tokenizer)
        if self.tokenizer is None:
            raise ValueError(
                f"{type(self).__name__} has no tokenizer: pass `tokenizer=`, or use the data module with a Trainer "
                f"and a module that has one."
            )
        return self.tokenizer

    def _has(self, split: str) -> bool:
        return split in self.rows or bool(named_splits(self.rows, split))

    def _evaluation_loaders(self, split: str) -> Any:
        """The loader of a split, or one by name for each of its sets."""
        if named := named_splits(self.rows, split):
            return {name: self._evaluation_loader(key) for name, key in named.items()}
        return self._evaluation_loader(split)

    def _evaluation_loader(self, split: str) -> MicroBatchLoader:
        # One micro-batch per step: evaluation does not accumulate, and a short last batch needs few filler rows.
        size = self.micro_batch_size * self.dp_size
        layout = self._layout()
        return MicroBatchLoader(
            self._rows_of(split), global_batch_size=size, shuffle=False, num_workers=self.num_workers, **layout
        )

    def _layout(self) -> dict[str, Any]:
        return {
            "micro_batch_size": self.micro_batch_size,
            "dp_rank": self.dp_rank,
            "dp_size": self.dp_size,
            "packed": self.packs,
            "pad_id": self.pad_id(),
            "positions": self.positions,
        }

    def _rows_of(self, split: str) -> Rows:
        if split not in self.rows:
            raise ValueError(
                f"{type(self).__name__} has no {split} data, only {sorted(self.rows) or 'none yet'}. Give it {split}="
                " data, or call setup() first."
            )
        return self.rows[split]

    def _limit(self) -> int | None:
        """Batches per epoch allowed by the Trainer's `limit_train_batches`; None for all."""
        limit = getattr(self.trainer, "limit_train_batches", None)
        return int(limit * self.steps_per_epoch) if isinstance(limit, float) else limit

    def _data_parallel(self) -> tuple[int, int]:
        trainer = self.trainer
        if trainer is None:
            return 0, 1
        strategy: Any = trainer.strategy
        if hasattr(strategy, "dp_rank"):
            return strategy.dp_rank, strategy.dp_size
        # Lightning's own strategies give the same facts as arguments for a sampler.
        replicas = trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        return replicas["rank"], replicas["num_replicas"]
