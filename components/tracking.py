"""What a stage reports of itself: parameters, metrics, artifacts, tags.

A stage writes its run as JSON lines into a queue below DJEPA_HOME; sending.py brings the queue
into MLflow from a process of its own. So no stage waits for MLflow, not for its import and not
for a server that is away, and a machine without it keeps the lines for later.

One parent run a pipeline (found again by a hash of dvc.yaml, params.yaml and data.dvc), one
child a stage that really runs.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from components.errors import without_password
from components.files import hash_of, read_json, write_json
from components.home import djepa_home
from components.registry import raw_hash, versions
from components.runs_view import group_tags, pipeline_note, run_name

# The figures that parents are compared by, of all that lie in metrics/.
FINAL = (
    "evaluate/*/geneval.overall",
    "evaluate/*/geneval.chance",
    "evaluate/*/geneval.stderr",
    "evaluate/*/geneval.n",
    "evaluate/*/geneval.difference.*",
    "evaluate/*/geneval.tasks.*",
    "evaluate/*/geneval.chance_tasks.*",
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
    "train/*/images_total",
    "train/*/dropped_by_critic",
    "curate/total",
    "curate/kept",
    "curate/rejected.*",
)
LINES = "run.jsonl"  # of a run in the queue; its writer holds a lock on it
LOCK, PROBLEM = "lock", "problem"  # in the queue: held by who sends it; why it cannot be sent
PATIENCE = 60  # seconds that the stage `report` gives MLflow to take all


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


class QueuedTracker(Tracker):
    """Reports as JSON lines in a folder of the queue.

    The file stays locked until `end` or the death of the process: whoever can lock it knows that
    nobody writes to it any more.
    """

    def __init__(self, queue: Path, name: str, run: Mapping[str, Any]) -> None:
        new = Path(tempfile.mkdtemp(prefix=".new-", dir=queue))
        self._file = (new / LINES).open("a")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        self.write("run", {"name": name, **run})
        # Whole from the moment it is seen. Names sort by time.
        self.folder = queue / f"{time.time_ns()}-{name}"
        os.rename(new, self.folder)
        self._files = 0

    def write(self, kind: str, value: Any) -> None:
        """Add one record."""
        line = json.dumps({"kind": kind, "time": int(time.time() * 1000), "value": value})
        self._file.write(line + "\n")
        self._file.flush()

    def log_params(self, params: Mapping[str, Any]) -> None:
        """See `Tracker`."""
        self.write("params", params)

    def log_metrics(
        self, metrics: Mapping[str, float], step: int | None = None, images: int | None = None
    ) -> None:
        """See `Tracker`."""
        figures = {name: float(value) for name, value in metrics.items()}
        self.write("metrics", {"metrics": figures, "step": step, "images": images})

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """See `Tracker`. It is copied: it may be gone or another one when it is sent."""
        self._files += 1
        kept = Path("files", str(self._files), Path(path).name)
        (self.folder / kept).parent.mkdir(parents=True)
        if Path(path).is_dir():
            shutil.copytree(path, self.folder / kept)
        else:
            shutil.copyfile(path, self.folder / kept)
        self.write("artifact", {"path": str(kept), "folder": folder})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """See `Tracker`."""
        self.write("tags", dict(tags))

    def end(self, status: str) -> None:
        """Say how it ended, FINISHED, FAILED or KILLED, and let go of the file."""
        self.write("end", status)
        self._file.close()


def store() -> str:
    """The tracking address: MLFLOW_TRACKING_URI, or the database in DJEPA_HOME."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{djepa_home() / 'mlflow.db'}"


def place() -> str:
    """The tracking address without the password that it may have, for messages."""
    return without_password(store())


def queue() -> Path:
    """The folder of the runs that wait to be sent to this store, made if need be."""
    address = os.environ.get("MLFLOW_TRACKING_URI")
    folder = djepa_home() / "queue" / (hash_of(address) if address else "local")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def waiting(folder: Path) -> list[Path]:
    """The runs in a queue, the oldest first."""
    return sorted(path for path in folder.glob("[0-9]*-*") if path.is_dir())


def is_over(run: Path) -> bool:
    """Whether nobody writes to this run of a queue any more."""
    try:
        with (run / LINES).open() as file:
            # Shared: two that look at once would each take the other for the writer.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except FileNotFoundError:  # sent meanwhile
        return True
    return True


def start_sending() -> None:
    """Start the process that sends the queue to MLflow, unless one is at it or MLflow is missing.

    In a session of its own: it outlives a stage that is killed, to say so.
    """
    folder = queue()
    if find_spec("mlflow") is None:
        return
    with (folder / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
    library = str(Path(__file__).resolve().parents[1])
    paths = [library, *filter(None, [os.environ.get("PYTHONPATH")])]
    with (djepa_home() / "sending.log").open("a") as log:
        subprocess.Popen(
            [sys.executable, "-m", "components.sending", str(folder)],
            cwd=djepa_home(),  # not in the way of who removes a worktree
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(paths), "DJEPA_HOME": str(djepa_home())},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def wait_sent(seconds: float = PATIENCE) -> bool:
    """Wait until MLflow has all runs that are over; whether it has.

    Not where the store cannot be reached or MLflow is missing: then the runs stay queued.
    """
    folder, began = queue(), time.time()
    start_sending()
    while any(is_over(run) for run in waiting(folder)):
        away = False
        with suppress(FileNotFoundError):  # it is gone as soon as all is well
            away = (folder / PROBLEM).stat().st_mtime > began
        if find_spec("mlflow") is None or away or time.time() > began + seconds:
            return False
        time.sleep(0.1)
    return True


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


def _tags(params: Mapping[str, Any]) -> dict[str, str]:
    lock = Path("dvc.lock")
    commit, data = _git_commit(), raw_hash()
    tags = {
        "git.commit": commit,
        "data.hash": data,
        **group_tags(params, commit, data),
        "dvc.lock": hashlib.md5(lock.read_bytes()).hexdigest() if lock.exists() else "none",
        "scale": str(params["scale"]),
        "ablation": str(params["ablation"]),
        "seed": str(params["seed"]),
    }
    for tag, name in (("prefect.flow_run", "DJEPA_FLOW_RUN"), ("prefect.link", "DJEPA_FLOW_LINK")):
        if os.environ.get(name):
            tags[tag] = os.environ[name]
    return tags


@contextmanager
def stage_run(
    stage: str, params: Mapping[str, Any], section: Mapping[str, Any]
) -> Iterator[QueuedTracker]:
    """A run for one stage that really runs, queued for MLflow.

    Args:
        stage: the stage's name in dvc.yaml.
        params: the whole of params.yaml.
        section: the part of it that this stage depends on, logged as the run's parameters.
    """
    tags = _tags(params)
    run = {
        "family": params["family"],
        "tags": {"stage": stage, "kind": "stage", **tags},
        "parent": os.environ.get("DJEPA_PARENT_RUN"),
        "pipeline": {
            "name": run_name(params),
            "tags": {
                "pipeline": pipeline_key(),
                "kind": "pipeline",
                "mlflow.note.content": pipeline_note(params),
                **tags,
            },
            "params": params,
        },
    }
    tracker = QueuedTracker(queue(), stage, run)
    start_sending()
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
        with suppress(FileNotFoundError):
            print(f"{stage}: {(queue() / PROBLEM).read_text()}", file=sys.stderr, flush=True)


def _note(digest: str) -> Path:
    return djepa_home() / "stage-runs" / f"{digest}.json"


def remember(stage: str, metrics: Path, tracker: QueuedTracker, seconds: float) -> None:
    """Note which run made a metrics file, by the file's hash, so that a cache hit finds it.

    The run's id joins the note when MLflow has given it one.
    """
    digest = hashlib.md5(metrics.read_bytes()).hexdigest()
    note = {"stage": stage, "seconds": round(seconds, 1), "run": None}
    write_json(_note(digest), note)
    tracker.write("made", {"digest": digest, "note": note})


def amend(digest: str, note: Mapping[str, Any], run: str) -> None:
    """Put the run's id in this store to a note that `remember` made."""
    write_json(_note(digest), {**note, "run": run, "store": queue().name})


def recall(metrics: bytes) -> dict[str, Any] | None:
    """The note that `remember` made for a metrics file of this content, or None."""
    return noted(hashlib.md5(metrics).hexdigest())


def noted(digest: str) -> dict[str, Any] | None:
    """The note for a metrics file with this MD5, or None; a run in another store is none."""
    if not _note(digest).exists():
        return None
    note = read_json(_note(digest))
    return note if note.get("store") == queue().name else note | {"run": None}


def complete_parent(tracker: QueuedTracker, metrics: Path, params: Mapping[str, Any]) -> None:
    """Have the final figures of all stages copied to the parent, and what was made registered.

    Stages that DVC took from its cache ran under another parent, or under this one earlier;
    the parent gets a tag with each one's run either way, so that a comparison is complete.
    """
    from components.headline import headline

    figures: dict[str, float] = {}
    curve: dict[int, dict[str, float]] = {}
    digests: dict[str, str] = {}
    for file in sorted(metrics.rglob("*.json")):
        name = file.relative_to(metrics).with_suffix("").as_posix()
        for key, value in flatten(read_json(file)).items():
            figure = f"{name}/{key}"
            known = any(fnmatchcase(figure, pattern) for pattern in FINAL)
            if known and isinstance(value, int | float) and not isinstance(value, bool):
                figures[figure] = float(value)
        digests[name] = hashlib.md5(file.read_bytes()).hexdigest()
        trained = metrics / "train" / file.name
        if file.parent.name == "evaluate" and trained.exists():
            images = read_json(trained).get("images_total")
            if images is not None:
                scores = read_json(file)["geneval"]
                held_out = {"by_images/geneval.overall": scores["overall"]}
                whole = scores.get("all", scores)["overall"]
                curve[int(images)] = held_out | {"by_images/geneval.all.overall": whole}
    tracker.write(
        "outcome",
        {
            "figures": figures | headline(figures, params),
            "curve": sorted(curve.items()),
            "digests": digests,
            "versions": versions(),
        },
    )
