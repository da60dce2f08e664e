"""Runs, metrics and artifacts. The only file that knows MLflow, with registry.py.

One parent run a pipeline (found again by a hash of dvc.yaml, params.yaml and data.dvc), one
child a stage that really runs. Without MLflow at hand a stage writes JSON lines, which
`import_pending` brings in later.
"""

import hashlib
import importlib.util
import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from components.files import hash_of, read_json, write_json
from components.home import djepa_home
from components.registry import register_critics

EXPERIMENT = "djepa"
# The figures that parents are compared by, of all that lie in metrics/.
FINAL = (
    "evaluate/*/geneval.overall",
    "evaluate/*/geneval.chance",
    "evaluate/*/geneval.stderr",
    "evaluate/*/geneval.n",
    "evaluate/*/geneval.difference.*",
    "evaluate/*/geneval.tasks.*",
    "evaluate/*/geneval.seen.overall",
    "evaluate/*/geneval.seen.chance",
    "evaluate/*/geneval.all.*",
    "compare/*/win_rate",
    "compare/*/low",
    "compare/*/high",
    "references/*/positive_share",
    "critic/*/auroc",
    "train/*/final.*",
    "train/*/validation.flow",
    "train/*/images",
    "train/*/dropped_by_critic",
    "curate/total",
    "curate/kept",
    "curate/rejected.*",
)


class Tracker:
    """What a stage reports. This base class keeps nothing, for tests and stand-alone calls."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record settings, flattened with dots."""

    def log_metrics(
        self, metrics: Mapping[str, float], step: int | None = None, images: int | None = None
    ) -> None:
        """Record figures at a training step and, under `by_images/`, at a number of images seen."""

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Keep a file or folder beside the run."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags on the run."""


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level, names joined with dots."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


class JsonLinesTracker(Tracker):
    """Reports as JSON lines in a folder, for machines without MLflow."""

    def __init__(self, folder: Path, name: str, tags: Mapping[str, str]) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self._write("run", {"name": name, "tags": dict(tags)})

    def _write(self, kind: str, value: Any) -> None:
        line = json.dumps({"kind": kind, "time": int(time.time() * 1000), "value": value})
        with (self.folder / "run.jsonl").open("a") as file:
            file.write(line + "\n")

    def log_params(self, params: Mapping[str, Any]) -> None:
        """See `Tracker`."""
        self._write("params", params)

    def log_metrics(
        self, metrics: Mapping[str, float], step: int | None = None, images: int | None = None
    ) -> None:
        """See `Tracker`."""
        self._write("metrics", {"metrics": dict(metrics), "step": step, "images": images})

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """See `Tracker`. Only the path is kept."""
        self._write("artifact", {"path": str(Path(path).resolve()), "folder": folder})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """See `Tracker`."""
        self._write("tags", dict(tags))

    def end(self, status: str) -> None:
        """Close the file: from here on it can be imported."""
        self._write("end", status)


class MlflowTracker(Tracker):
    """Reports to one MLflow run through the client API (no global state)."""

    def __init__(self, client: Any, run_id: str) -> None:
        self.client, self.run_id = client, run_id

    def log_params(self, params: Mapping[str, Any]) -> None:
        """See `Tracker`. MLflow takes at most 100 params a batch and 6000 characters each."""
        from mlflow.entities import Param

        flat = [Param(name, str(value)[:6000]) for name, value in flatten(params).items()]
        for start in range(0, len(flat), 100):
            self.client.log_batch(self.run_id, params=flat[start : start + 100])

    def log_metrics(
        self, metrics: Mapping[str, float], step: int | None = None, images: int | None = None
    ) -> None:
        """See `Tracker`."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        batch = [Metric(name, float(value), now, step or 0) for name, value in metrics.items()]
        if images is not None:
            batch += [
                Metric(f"by_images/{name}", float(value), now, images)
                for name, value in metrics.items()
            ]
        self.client.log_batch(self.run_id, metrics=batch)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """See `Tracker`."""
        log = self.client.log_artifacts if Path(path).is_dir() else self.client.log_artifact
        log(self.run_id, str(path), folder)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """See `Tracker`."""
        for name, value in tags.items():
            self.client.set_tag(self.run_id, name, value)

    def end(self, status: str) -> None:
        """Set the run's final status: FINISHED, FAILED or KILLED."""
        self.client.set_terminated(self.run_id, status)


def store() -> str:
    """The tracking address: MLFLOW_TRACKING_URI, or the database in DJEPA_HOME."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{djepa_home() / 'mlflow.db'}"


def _client() -> Any:
    import mlflow

    return mlflow.MlflowClient(store())


def _experiment(client: Any) -> str:
    found = client.get_experiment_by_name(EXPERIMENT)
    if found:
        return found.experiment_id
    place = None if os.environ.get("MLFLOW_TRACKING_URI") else str(djepa_home() / "artifacts")
    return client.create_experiment(EXPERIMENT, artifact_location=place)


def runs_page(port: int) -> str:
    """Where an MLflow server on 127.0.0.1 shows the runs; its start page shows traces first."""
    found = _client().get_experiment_by_name(EXPERIMENT)
    page = f"experiments/{found.experiment_id}/runs" if found else ""
    return f"http://127.0.0.1:{port}/#/{page}?workflowType=machine_learning"


def pipeline_key(root: Path = Path()) -> str:
    """What makes two stage runs part of one pipeline run: dvc.yaml, params.yaml, data.dvc."""
    names = ("dvc.yaml", "params.yaml", "data.dvc")
    return hash_of([(root / n).read_text() if (root / n).exists() else "" for n in names])


def _git_commit() -> str:
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    except FileNotFoundError:  # no git: a stage alone runs all the same, see components/home.py
        return "none"
    return answer.stdout.strip() or "none"


def find_parent(client: Any, key: str) -> str | None:
    """The id of the parent run for a pipeline key, newest first, or None."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return None
    runs = client.search_runs(
        [experiment.experiment_id], f"tags.pipeline = '{key}'", order_by=["start_time DESC"]
    )
    return runs[0].info.run_id if runs else None


def _parent(client: Any, params: Mapping[str, Any]) -> str:
    key = pipeline_key()
    found = os.environ.get("DJEPA_PARENT_RUN") or find_parent(client, key)
    if found:
        client.update_run(found, status="RUNNING")
        return found
    name = f"{params['scale']}, ablation {params['ablation']}, seed {params['seed']}"
    tags = {"pipeline": key, "kind": "pipeline", **_tags(params)}
    run = client.create_run(_experiment(client), run_name=name, tags=tags)
    MlflowTracker(client, run.info.run_id).log_params(params)
    return run.info.run_id


def _tags(params: Mapping[str, Any]) -> dict[str, str]:
    lock = Path("dvc.lock")
    tags = {
        "git.commit": _git_commit(),
        "dvc.lock": hashlib.md5(lock.read_bytes()).hexdigest() if lock.exists() else "none",
        "scale": str(params["scale"]),
        "ablation": str(params["ablation"]),
        "seed": str(params["seed"]),
    }
    if "DJEPA_FLOW_RUN" in os.environ:
        tags["prefect.flow_run"] = os.environ["DJEPA_FLOW_RUN"]
    return tags


@contextmanager
def stage_run(stage: str, params: Mapping[str, Any], section: Mapping[str, Any]) -> Iterator[Any]:
    """A run for one stage that really runs; its parent is found or made.

    Args:
        stage: the stage's name in dvc.yaml.
        params: the whole of params.yaml.
        section: the part of it that this stage depends on, logged as the run's parameters.
    """
    tags = {"stage": stage, "kind": "stage", **_tags(params)}
    parent = None
    if importlib.util.find_spec("mlflow") is None:
        place = djepa_home() / "pending" / f"{stage}-{time.time_ns()}"
        tags["pipeline.of"] = pipeline_key()
        tracker: Any = JsonLinesTracker(place, stage, tags)
    else:
        client = _client()
        parent = _parent(client, params)
        import_pending(client, parent)
        tags["mlflow.parentRunId"] = parent
        run = client.create_run(_experiment(client), run_name=stage, tags=tags)
        tracker = MlflowTracker(client, run.info.run_id)
    tracker.log_params(section)
    status = "FAILED"
    try:
        yield tracker
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        tracker.end(status)
        if parent is not None:
            client.set_terminated(parent, status)


def open_run(name: str, tags: Mapping[str, str], parent: str | None = None) -> MlflowTracker:
    """The newest run with these tags below `parent`, running again, or a new one.

    For runs above those of stages, which an ablation has: the one who opens it ends it. A stage
    joins it where its id stands in DJEPA_PARENT_RUN.
    """
    client = _client()
    wanted = dict(tags) | ({"mlflow.parentRunId": parent} if parent else {})
    words = " and ".join(f"tags.`{key}` = '{value}'" for key, value in wanted.items())
    found = client.search_runs([_experiment(client)], words, order_by=["start_time DESC"])
    if found:
        run_id = found[0].info.run_id
        client.update_run(run_id, status="RUNNING")
    else:
        run_id = client.create_run(_experiment(client), run_name=name, tags=wanted).info.run_id
    return MlflowTracker(client, run_id)


def import_pending(client: Any, parent: str) -> None:
    """Bring in what stages of the same pipeline wrote as JSON lines, each as a child run."""
    for folder in sorted((djepa_home() / "pending").glob("*/")):
        records = [json.loads(line) for line in (folder / "run.jsonl").read_text().splitlines()]
        first, last = records[0], records[-1]
        if last["kind"] != "end" or first["value"]["tags"].get("pipeline.of") != pipeline_key():
            continue
        tags = first["value"]["tags"] | {"mlflow.parentRunId": parent}
        run = client.create_run(
            _experiment(client),
            start_time=first["time"],
            tags=tags,
            run_name=first["value"]["name"],
        )
        tracker = MlflowTracker(client, run.info.run_id)
        for record in records:
            value = record["value"]
            if record["kind"] == "params":
                tracker.log_params(value)
            elif record["kind"] == "metrics":
                tracker.log_metrics(**value)
            elif record["kind"] == "tags":
                tracker.set_tags(value)
            elif record["kind"] == "artifact" and Path(value["path"]).exists():
                tracker.log_artifact(Path(value["path"]), value["folder"])
        client.set_terminated(run.info.run_id, last["value"], last["time"])
        # A folder renamed away is never imported twice, and nothing is lost.
        done = djepa_home() / "imported"
        done.mkdir(exist_ok=True)
        os.replace(folder, done / folder.name)


def remember(stage: str, metrics: Path, tracker: Tracker, seconds: float) -> None:
    """Note which run made a metrics file, by the file's hash, so that a cache hit finds it."""
    digest = hashlib.md5(metrics.read_bytes()).hexdigest()
    note = {"stage": stage, "seconds": round(seconds, 1), "run": getattr(tracker, "run_id", None)}
    write_json(djepa_home() / "stage-runs" / f"{digest}.json", note)


def recall(metrics: bytes) -> dict[str, Any] | None:
    """The note that `remember` made for a metrics file of this content, or None."""
    digest = hashlib.md5(metrics).hexdigest()
    note = djepa_home() / "stage-runs" / f"{digest}.json"
    return read_json(note) if note.exists() else None


def complete_parent(tracker: Tracker, metrics: Path) -> None:
    """Copy the final figures of all stages to the parent, with a tag for each child's run id.

    And register the critics (components/registry.py).

    Stages that DVC took from its cache ran under another parent, or under this one earlier;
    either way the comparison of parents is complete.
    """
    if not isinstance(tracker, MlflowTracker):
        return
    child = tracker.client.get_run(tracker.run_id)
    parent = MlflowTracker(tracker.client, child.data.tags["mlflow.parentRunId"])
    figures: dict[str, float] = {}
    critics: dict[str, str] = {}
    for file in sorted(metrics.rglob("*.json")):
        name = file.relative_to(metrics).with_suffix("").as_posix()
        for key, value in flatten(read_json(file)).items():
            figure = f"{name}/{key}"
            known = any(fnmatchcase(figure, pattern) for pattern in FINAL)
            if known and isinstance(value, int | float) and not isinstance(value, bool):
                figures[figure] = float(value)
        note = recall(file.read_bytes())
        if note and note["run"]:
            parent.set_tags({f"child.{note['stage'].replace('@', '-')}": note["run"]})
            if file.parent == metrics / "critic":
                critics[file.stem] = note["run"]
    parent.log_metrics(figures)
    register_critics(tracker.client, critics, {"git.commit": _git_commit()})
