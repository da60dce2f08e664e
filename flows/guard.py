"""Runs a command that ends soon after the process that asked for it: `python -m flows.guard …`.

A flow or `make serve` that is killed cannot end what it started. This small process stands
between: it leads the command's process group, and ends the group once its own parent is gone.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

PATIENCE = 20  # seconds that a command gets to end by itself (a stage writes its snapshot)
ENDS = (signal.SIGTERM, signal.SIGINT)
EVERY = 0.5  # seconds between two looks at the parent


def guarded(command: Sequence[str]) -> list[str]:
    """The command line that runs `command` under guard; start it in a session of its own."""
    return [sys.executable, "-m", "flows.guard", str(os.getpid()), *command]


def _others() -> bool:
    """Whether a process besides this one is in its group."""
    import psutil  # needed only at the end: the guard stays small

    own = os.getpgrp()
    for process in psutil.process_iter(["status"]):
        try:
            same = os.getpgid(process.pid) == own and process.pid != os.getpid()
        except ProcessLookupError:
            continue
        if same and process.info["status"] != psutil.STATUS_ZOMBIE:
            return True
    return False


def main(parent: int, command: Sequence[str]) -> int:
    """Run the command; returns its exit code, ends by its signal, or ends the whole group."""
    # A signal to the group is for the command. Not SIG_IGN, which the command would inherit.
    for number in ENDS:
        signal.signal(number, lambda number, frame: None)
    child = subprocess.Popen(command)
    while os.getppid() == parent:
        try:
            code = child.wait(EVERY)
            if code < 0:
                if -code in ENDS:
                    signal.signal(-code, signal.SIG_DFL)
                os.kill(os.getpid(), -code)
            return code
        except subprocess.TimeoutExpired:
            continue
    os.killpg(0, signal.SIGTERM)
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        child.poll()  # else it stays a zombie of the group
        if not _others():
            return 128 + signal.SIGTERM
        time.sleep(0.1)
    os.killpg(0, signal.SIGKILL)
    return 128 + signal.SIGKILL


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
