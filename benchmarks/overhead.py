"""What Prefect, DVC and MLflow add to a stage: `python benchmarks/overhead.py CHECKOUT`.

CHECKOUT is a clone with `djepa compose scale=micro` and nothing run in it. The flow runs the whole
graph; then each stage's function runs alone, in the same order, in a process of its own that
tracks nothing. The difference is a row's overhead.
"""

import argparse
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BARE = """
import sys, tempfile
from pathlib import Path
import yaml
from components.stages import STAGES, Call
from components.tracking import Tracker
base, _, key = sys.argv[1].partition("@")
params = yaml.load(Path("params.yaml").read_text(), yaml.CSafeLoader)
with tempfile.TemporaryDirectory() as folder:
    STAGES[base](Call(key, params, Tracker(), Path(folder) / "resume"))
"""


def tasks(home: Path) -> list[tuple[str, float]]:
    """Names and seconds of the flow's finished tasks, in their order."""
    with sqlite3.connect(home / "prefect.db") as database:
        rows = database.execute(
            "select name, (julianday(end_time) - julianday(start_time)) * 86400 from task_run "
            "where state_type = 'COMPLETED' order by start_time"
        )
        return [(name, seconds) for name, seconds in rows if name != "data"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path)
    root = parser.parse_args().checkout.resolve()
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PREFECT_HOME": folder, "DJEPA_HOME": str(root / ".djepa")}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"

        def call(*arguments: str) -> float:
            started = time.monotonic()
            subprocess.run(
                [sys.executable, *arguments],
                cwd=root,
                env=environment,
                check=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            return time.monotonic() - started

        whole = call("-m", "flows.pipeline")
        rows = []
        for name, seconds in tasks(Path(folder)):
            stage = name.replace("evaluate-", "evaluate@").replace("compare-", "compare@")
            bare = call("-c", BARE, stage)
            rows.append((name, seconds, bare, seconds - bare))
            print(f"{name:16} task {seconds:6.2f} s  bare {bare:6.2f} s  {seconds - bare:+5.2f} s")
        again = call("-m", "flows.pipeline")
    over = [row[3] for row in rows]
    print(
        f"overhead a stage: median {statistics.median(over):.2f} s, most {max(over):.2f} s; "
        f"whole flow {whole:.1f} s, bare stages {sum(row[2] for row in rows):.1f} s; "
        f"a flow that finds all done {again:.1f} s"
    )


if __name__ == "__main__":
    main()
