"""Work spread over a few processes, none of which outlives the one that started them."""

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from components.errors import Busy, UserError

Part = TypeVar("Part")
Result = TypeVar("Result")


def spread(
    make: Callable[[], Callable[[Part], Result]], parts: Sequence[Part], workers: int, died: str
) -> Iterator[Result]:
    """Yield the result of each part, in the parts' order.

    make: called once in each process, gives the function of a part; what takes long to load is
    loaded there. With one worker or one part that is this process; otherwise `make`, parts and
    results are pickled on their way to new processes and back.
    died: the sentence for the user when a process ends by itself.

    Raises:
        UserError: a process died. Whatever `make` or its function raises comes through, and the
            parts that have not begun are given up.
    """
    workers = min(workers, len(parts))
    if workers <= 1:
        function = make()
        for part in parts:
            yield function(part)
        return
    # Forked children of a process with threads (torch, onnxruntime) can hang: start anew.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin, (os.getpid(), make))
    try:
        with pool:
            futures = [pool.submit(_work, part) for part in parts]
            try:
                for future in futures:
                    yield future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    except BrokenProcessPool as problem:
        raise UserError(died) from problem


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Inside, PyTorch's operations use one thread.

    Small ones gain nothing from more; beside other work the threads wait for one another, and
    the critic took three times the CPU seconds.
    """
    import torch  # which curation's processes do not need

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_child: dict[str, Callable[..., Any]] = {}  # in a process of the pool: what it makes and made


def _begin(parent: int, make: Callable[[], Callable[[Any], Any]]) -> None:
    _child["make"] = make
    end_with(parent)


def _leave() -> None:
    os._exit(1)


def end_with(parent: int, end: Callable[[], None] = _leave) -> None:
    """End this process soon after process `parent`, its parent: a killed run leaves none."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        end()

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def only_one(file: Path, what: str) -> Iterator[None]:
    """Hold `file` while the block runs; it is gone afterwards, or was left by a killed process.

    Raises:
        Busy: another process holds it: it is at `what`.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    while True:
        held = file.open("a+")
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held.seek(0)
            who = held.read() or "another process"
            held.close()
            raise Busy(
                f"{what} is being run by {who}: wait for it, its result is taken from the cache "
                f"then, or stop it and run the same command again."
            ) from None
        # Whoever had it may have removed it between the two calls.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(held.fileno()), file.stat()):
                break
        held.close()
    try:
        held.truncate(0)
        held.write(f"process {os.getpid()} in {Path.cwd()}")
        held.flush()
        yield
    finally:
        file.unlink(missing_ok=True)
        held.close()


def occupied() -> set[Path]:
    """The folders in which processes of this machine work, of those that may be asked."""
    import psutil  # which a stage on a bare machine does not need

    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            found.add(Path(process.cwd()))
    return found


def launched() -> tuple[int, int] | None:
    """Rank and number of the processes where torchrun (or its like) started this one, else None."""
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return None
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def _work(part: Any) -> Any:
    # Not in _begin: an error there would reach the parent as no more than a dead process.
    if "function" not in _child:
        _child["function"] = _child["make"]()
    return _child["function"](part)
