"""Results as JSON lines, one by one: a run that is cut goes on where it was."""

import json
import math
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from components.files import atomic_file

OUT_OF_MEMORY = "out of memory"


class Results:
    """What was measured, in each of some files that are alike; a line is whole or absent."""

    def __init__(self, files: Sequence[Path], skipped: Sequence[str] = ()) -> None:
        self.files, self.skipped = list(files), skipped
        self.lines: dict[str, dict[str, Any]] = {}
        for file in self.files:
            for text in file.read_text().splitlines() if file.exists() else []:
                try:
                    line = json.loads(text)
                except ValueError:  # cut in the middle of a word
                    continue
                self.lines[name(line["case"])] = line
        for file in self.files:
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(file) as temporary:
                temporary.write_text("".join(json.dumps(v) + "\n" for v in self.lines.values()))

    def has(self, case: Mapping[str, Any]) -> bool:
        """Whether it was measured or is skipped; a case that ended in an error is tried again."""
        line = self.lines.get(name(case))
        if any(words in name(case) for words in self.skipped):
            return True
        return line is not None and line.get("error", OUT_OF_MEMORY) == OUT_OF_MEMORY

    def add_failure(self, case: Mapping[str, Any], error: Exception) -> None:
        """Note that a case ended in an error; the others go on."""
        if isinstance(error, torch.OutOfMemoryError):
            self.add(case, {"error": OUT_OF_MEMORY})
            return
        traceback.print_exception(error)
        first = (str(error).splitlines() or [""])[0][:200]
        self.add(case, {"error": f"{type(error).__name__}: {first}"})

    def add(self, case: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        line = {"case": dict(case), **found, "at": time.strftime("%Y-%m-%d %H:%M:%S"), **where()}
        self.lines[name(case)] = line
        for file in self.files:
            with file.open("a") as stream:
                stream.write(json.dumps(line) + "\n")
        told = {key: value for key, value in found.items() if not isinstance(value, list)}
        print(name(case), json.dumps(told), flush=True)


def name(case: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in case.items())


class Clock:
    """The time that a call of the program may take, and what it has learnt that cases take."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def timed(work: Callable[[], Any], device: str) -> float:
    """Seconds until the device has done all that `work` asks of it."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median and ends; the values themselves too, so that others can be worked out later."""
    if not all(map(math.isfinite, values)):
        raise ValueError(f"not all finite: {values}")
    rounded = [float(f"{value:.5g}") for value in values]
    return {
        "median": statistics.median(rounded),
        "least": min(rounded),
        "most": max(rounded),
        "values": rounded,
    }


_where: dict[str, Any] = {}


def where() -> dict[str, Any]:
    """Machine, versions and command; the same for all lines of a call."""
    if not _where:
        _where["command"] = " ".join(["python", *sys.orig_argv[1:]])
        _where["torch"] = torch.__version__
        _where["python"] = platform.python_version()
        _where["commit"] = said(["git", "rev-parse", "--short", "HEAD"])
        if torch.cuda.is_available():
            _where["gpu"] = torch.cuda.get_device_name()
            _where["cuda"] = torch.version.cuda
            _where["gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            _where["driver"] = said(query)
        else:
            _where["gpu"] = f"none ({platform.machine()} CPU)"
    return _where


def said(command: list[str]) -> str:
    """What a command prints, or `unknown`."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return answer.stdout.strip() or "unknown"
