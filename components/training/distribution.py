"""Processes that train one model together: torchrun's, or those that a stage starts itself.

Under torchrun (docs/scale-out.md) every process runs the stage and meets the others here. Without
it the stage starts its own processes: on a CPU, one thread each, because small operations gain
nothing from a pool of threads inside them, and threads of one process wait for the interpreter.
What the processes do with the model is in components/training/engine.py.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from components.errors import UserError
from components.processes import end_with, launched, one_thread


@dataclass(frozen=True)
class Team:
    """This process's place among those that train together. Rank 0 saves and reports."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"  # where this process computes

    @property
    def leads(self) -> bool:
        """Whether this process saves and reports."""
        return self.rank == 0

    def sum(self, values: Tensor) -> None:
        """Replace a tensor by its sum over the team; every process gets the same bits."""
        if self.size > 1:
            dist.all_reduce(values)

    def agree(self, number: int) -> int:
        """Rank 0's whole number, in every process; all of them come here before one leaves."""
        if self.size == 1:
            return number
        value = torch.tensor([number], device=self.device)
        dist.broadcast(value, 0)
        return int(value)


def room(workers: int) -> tuple[int, int]:
    """How many processes will share a batch, and how many bytes each of them may take."""
    started = launched()
    if torch.cuda.is_available():
        return started[1] if started else 1, torch.cuda.mem_get_info()[0]
    processes = started[1] if started else workers
    return processes, psutil.virtual_memory().available // processes


@contextmanager
def team(workers: int, peer: Callable[..., Any], *arguments: Any) -> Iterator[Team]:
    """This process's place in the team.

    Under torchrun that is the team which torchrun started, and `workers` and `peer` are not used.
    Otherwise this process is rank 0 of as many as `workers` on a CPU, or alone on a GPU; the
    others run `peer(team, *arguments)`: a function of a module, arguments that can be pickled.
    They end when rank 0 is gone. Raises UserError when one of them dies.
    """
    gpu = torch.cuda.is_available()
    torch.set_flush_denormal(True)  # numbers below 1e-38 take a hundred times as long
    try:
        if launched() is not None:
            with _launched_team() as place:
                yield place
        elif gpu or workers == 1:
            yield Team(device="cuda" if gpu else "cpu")
        else:
            with one_thread(), _own_team(workers, peer, arguments) as place:
                yield place
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        torch.set_flush_denormal(False)


@contextmanager
def _launched_team() -> Iterator[Team]:
    device = "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    # Where to meet, rank and size come from torchrun's environment.
    dist.init_process_group("gloo" if device == "cpu" else "nccl")
    yield Team(dist.get_rank(), dist.get_world_size(), device)


@contextmanager
def _own_team(size: int, peer: Callable[..., Any], arguments: tuple[Any, ...]) -> Iterator[Team]:
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        context = get_context("spawn")
        peers = [
            context.Process(
                target=_run_peer,
                args=(Team(rank, size), meeting, os.getpid(), peer, arguments),
                daemon=True,
            )
            for rank in range(1, size)
        ]
        try:
            for process in peers:
                process.start()
            _meet(Team(0, size), meeting)
            yield Team(0, size)
        except RuntimeError as error:
            for process in peers:
                process.join(timeout=1)
            dead = [process.exitcode for process in peers if process.exitcode]
            if not dead:
                raise
            raise UserError(
                f"A training process ended with exit code {dead[0]} (out of memory?): start the "
                "stage again, it goes on from its last snapshot; training.workers in params/ "
                "sets how many processes there are."
            ) from error
        finally:
            for process in peers:
                process.terminate()
                process.join()


def _meet(place: Team, meeting: str) -> None:
    # The processes talk over the loopback interface only.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=place.rank, world_size=place.size
    )


def _run_peer(
    place: Team,
    meeting: str,
    parent: int,
    peer: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    end_with(parent)
    torch.set_flush_denormal(True)
    with one_thread():
        _meet(place, meeting)
        try:
            peer(place, *arguments)
        except UserError:
            pass  # rank 0 meets the same mistake and says it
        except RuntimeError as error:
            if "onnection" not in str(error):  # rank 0 has gone, with or without a word
                raise
        finally:
            dist.destroy_process_group()
