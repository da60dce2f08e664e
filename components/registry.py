"""Critics as versions of a registered model, each naming the DVC hash of its folder.

MLflow's registry is a list to look things up in; the bytes are DVC's output, found again by the
hash. A stage cannot know the hash of its own output, so this is done after the stages, from
dvc.lock.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from components.files import read_json

CRITIC = "critic"  # the registered model
NEWEST = "newest"  # the alias of its newest round; MLflow keeps `latest` to itself


def recorded(root: Path = Path()) -> dict[str, dict[str, Any]]:
    """DVC's outputs as dvc.lock has them, by path; empty where there is no dvc.lock."""
    lock = root / "dvc.lock"
    if not lock.is_file():
        return {}
    stages = yaml.safe_load(lock.read_text())["stages"]
    return {out["path"]: out for entry in stages.values() for out in entry.get("outs", [])}


def register_critics(
    client: Any, runs: Mapping[str, str], tags: Mapping[str, str], root: Path = Path()
) -> list[str]:
    """Register each critic that is used and is not registered yet; returns the new versions.

    Args:
        client: an MLflow client.
        runs: the MLflow run of each round's critic stage, by the round; one that is not there
            (made on another machine) has a version without run and files.
        tags: for every version, e.g. the git commit.
        root: the checkout.

    The version's source is the folder critic/ among the run's artifacts: report, config and
    picture. Its tags name the DVC hash, which is the pin. The alias `newest` follows the newest of
    these rounds, in the order of feedback.rounds.
    """
    outs = recorded(root)
    rounds = yaml.safe_load((root / "params.yaml").read_text())["feedback"]["rounds"]
    known: dict[str, Any] | None = None
    new, newest = [], None
    for name in rounds:
        folder = root / "critics" / name
        out = outs.get(f"critics/{name}")
        if out is None or not (folder / "config.json").is_file():
            continue
        config = read_json(folder / "config.json")
        if not config["drops"]:
            continue
        if known is None:
            known = _versions(client)
        digest = out["md5"]
        if digest not in known:
            known[digest] = _create(client, name, digest, folder, config, runs.get(name), tags)
            new.append(known[digest])
        newest = known[digest]
    if newest is not None:
        client.set_registered_model_alias(CRITIC, NEWEST, newest)
    return new


def _versions(client: Any) -> dict[str, Any]:
    """The number of each version by its DVC hash; makes the registered model if need be."""
    if not client.search_registered_models(f"name = '{CRITIC}'"):
        client.create_registered_model(
            CRITIC,
            description="Critics of the data feedback (paper, section 3.2). The tag dvc.hash "
            "names the DVC output that holds the weights and the scores.",
        )
    found: dict[str, Any] = {}
    token = None
    while True:
        page = client.search_model_versions(f"name = '{CRITIC}'", page_token=token)
        found |= {version.tags.get("dvc.hash"): version.version for version in page}
        token = page.token
        if not token:
            return found


def _create(
    client: Any,
    name: str,
    digest: str,
    folder: Path,
    config: Mapping[str, Any],
    run: str | None,
    tags: Mapping[str, str],
) -> Any:
    report = read_json(folder / "report.json")
    low, high = report["auroc_interval"]
    if run is not None:
        source = f"{client.get_run(run).info.artifact_uri.rstrip('/')}/critic"
    else:
        source = folder.resolve().as_uri()
    version = client.create_model_version(
        CRITIC,
        source,
        run,
        tags={
            "dvc.hash": digest,
            "dvc.path": f"critics/{name}",
            "round": name,
            "previous": str(config["previous"]),
            "labels": str(report["labels"]),
            "labelled_by": str(report["labelled_by"]),
            "auroc": f"{report['auroc']:.4f}",
            **tags,
        },
        description=f"The critic of round {name}: AUROC {report['auroc']:.3f} "
        f"({low:.3f} to {high:.3f}) on held-out labels by {report['labelled_by']}; "
        f"started from {report['started_from']}. DVC output critics/{name}, hash {digest}.",
        await_creation_for=0,
    )
    return version.version
