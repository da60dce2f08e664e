"""MLflow's side of tracking: experiments, parents and runs in the store."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.home import djepa_home
from components.registry import made_meanwhile
from components.runs_view import FAMILY, VIEWS, describe_experiment, view_page
from components.tracking import Tracker, flatten, store

MOST = {"params": 100, "metrics": 1000}  # that MLflow takes at once
LONGEST = 6000  # characters of a parameter that MLflow takes


def client() -> Any:
    """A client of the store; one that is away is known to be so in seconds."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    import mlflow

    return mlflow.MlflowClient(store())


class MlflowTracker(Tracker):
    """Reports to one MLflow run through the client API (no global state)."""

    def __init__(self, client: Any, run_id: str) -> None:
        self.client, self.run_id = client, run_id

    def log_params(self, params: Mapping[str, Any]) -> None:
        """See `Tracker`."""
        from mlflow.entities import Param

        flat = [Param(name, str(value)[:LONGEST]) for name, value in flatten(params).items()]
        for start in range(0, len(flat), MOST["params"]):
            self.client.log_batch(self.run_id, params=flat[start : start + MOST["params"]])

    def log_metrics(
        self, metrics: Mapping[str, float], step: int | None = None, images: int | None = None
    ) -> None:
        """See `Tracker`."""
        values = {"metrics": metrics, "step": step, "images": images}
        self.log_points([{"time": int(time.time() * 1000), "value": values}])

    def log_points(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Records of metrics as the queue has them: `time` in ms, `value` as `log_metrics`."""
        from mlflow.entities import Metric

        points = []
        for record in records:
            value, then = record["value"], record["time"]
            for name, figure in value["metrics"].items():
                points.append(Metric(name, float(figure), then, value["step"] or 0))
                if value["images"] is not None:
                    points.append(Metric(f"by_images/{name}", float(figure), then, value["images"]))
        for start in range(0, len(points), MOST["metrics"]):
            self.client.log_batch(self.run_id, metrics=points[start : start + MOST["metrics"]])

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """See `Tracker`."""
        log = self.client.log_artifacts if Path(path).is_dir() else self.client.log_artifact
        log(self.run_id, str(path), folder)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """See `Tracker`."""
        from mlflow.entities import RunTag

        entities = [RunTag(name, str(value)) for name, value in tags.items()]
        self.client.log_batch(self.run_id, tags=entities)

    def end(self, status: str, when: int | None = None) -> None:
        """Set the run's final status: FINISHED, FAILED or KILLED, at `when` in ms or now."""
        self.client.set_terminated(self.run_id, status, when)


def experiment_name(family: str) -> str:
    """The MLflow experiment of a family of runs that are compared with one another."""
    return f"{FAMILY}{family}"


def experiment(client: Any, family: str) -> str:
    """The id of the family's experiment, made if need be."""
    name = experiment_name(family)
    found = client.get_experiment_by_name(name)
    if found:
        return found.experiment_id
    place = None if os.environ.get("MLFLOW_TRACKING_URI") else str(djepa_home() / "artifacts")
    with made_meanwhile():
        client.create_experiment(name, artifact_location=place)
    made = str(client.get_experiment_by_name(name).experiment_id)
    describe_experiment(client, made, family)
    return made


def newest(client: Any, family: str, tags: Mapping[str, str]) -> str | None:
    """The id of the family's newest run with these tags, or None."""
    words = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    found = client.search_runs(
        [experiment(client, family)], words, max_results=1, order_by=["start_time DESC"]
    )
    return found[0].info.run_id if found else None


def with_group(client: Any, family: str, tags: Mapping[str, str]) -> dict[str, str]:
    """The tags, their `group` with digits of its hash where other runs have the name already."""
    known = newest(client, family, {"group.hash": tags["group.hash"]})
    if known:
        return {**tags, "group": client.get_run(known).data.tags["group"]}
    taken = newest(client, family, {"group": tags["group"]})
    digits = f" {tags['group.hash'][:4]}" if taken else ""
    return {**tags, "group": tags["group"] + digits}


def open_run(
    family: str, name: str, tags: Mapping[str, str], parent: str | None = None
) -> MlflowTracker:
    """The newest run with these tags below `parent`, running again, or a new one.

    For runs above those of stages, which an ablation has: the one who opens it ends it. A stage
    joins it where its id stands in DJEPA_PARENT_RUN.
    """
    mlflow = client()
    wanted = dict(tags) | ({"mlflow.parentRunId": parent} if parent else {})
    run_id = newest(mlflow, family, wanted)
    if run_id:
        mlflow.update_run(run_id, status="RUNNING")
    else:
        made = mlflow.create_run(experiment(mlflow, family), run_name=name, tags=wanted)
        run_id = made.info.run_id
    return MlflowTracker(mlflow, run_id)


def families(client: Any) -> dict[str, str]:
    """Ids of experiments by their family, the one used last first."""
    found = client.search_experiments(
        filter_string=f"name LIKE '{FAMILY}%'", order_by=["last_update_time DESC"]
    )
    return {each.name.removeprefix(FAMILY): each.experiment_id for each in found}


def runs_pages(port: int) -> list[tuple[str, str]]:
    """Where an MLflow server on 127.0.0.1 shows what: words and address, the newest runs first.

    The experiments get their notes and views here if they have none.
    """
    mlflow, root = client(), f"http://127.0.0.1:{port}/#/experiments"
    pages = []
    for family, identifier in families(mlflow).items():
        describe_experiment(mlflow, identifier, family)
        for key, (name, _, _) in VIEWS.items():
            pages.append((f"{family}, {name.lower()}", f"{root}/{view_page(identifier, key)}"))
    return pages or [("no runs yet", f"{root}?workflowType=machine_learning")]
