"""Everything that the project uses of torchft (0.2.0): a manager that meets the other groups and sums over them."""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from automodel_trainer.strategies.fault_tolerant.lifeline import Lifeline

LIGHTHOUSE = "TORCHFT_LIGHTHOUSE"  # torchft's own variable
_PATIENCE = 30.0  # seconds: the lighthouse may start a little later than the groups
_START = "torchft_lighthouse --bind '[::]:29510' --min_replicas 1 --join_timeout_ms 60000"
_RETRIES = 1000  # of a question to the lighthouse, within the time that a group waits: it may be started again


def require_torchft() -> None:
    """Raise ValueError if torchft is not installed."""
    if importlib.util.find_spec("torchft") is None:
        raise ValueError(
            "fault_tolerant=true needs torchft, which is not installed: pip install 'automodel-trainer[ft]'. Or leave "
            "fault_tolerant out: torchrun then restarts the whole job from its last checkpoint."
        )


def lighthouse_address(given: str | None) -> str:
    """The lighthouse's address, as torchft takes it.

    Raises:
        ValueError: none is given, or it is no address.
    """
    address = given or os.environ.get(LIGHTHOUSE)
    if not address:
        raise ValueError(
            "fault_tolerant=true needs the address of a lighthouse, which all replica groups know: "
            f"strategy='hsdp:fault_tolerant=true,lighthouse=http://HOST:29510', or {LIGHTHOUSE}. Start one with: "
            f"{_START}"
        )
    address = address if "://" in address else f"http://{address}"
    try:
        found = urlsplit(address)
        known = found.hostname is not None and found.port is not None
    except ValueError:
        known = False
    if not known:
        raise ValueError(f"lighthouse={given or address!r} is no address. Write http://HOST:PORT.")
    return address


def require_lighthouse(address: str, patience: float = _PATIENCE) -> None:
    """Wait until something listens at the address.

    Raises:
        ValueError: nothing does.
    """
    place = urlsplit(address)
    end = time.monotonic() + patience
    while True:
        try:
            socket.create_connection((place.hostname, place.port), timeout=5).close()  # type: ignore[arg-type]
        except OSError as error:
            if time.monotonic() < end:
                time.sleep(0.5)
                continue
            raise ValueError(
                f"No lighthouse answers at {address} ({error}; waited {patience:g} s). Start it once, on a machine "
                f"that all groups reach: {_START}. Then give its address: lighthouse=http://HOST:29510."
            ) from error
        return


class Peers:
    """The replica groups of a run as one rank of one group sees them.

    Rank r of each group works together with rank r of the others: it holds the same shards.

    Args:
        lighthouse: its address.
        rank: of this process in its group.
        ranks: the size of a group; all groups have the same.
        store: the host and port of a store of this group.
        device: where the summed tensors lie. On CUDA NCCL sums them, else gloo.
        timeout: seconds that a sum waits for a group that is alive but slow.
        quorum_timeout: seconds to wait for the other groups before a step.
        load: takes the state of another group, if this one comes late.
    """

    def __init__(
        self,
        *,
        lighthouse: str,
        rank: int,
        ranks: int,
        store: tuple[str, int],
        device: torch.device,
        timeout: float,
        quorum_timeout: float,
        load: Callable[[dict[str, Any]], None],
    ) -> None:
        _keep_quiet()
        os.environ.setdefault("TORCH_NCCL_NONBLOCKING_TIMEOUT", str(timeout))  # torchft warns where it is missing
        from torchft import Manager, ProcessGroupGloo, ProcessGroupNCCL

        from automodel_trainer.strategies.fault_tolerant._transport import Transport

        self._transport = Transport(timedelta(seconds=timeout))
        kind = ProcessGroupNCCL if device.type == "cuda" else ProcessGroupGloo
        self._manager = Manager(
            pg=kind(timeout=timedelta(seconds=timeout)),
            load_state_dict=load,
            state_dict=dict,  # `give` brings it
            checkpoint_transport=self._transport,
            min_replica_size=1,  # `FaultTolerantStrategy` has its own, with a message
            use_async_quorum=False,
            timeout=timedelta(seconds=timeout),
            quorum_timeout=timedelta(seconds=quorum_timeout),
            connect_timeout=timedelta(seconds=_PATIENCE),
            rank=rank,
            world_size=ranks,
            store_addr=store[0],
            store_port=store[1],
            lighthouse_addr=lighthouse,
            hostname=store[0],
            quorum_retries=_RETRIES,
        )
        self._device = device
        self._watched = -1  # the quorum
        self._before = 0  # steps at the last meeting
        self._lifeline = Lifeline(store[0], self._manager._pg.abort)

    def begin_at(self, step: int) -> None:
        """Say how many steps this group has behind it."""
        self._manager.load_state_dict({"step": step, "batches_committed": 0})

    @property
    def step(self) -> int:
        """The steps that this group has behind it, those that it was given included."""
        return self._manager.current_step()

    def meet(self, timeout: float) -> tuple[int, int]:
        """Wait for the groups that take part in the next step; a group that is behind is given the state of another.

        Args:
            timeout: seconds to wait.

        Returns:
            the place of this group among them, and their number.

        Raises:
            TimeoutError: no quorum came about.
        """
        self._transport.begin_quorum()
        self._before = self.step
        try:
            self._manager.start_quorum(timeout=timedelta(seconds=timeout))
        except TimeoutError:
            raise
        except RuntimeError as error:  # torchft raises the errors of its channel so
            raise TimeoutError(str(error)) from error
        return self._manager.participating_rank() or 0, self._manager.num_participants()

    @property
    def asked(self) -> bool:
        """Whether a late group waits for the state of this rank. Then `give` it, before anything is summed."""
        return self._transport.asked

    def give(self, message: dict[str, Any]) -> None:
        """Let late groups have a message: what of the state is not sent apart. On a CPU its tensors must be copies."""
        self._transport.give(message)

    @property
    def gives(self) -> bool:
        """Whether late groups wait for tensors of this rank."""
        return bool(self._transport.readers)

    def send(self, tensors: Sequence[Tensor]) -> None:
        """Send tensors to the late groups that were given a message; they are free at the end. See `failed`."""
        from automodel_trainer.strategies.fault_tolerant._transport import send

        with self._noting_errors():
            send(self._manager._pg, tensors, self._transport.readers)

    @contextmanager
    def receiving(self) -> Iterator[Callable[[Tensor], None]]:
        """A context that yields a function, which fills a contiguous tensor with the next one that is sent here.

        What is lost ends the context, and no error comes of it. See `failed`.
        """
        from automodel_trainer.strategies.fault_tolerant._transport import receive

        source = self._transport.source
        assert source is not None
        with self._noting_errors():
            yield lambda tensor: receive(self._manager._pg, tensor, source)

    @contextmanager
    def _noting_errors(self) -> Iterator[None]:
        """A context whose errors of the process group are those of this step."""
        try:
            yield
            if (error := self._manager._pg.errored()) is not None:  # it waits for the device
                raise error
        except ValueError:  # of ours
            raise
        except Exception as error:
            self._manager.report_error(error)

    def fall_back(self) -> None:
        """Take back that this group was given a state in the last meeting."""
        if self.step != self._before:
            self.begin_at(self._before)

    @property
    def others_changed(self) -> bool:
        """Whether the groups are others than those that are watched; the same on all ranks of a group."""
        return self._manager._quorum_id != self._watched

    def watch(self, place: int, groups: int) -> None:
        """Tell the other groups where this process is found, and hold a connection to each of theirs."""
        self._watched = self._manager._quorum_id
        table = torch.zeros(groups, 2, dtype=torch.int64, device=self._device)
        table[place] = torch.tensor(self._lifeline.address)
        self.add_up(table)
        if not self.failed:
            found: list[list[int]] = table.tolist()
            self._lifeline.watch([(number, port) for at, (number, port) in enumerate(found) if at != place])

    def add_up(self, tensor: Tensor) -> None:
        """Sum `tensor` `[…]` in place over the groups. If one is lost, no error comes, but `failed` says so."""
        self._manager.allreduce(tensor, reduce_op=dist.ReduceOp.SUM).wait()

    @property
    def failed(self) -> bool:
        """Whether something of this step was lost."""
        return self._manager.errored() is not None

    @property
    def why(self) -> str:
        """What was lost first, in a line; "" if nothing was."""
        error = self._manager.errored()
        return "" if error is None else f"{error.original_exception}".partition("\n")[0][:120]

    def commit(self) -> bool:
        """Whether all ranks of this group have the whole step. Collective over the group."""
        return self._manager.should_commit()

    def leave(self) -> None:
        """Stop answering the others."""
        self._lifeline.cut()
        with suppress(Exception):
            self._manager.shutdown(wait=False)


def _keep_quiet() -> None:
    """Silence what torchft says in every step. It reads `RUST_LOG` when it is imported."""
    os.environ.setdefault("RUST_LOG", "error")
    # Of tensors in a message, which are copied before anything is written.
    warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
    logger = logging.getLogger("torchft")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.CRITICAL)  # errors of a lost group come with tracebacks; the strategy says it in a line


def host_towards(lighthouse: str) -> str:
    """The name under which other groups reach this machine: as torchft has it, the machine's own name."""
    host = urlsplit(lighthouse).hostname or ""
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        rank_zero_info(f"This machine's name {name!r} has no address, so other groups are told {host!r}.")
        return host
    return name
