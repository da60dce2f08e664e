"""There: the jobs of a plan (plan.py), stage by stage, on a machine without DVC, Hydra and MLflow.

    python -m benchmarks.gpu.lease plan.json WORK lease.jsonl … [--cores N]

Raw pictures are drawn, curated and encoded once in WORK/shared-HASH. Each job has a folder
WORK/NAME-KEY with its own params.yaml, in which the stages of dvc.yaml run by their own code, as
many jobs side by side as the plan says. A stage whose outputs are there is not run again, and one
that was cut goes on from its snapshot: the same command goes on after any break. A job's figures
are a line in every results file as soon as it is done; jobs that have a line are not run again,
unless one without goes on from them, and then not scored again.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml

from benchmarks.gpu.record import Results
from components.compose import load
from components.errors import UserError, explain, say
from components.evaluation.ablation import Result
from components.files import atomic_file, hash_of, read_json, read_yaml, write_json
from components.processes import end_with
from components.rawdata import draw_unrecorded
from components.stages import outputs, run_stage, section
from components.tracking import Tracker

ROOT = Path(__file__).resolve().parents[2]
SHARED = ("curated", "encoded")
CARRIED = ("models", "states", "critics")  # of the job that another goes on from
CONTRACT = Path("metrics/contract.json")
EVERY = 20.0  # seconds between two looks at what all jobs are at
# What is no stage of dvc.yaml, and what it leaves behind.
OWN = {"data": [Path("data.dvc")], "keep": [Path("kept")]}
CHILD = "from benchmarks.gpu.lease import child; child()"


def child() -> None:
    """In a process that `start` started, and that ends with it: the steps one after the other."""
    end_with(int(sys.argv[1]))
    for step in sys.argv[2:]:
        if step == "data":
            draw_unrecorded(load(), Tracker())
        elif step == "keep":
            keep()
        else:
            run_stage(step)


def keep() -> None:
    """Write the model of phase 1 into kept/, its weights in bfloat16, to be brought home."""
    from components.model import DJEPAPipeline

    pipeline = DJEPAPipeline.from_pretrained("models/phase1")
    pipeline.transformer.to(torch.bfloat16)
    pipeline.save_pretrained("kept", {"weights": "the running average, rounded to bfloat16"})


def make(folder: Path, params: Mapping[str, Any], links: Sequence[Path] = ()) -> None:
    """A folder that stages run in: parameters, the graph, the code, empty labels, `links`.

    links: outputs of other folders, which get the same names here.
    """
    (folder / "labels").mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / "params.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(dict(params), sort_keys=False))
    for labels in ("auto", "simulated"):
        (folder / "labels" / f"{labels}.jsonl").touch()
    targets = {folder / each.name: each for each in (ROOT / "components", ROOT / "dvc.yaml")}
    for link in links:
        parent = link.parent.name if link.parent.name in CARRIED else ""
        targets[folder / parent / link.name] = link
    for place, target in targets.items():
        if not os.path.lexists(place):
            place.parent.mkdir(exist_ok=True)
            place.symlink_to(target.resolve())


def left(folder: Path, steps: Sequence[str], params: Mapping[str, Any]) -> list[str]:
    """Those of the steps whose outputs are not all there."""
    made = {step: OWN.get(step) or outputs(step, params) for step in steps}
    return [step for step in steps if not all((folder / path).exists() for path in made[step])]


def start(folder: Path, steps: Sequence[str], cores: int) -> subprocess.Popen[bytes]:
    """Start the steps one after the other in a process; what it says goes to FOLDER/log."""
    # PyTorch's threads wait for one another where others hold the cores.
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {
        "DJEPA_HOME": str(folder / "home"),
        "OMP_NUM_THREADS": str(cores),
        "PYTHONPATH": os.pathsep.join(paths),
    }
    (folder / "home").mkdir(exist_ok=True)
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-u", "-c", CHILD, str(os.getpid()), *steps],
            cwd=folder,
            env=os.environ | own,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def last_line(folder: Path) -> str:
    """The last line that the folder's process has said."""
    lines = (folder / "log").read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "started"


def fitted(params: Mapping[str, Any], trial: Path, seconds: float) -> dict[str, Any]:
    """The parameters with so many images in phase 1 as train in `seconds`, in whole batches.

    trial: metrics of a short phase 1. The rate is that of its second half: the first one holds
    what is compiled.
    """
    history = [(row["images"], row["images"] / row["images_per_second"])
               for row in read_json(trial)["history"]]  # fmt: skip
    (before, began), (images, ended) = history[len(history) // 2 - 1], history[-1]
    rate = (images - before) / (ended - began)
    phase = params["training"]["phase1"]
    steps = max(1, int(rate * seconds / phase["batch"]))
    print(f"{rate:.0f} images/s: {steps * phase['batch']} images in {seconds:.0f} s", flush=True)
    new = phase | {"images": steps * phase["batch"]}
    return {**params, "training": params["training"] | {"phase1": new}}


class Lease:
    """The jobs of a plan, and which of them are done, run or wait."""

    def __init__(self, plan: Mapping[str, Any], work: Path, results: Results, cores: int) -> None:
        self.jobs = {job["name"]: job for job in plan["jobs"]}
        self.at_once, self.work, self.results = int(plan["at_once"]), work, results
        self.cores = cores
        params = plan["jobs"][0]["params"]
        world = hash_of([params["data"], params["curation"], section("encode", params)])
        self.shared = work / f"shared-{world[:8]}"
        self.waiting = [job for job in plan["jobs"] if self.is_wanted(job)]
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.done: set[str] = set()
        self.failed: list[str] = []

    def folder(self, name: str) -> Path:
        """The folder of a job."""
        return self.work / f"{name}-{self.jobs[name]['key']}"

    def case(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """What its line is known by."""
        return {"kind": "lease", "job": job["name"], "key": job["key"]}

    def is_wanted(self, job: Mapping[str, Any]) -> bool:
        """Whether it has no line yet, or one that has none goes on from it."""
        if not self.results.has(self.case(job)):
            return True
        return any(
            self.is_wanted(other)
            for other in self.jobs.values()
            if job["name"] in self._before(other)
        )

    def _before(self, job: Mapping[str, Any]) -> list[str]:
        fit = job.get("fit", {}).get("to")
        return [name for name in (job["follows"], fit) if name]

    def prepare(self) -> None:
        """Draw, curate and encode what all jobs train on.

        Raises:
            UserError: one of these stages failed.
        """
        params = next(iter(self.jobs.values()))["params"]
        make(self.shared, params)
        if not (self.shared / CONTRACT).exists():
            why = "not checked on this machine, which has no Great Expectations"
            write_json(self.shared / CONTRACT, {"success": None, "why": why})
        steps = left(self.shared, ["data", "curate", "encode"], params)
        if not steps:
            return
        print(f"{', '.join(steps)}: started", flush=True)
        began, process = time.monotonic(), start(self.shared, steps, 1)
        try:
            while process.poll() is None:
                self._wait(began, {"shared": self.shared}, [process])
        finally:
            process.terminate()
        if process.returncode:
            said = last_line(self.shared)
            raise UserError(f"{said} ({self.shared / 'log'}, exit code {process.returncode})")
        print(f"{', '.join(steps)}: {time.monotonic() - began:.0f} s", flush=True)

    def run(self) -> list[str]:
        """Run every job once those before it are done; gives the names of those that are not."""
        began = time.monotonic()
        try:
            while self._start_ready() or self.running:
                if not self.running:  # all that was ready had nothing to do
                    continue
                folders = {name: self.folder(name) for name in self.running}
                self._wait(began, folders, list(self.running.values()))
                for name, process in list(self.running.items()):
                    if process.poll() is not None:
                        del self.running[name]
                        self._end(name, process.returncode)
        finally:
            for process in self.running.values():
                process.terminate()
        return [*self.failed, *(job["name"] for job in self.waiting)]

    def _start_ready(self) -> bool:
        """Start what can start; whether something was done or started."""
        ready = [job for job in self.waiting if self.done.issuperset(self._before(job))]
        for job in ready[: self.at_once - len(self.running)]:
            self.waiting.remove(job)
            name, steps = job["name"], self._steps(job)
            if steps:
                print(f"{name}: {', '.join(steps)}", flush=True)
                self.running[name] = start(self.folder(name), steps, self.cores)
            else:
                self._end(name, 0)
        return bool(ready)

    def _steps(self, job: Mapping[str, Any]) -> list[str]:
        """Make the job's folder; what is left to do in it."""
        folder, params, steps = self.folder(job["name"]), job["params"], job["stages"]
        links = [self.shared / name for name in SHARED]
        if job["follows"]:
            before = self.folder(job["follows"])
            links += [path for kind in CARRIED for path in sorted((before / kind).glob("*"))]
        if "fit" in job:
            # Once: with other images what was trained would be trained anew.
            note = folder / "params.yaml"
            trial = self.folder(job["fit"]["to"]) / "metrics" / "train" / "phase1.json"
            params = (
                read_yaml(note) if note.exists() else fitted(params, trial, job["fit"]["seconds"])
            )
        if self.results.has(self.case(job)):
            steps = [step for step in steps if not step.startswith("evaluate")]
        make(folder, params, links)
        return left(folder, steps, params)

    def _end(self, name: str, code: int) -> None:
        job, folder = self.jobs[name], self.folder(name)
        if code:
            print(f"{name}: failed ({code}): {last_line(folder)}", flush=True)
            self.failed.append(name)
            return
        self.done.add(name)
        print(f"{name}: done", flush=True)
        if not self.results.has(self.case(job)):
            self.results.add(self.case(job), self._figures(job, folder))

    def _figures(self, job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        trained = read_json(folder / "metrics" / "train" / f"{job['model']}.json")
        figures = {name: trained[name] for name in ("images_per_second", "parameters")}
        figures |= job["about"]
        scored = folder / "metrics" / "evaluate" / f"{job['model']}.json"
        if scored.exists():
            about, seed = job["about"], job["params"]["seed"]
            result = Result.of(about.get("group", "none"), seed, read_json(scored), trained)
            figures |= vars(result)
        return figures

    def _wait(
        self,
        began: float,
        folders: Mapping[str, Path],
        processes: Sequence[subprocess.Popen[bytes]],
    ) -> None:
        """Until a process has ended, or it is time to say what they are at."""
        until = time.monotonic() + EVERY
        while time.monotonic() < until:
            if any(process.poll() is not None for process in processes):
                return
            time.sleep(0.1)
        for name, folder in folders.items():
            print(f"  {time.monotonic() - began:.0f} s {name}: {last_line(folder)}", flush=True)


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the plan; exit code 1 where a job failed, 2 for a refusal."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu.lease", description=__doc__)
    parser.add_argument("plan", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument(
        "results", type=Path, nargs="+", help="JSON lines; all are read and written"
    )
    parser.add_argument("--cores", type=int, help="threads of a job; by default its share")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _stop)
    plan = read_json(options.plan)
    cores = options.cores or max(1, (os.cpu_count() or 1) // int(plan["at_once"]))
    lease = Lease(plan, options.work.resolve(), Results(options.results), cores)
    try:
        if lease.waiting:
            lease.prepare()
        failed = lease.run()
    except UserError as error:
        return say("lease", explain(error) or str(error), error)
    print(f"not done: {', '.join(failed)}" if failed else "all done", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
