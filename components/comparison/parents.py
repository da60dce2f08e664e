"""The runs to compare, read from MLflow. Of the comparison only this file knows MLflow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from components.errors import UserError
from components.runs import families

ABLATION = "ablation"  # the tag `kind` of a run above groups
SCORES = ("by_images/geneval.overall", "by_images/geneval.all.overall")  # of the parent itself
LOSSES = ("by_images/train/loss", "by_images/validation/flow")  # of the stages that trained it
SHORTEST = 4  # letters of a run id that name a run
NAMED = 12  # runs that a refusal lists

Curve = list[tuple[int, float]]  # images seen, value


@dataclass(frozen=True)
class Parent:
    """A pipeline run, or one group and seed of an ablation.

    family: without `djepa-`. status: MLflow's. tags, params, metrics: the run's own.
    curves: by metric, points by images seen. seconds: that training it took, or None.
    """

    run: str
    name: str
    family: str
    status: str
    tags: Mapping[str, str]
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    curves: Mapping[str, Curve] = field(default_factory=dict)
    seconds: float | None = None

    @property
    def incomplete(self) -> str | None:
        """Why it cannot be compared, or None."""
        if self.status != "FINISHED":
            return f"is {self.status}"
        return None if "geneval.overall" in self.metrics else "has no final figures"


def read_parents(client: Any, names: Sequence[str], family: str | None) -> list[Parent]:
    """The runs called so, each once, in this order; those of an ablation for its own name.

    Args:
        client: an MLflow client.
        names: run ids or how they begin, names of runs, or FAMILY/NAME; none for all of `family`.
        family: of runs to look among; None for all.

    Raises:
        UserError: no such family or run, or a name that several runs have.
    """
    known = families(client)
    if family is not None:
        if family not in known:
            there = f"there are {', '.join(known)}" if known else "there are none yet"
            raise UserError(f"There is no family {family!r} of runs: {there}.")
        known = {family: known[family]}
    runs = _search(client, known.values(), "tags.kind != 'stage'") if known else []
    named = {identifier: name for name, identifier in known.items()}
    chosen = [_named(name, runs, named) for name in names] if names else runs
    found: dict[str, Any] = {}
    for run in chosen:
        below = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == run.info.run_id]
        below.sort(key=lambda group: group.info.run_name)
        for each in below if run.data.tags["kind"] == ABLATION else [run]:
            found[each.info.run_id] = each
    return [_parent(client, run, named[run.info.experiment_id]) for run in found.values()]


def _search(client: Any, experiments: Any, words: str) -> list[Any]:
    """All runs for which `words` hold, oldest first."""
    found: list[Any] = []
    token = None
    while True:
        page = client.search_runs(
            list(experiments), words, order_by=["start_time ASC"], page_token=token
        )
        found += page
        token = page.token
        if not token:
            return found


def _named(name: str, runs: Sequence[Any], families: Mapping[str, str]) -> Any:
    """The one run that is called so."""

    def full(run: Any) -> str:
        return f"{families[run.info.experiment_id]}/{run.info.run_name}"

    hits = [run for run in runs if name in (run.info.run_name, full(run))]
    if not hits and len(name) >= SHORTEST:
        hits = [run for run in runs if run.info.run_id.startswith(name)]
    if len(hits) == 1:
        return hits[0]
    listed = [f"{full(run)} ({run.info.run_id[:8]})" for run in (hits or runs)[::-1]]
    there = ", ".join(listed[:NAMED]) + (", …" if len(listed) > NAMED else "")
    if hits:
        raise UserError(
            f"{len(hits)} runs are called {name!r}: name one by the id beside it: {there}."
        )
    if not runs:
        raise UserError(
            f"There is no run {name!r}, and no other to compare: `dvc repro` or "
            f"`python -m flows.ablation` makes some."
        )
    raise UserError(f"There is no run {name!r} to compare: there are {there}.")


def _parent(client: Any, run: Any, family: str) -> Parent:
    data = run.data
    ids = {value for name, value in data.tags.items() if name.startswith("child.")}
    curves = {name: _curve(client, run.info.run_id, name) for name in SCORES}
    seconds = []
    for child in _trained(client, run.info.experiment_id, ids):
        seconds.append(child.data.metrics.get("seconds", 0.0))
        for name in LOSSES:
            if name in child.data.metrics:
                curves.setdefault(name, []).extend(_curve(client, child.info.run_id, name))
    return Parent(
        run=run.info.run_id,
        name=run.info.run_name,
        family=family,
        status=run.info.status,
        tags=data.tags,
        params=data.params,
        metrics=data.metrics,
        curves={name: sorted(points) for name, points in curves.items() if points},
        seconds=sum(seconds) if seconds else None,
    )


def _trained(client: Any, experiment: str, ids: set[str]) -> list[Any]:
    """The stages of these ids that trained something; a run that was deleted is not missed."""
    if not ids:
        return []
    listed = ", ".join(f"'{each}'" for each in sorted(ids))
    runs = _search(client, [experiment], f"attributes.run_id IN ({listed})")
    return [
        run
        for run in runs
        if run.data.tags.get("stage", "").startswith(("phase1", "phase2", "dpo"))
    ]


def _curve(client: Any, run: str, name: str) -> Curve:
    """A metric's points; where a resumed training told one again, what it told last."""
    history = sorted(client.get_metric_history(run, name), key=lambda point: point.timestamp)
    return sorted({point.step: float(point.value) for point in history}.items())
