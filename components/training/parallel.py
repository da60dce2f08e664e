"""Data parallelism: the processes that train one model together.

Every process has the whole model and takes an equal part of each batch; gradients are averaged
by torch.distributed. On a CPU, processes of one thread each, because small operations gain
nothing from a pool of threads inside them, and threads of one process wait for the interpreter.
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

import torch
import torch.distributed as dist
from torch import Tensor

from components.errors import UserError
from components.processes import end_with


@dataclass(frozen=True)
class Team:
    """This process's place among those that train together. Rank 0 saves and reports."""

    rank: int = 0
    size: int = 1

    def sum(self, values: Tensor) -> None:
        """Replace a tensor by its sum over the team; every process gets the same bits."""
        if self.size > 1:
            dist.all_reduce(values)


@contextmanager
def team(size: int, peer: Callable[..., Any], *arguments: Any) -> Iterator[Team]:
    """This process as rank 0 of `size`; the others run `peer(team, *arguments)`.

    `peer` is a function of a module, its arguments can be pickled. A peer ends when rank 0 is
    gone. Raises UserError when one of them dies.
    """
    threads = torch.get_num_threads()
    if size > 1:
        torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # numbers below 1e-38 take a hundred times as long
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
            if size > 1:
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
            if dist.is_initialized():
                dist.destroy_process_group()
            torch.set_flush_denormal(False)
            torch.set_num_threads(threads)


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
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
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


class FlatGradients:
    """All gradients of a model as one vector, so that one message carries them."""

    def __init__(self, parameters: list[torch.nn.Parameter], extra: int = 0) -> None:
        """`extra` numbers ride behind the gradients, at the end of `values`."""
        count = sum(p.numel() for p in parameters)
        self.values = torch.zeros(count + extra, device=parameters[0].device)
        self.gradients, self.extra = self.values[:count], self.values[count:]
        start = 0
        for p in parameters:
            p.grad = self.gradients[start : start + p.numel()].view_as(p)
            start += p.numel()
