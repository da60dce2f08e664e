"""A registered model as a folder again, and its score: by name in MLflow, by bytes in DVC.

The registry (registry.py) names versions; the tag `dvc.hash` of a version is its pin. A model that
no checkout has any more is put together from DVC's cache, or from the default remote.
"""

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.compose import load
from components.errors import UserError, first_line
from components.files import read_json
from components.home import djepa_home
from components.remote import remote_name
from components.runs import client, open_run
from components.tracking import flatten, place

NAME = re.compile(r"(?:models:/)?(?P<name>[^/@]+)(?:@(?P<alias>[\w.-]+)|/(?P<version>\d+))")
HASH = "dvc.hash"  # the tag


@dataclass(frozen=True)
class Model:
    """A model to evaluate.

    label: a name for files, e.g. model-3. digest: DVC's hash of a registered one, and version its
    number in the registry; a folder has `folder` instead.
    """

    label: str
    name: str = ""
    version: str = ""
    digest: str = ""
    folder: Path | None = None


def find(model: str) -> Model:
    """The model of this name: a folder, or NAME@ALIAS or NAME/VERSION of MLflow's registry.

    Raises:
        UserError: there is no such folder, alias or version, the registry does not answer, or
            the version does not say which bytes it is.
    """
    folder = Path(model)
    if folder.is_dir():
        return Model("-".join(folder.absolute().parts[-2:]), folder=folder.absolute())
    asked = NAME.fullmatch(model)
    if asked is None:
        raise UserError(
            f"There is no folder {model}, and it is no name in MLflow's registry: give "
            f"NAME@ALIAS, NAME/VERSION or a model's folder, such as model@newest or models/dpo."
        )
    mlflow = client()
    from mlflow.exceptions import MlflowException

    try:
        if asked["alias"]:
            version = mlflow.get_model_version_by_alias(asked["name"], asked["alias"])
        else:
            version = mlflow.get_model_version(asked["name"], asked["version"])
    except MlflowException as error:
        raise UserError(
            f"{model} cannot be looked up in the registry at {place()} ({first_line(error)}): "
            f"{_known(mlflow, asked['name'])}."
        ) from error
    digest = version.tags.get(HASH)
    if not digest:
        raise UserError(
            f"{model} has no tag {HASH} in the registry at {place()}: only what a pipeline "
            f"registered names its bytes; give the model's folder instead."
        )
    name, number = str(version.name), str(version.version)
    return Model(f"{name}-{number}", name, number, digest)


def _known(mlflow: Any, name: str) -> str:
    """What could have been asked for, in words."""
    from mlflow.exceptions import MlflowException

    try:
        found = mlflow.search_registered_models(f"name = '{name}'")
    except MlflowException:
        return "see that it runs, and that MLFLOW_TRACKING_URI names it"
    if not found:
        return f"it has no model {name}; a pipeline registers one when its report is done"
    versions = mlflow.search_model_versions(f"name = '{name}'", max_results=10)
    numbers = ", ".join(f"{name}/{version.version}" for version in versions)
    aliases = ", ".join(f"{name}@{alias}" for alias in found[0].aliases)
    return f"it has {aliases or 'no alias'} and, newest first, {numbers or 'no version'}"


def pinned() -> dict[str, str]:
    """The names of all registered versions by the DVC hash that each is pinned to.

    Raises:
        UserError: the registry does not answer.
    """
    mlflow, token = client(), None
    from mlflow.exceptions import MlflowException

    found: dict[str, str] = {}
    try:
        while True:
            page = mlflow.search_model_versions(page_token=token)
            found |= {v.tags[HASH]: f"{v.name}/{v.version}" for v in page if HASH in v.tags}
            token = page.token
            if not token:
                return found
    except MlflowException as error:
        raise UserError(
            f"The registry at {place()} does not answer ({first_line(error)}): see that it runs, "
            f"and that MLFLOW_TRACKING_URI names it."
        ) from error


@contextmanager
def fetched(model: Model) -> Iterator[Path]:
    """The model's folder; of a registered one a copy as long as the block runs, checked to the bit.

    Raises:
        UserError: neither DVC's cache nor its remote has the bytes, or they are damaged.
    """
    if model.folder is not None:
        yield model.folder
        return
    folder = djepa_home() / "fetched" / f"{model.label}.tmp-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(exist_ok=True)
    try:
        _materialise(model, folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _materialise(model: Model, folder: Path) -> None:
    """Write the folder with the model's DVC hash to `folder`."""
    from dvc.exceptions import DvcException
    from dvc.fs import localfs
    from dvc.repo import Repo
    from dvc_data.hashfile import load as content
    from dvc_data.hashfile.build import build
    from dvc_data.hashfile.checkout import CheckoutError, checkout
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.tree import Tree
    from dvc_objects.errors import ObjectFormatError

    what, info = f"{model.name}/{model.version}", HashInfo("md5", model.digest)
    missing = (FileNotFoundError, ObjectFormatError, CheckoutError)
    with Repo() as repo:
        cache = repo.cache.local
        try:
            checkout(str(folder), localfs, content(cache, info), cache=cache)
        except missing:
            remote = remote_name()
            if remote is None:
                raise UserError(
                    f"The bytes of {what} (DVC hash {model.digest}) are not whole in the cache "
                    f"{cache.path}, and DVC has no default remote to have them from: push them "
                    f"from the machine that trained it (`dvc push`), or evaluate another version."
                ) from None
            try:
                repo.cloud.pull([info])  # which files there are, then they themselves
                repo.cloud.pull([entry for _, _, entry in Tree.load(cache, info)])
                shutil.rmtree(folder, ignore_errors=True)
                checkout(str(folder), localfs, content(cache, info), cache=cache)
            except (*missing, DvcException, OSError) as error:
                raise UserError(
                    f"The bytes of {what} (DVC hash {model.digest}) are neither in the cache "
                    f"{cache.path} nor to be had from the remote {remote} "
                    f"({first_line(error)}): push them from the machine that trained it (`dvc "
                    f"push`), or evaluate another version."
                ) from error
        _, _, built = build(cache, str(folder), localfs, "md5", dry_run=True)
    if built.hash_info.value != model.digest:
        raise UserError(
            f"The bytes of {what} in the cache {cache.path} are damaged (hash "
            f"{built.hash_info.value}, registered {model.digest}): fetch them anew with `dvc "
            f"fetch` where a remote has them, or evaluate another version."
        )


def record(model: Model, out: Path, settings: Mapping[str, Any]) -> str:
    """Log an evaluation to a run of its own, and its score to the registered version.

    Args:
        model: what was evaluated.
        out: the folder that `djepa evaluate` wrote.
        settings: what tells this evaluation from others of the same model.

    Returns the run's id; the same evaluation again has the same run.
    """
    found = read_json(out / "result.json")
    geneval = found["geneval"]
    name = f"{model.name}/{model.version}" if model.version else str(model.folder)
    tags = {"kind": "evaluation", "model": name, "model.hash": found["model_hash"]}
    tags |= {f"evaluation.{key}": str(value) for key, value in settings.items()}
    tracker = open_run(load()["family"], f"evaluation of {name}", tags)
    status = "FAILED"
    try:
        # Under the names that the stage evaluate gives them.
        tracker.log_metrics(
            {
                f"geneval/{key.replace('.', '/')}": float(value)
                for key, value in flatten(geneval).items()
                if isinstance(value, int | float) and not isinstance(value, bool)
            }
        )
        tracker.log_artifact(out / "grid.png")
        tracker.log_artifact(out / "result.json")
        status = "FINISHED"
    finally:
        tracker.end(status)
    if model.version:
        figures = {key: f"{geneval[key]:.4f}" for key in ("overall", "stderr", "chance")}
        said = figures | {"n": str(geneval["n"]), "run": tracker.run_id}
        said |= {key: str(value) for key, value in settings.items()}
        for key, value in said.items():
            tracker.client.set_model_version_tag(
                model.name, model.version, f"evaluation.{key}", value
            )
    return tracker.run_id
