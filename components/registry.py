"""Critics and the final model as versions of registered models, each naming its DVC hash.

MLflow's registry is a list to look things up in; the bytes are DVC's outputs, found again by the
hash. A stage cannot know the hash of its own output, so this is done after the stages, from
dvc.lock: `versions` reads the checkout, without MLflow; `register` writes to the registry.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from components.files import read_json, read_yaml
from components.runs_view import run_name

CRITIC, MODEL = "critic", "model"  # the registered models
NEWEST = "newest"  # the alias of the version registered last; MLflow keeps `latest` to itself
ABOUT = {
    CRITIC: "Critics of the data feedback (paper, section 3.2). The tag dvc.hash names the DVC "
    "output that holds the weights and the scores.",
    MODEL: "What pipelines ended with. The tag dvc.hash names the DVC output that holds the "
    "weights, data.hash and critics what it was made from.",
}
Entry = dict[str, Any]


def recorded(root: Path = Path()) -> dict[str, dict[str, Any]]:
    """DVC's outputs as dvc.lock has them, by path; empty where there is no dvc.lock."""
    lock = root / "dvc.lock"
    if not lock.is_file():
        return {}
    stages = read_yaml(lock)["stages"]
    return {out["path"]: out for entry in stages.values() for out in entry.get("outs", [])}


def raw_hash(root: Path = Path()) -> str:
    """DVC's hash of the raw pictures as data.dvc has it, `none` where there is no data.dvc."""
    record = root / "data.dvc"
    return str(read_yaml(record)["outs"][0]["md5"]) if record.is_file() else "none"


def versions(root: Path = Path()) -> list[Entry]:
    """What the checkout at `root` has to register, the oldest first, as `register` takes it.

    Critics that drop something, in the order of feedback.rounds, and the model that the pipeline
    ends with: dpo's, or the last round's where dpo did not run.
    """
    outs = recorded(root)
    if not outs:
        return []
    params = read_yaml(root / "params.yaml")
    rounds = params["feedback"]["rounds"]
    found = {name: entry for name in rounds if (entry := _critic(name, outs, root))}
    model = _model(params, outs, {name: entry["digest"] for name, entry in found.items()}, root)
    return [*found.values(), *([model] if model else [])]


def _critic(name: str, outs: Mapping[str, Any], root: Path) -> Entry | None:
    folder = root / "critics" / name
    out = outs.get(f"critics/{name}")
    if out is None or not (folder / "config.json").is_file():
        return None
    config = read_json(folder / "config.json")
    if not config["drops"]:
        return None
    report = read_json(folder / "report.json")
    low, high = report["auroc_interval"]
    return {
        "registered": CRITIC,
        "digest": out["md5"],
        "made": f"critic/{name}",
        "tags": {
            "dvc.hash": out["md5"],
            "dvc.path": f"critics/{name}",
            "round": name,
            "previous": str(config["previous"]),
            "labels": str(report["labels"]),
            "labelled_by": str(report["labelled_by"]),
            "auroc": f"{report['auroc']:.4f}",
        },
        "description": f"The critic of round {name}: AUROC {report['auroc']:.3f} "
        f"({low:.3f} to {high:.3f}) on held-out labels by {report['labelled_by']}; "
        f"started from {report['started_from']}. DVC output critics/{name}, hash {out['md5']}.",
    }


def _model(
    params: Mapping[str, Any], outs: Mapping[str, Any], critics: Mapping[str, str], root: Path
) -> Entry | None:
    rounds = params["feedback"]["rounds"]
    made = [name for name in ("dpo", *reversed(rounds)) if f"models/{name}" in outs]
    if not made:
        return None
    name, used = made[0], []
    step = params["dpo"]["from"] if name == "dpo" else name
    while step in rounds:
        if step in critics:
            used.append(f"{step}={critics[step]}")
        step = rounds[step]["model"]
    digest = outs[f"models/{name}"]["md5"]
    data = raw_hash(root)
    lineage = ", ".join(reversed(used)) or "none"
    said = run_name(params)
    entry = {
        "registered": MODEL,
        "digest": digest,
        "made": f"train/{name}",
        "tags": {
            "dvc.hash": digest,
            "dvc.path": f"models/{name}",
            "stage": name,
            "data.hash": data,
            "critics": lineage,
            "scale": str(params["scale"]),
            "ablation": str(params["ablation"]),
            "seed": str(params["seed"]),
        },
        "description": f"The model of stage {name} ({said}), trained on the data {data}, critics: "
        f"{lineage}. DVC output models/{name}, hash {digest}: `dvc pull models/{name}` at the "
        "commit of the tag git.commit.",
    }
    scores = root / "metrics" / "evaluate" / f"{name}.json"
    if scores.is_file():
        geneval = read_json(scores)["geneval"]
        entry["tags"] |= {
            f"geneval.{figure}": f"{geneval[figure]:.4f}"
            for figure in ("overall", "chance", "stderr")
        }
    return entry


def register(
    client: Any,
    entries: Sequence[Entry],
    run_of: Callable[[str], str | None],
    tags: Mapping[str, str],
) -> None:
    """Register each of these that is not there yet, and move the aliases to the last ones.

    Args:
        client: an MLflow client.
        entries: what `versions` found.
        run_of: the MLflow run that made the metrics of this name; None where it was made on
            another machine: such a version has no run, and its source names the DVC output.
        tags: for every version, e.g. the git commit.

    A version's source is a folder among the run's artifacts, with what describes it. Its tags
    name the DVC hash, which is the pin.
    """
    known: dict[str, dict[str, Any]] = {}
    for entry in entries:
        name, digest = entry["registered"], entry["digest"]
        if name not in known:
            known[name] = _versions(client, name)
        if digest not in known[name]:
            run = run_of(entry["made"])
            if run is not None:
                source = f"{client.get_run(run).info.artifact_uri.rstrip('/')}/{name}"
            else:
                source = f"dvc:///{entry['tags']['dvc.path']}"
            known[name][digest] = client.create_model_version(
                name,
                source,
                run,
                tags={**entry["tags"], **tags},
                description=entry["description"],
                await_creation_for=0,
            ).version
        client.set_registered_model_alias(name, NEWEST, known[name][digest])


@contextmanager
def made_meanwhile() -> Iterator[None]:
    """Inside, what another process makes in this very moment need not be made."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _versions(client: Any, name: str) -> dict[str, Any]:
    """The number of each version by its DVC hash; makes the registered model if need be."""
    if not client.search_registered_models(f"name = '{name}'"):
        with made_meanwhile():
            client.create_registered_model(name, description=ABOUT[name])
    found: dict[str, Any] = {}
    token = None
    while True:
        page = client.search_model_versions(f"name = '{name}'", page_token=token)
        found |= {version.tags.get("dvc.hash"): version.version for version in page}
        token = page.token
        if not token:
            return found
