"""What dvc.yaml makes depend on what, asked of DVC itself."""

import json
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest

from components.compose import PARAMS, compose, composed
from components.evaluation.report import models
from components.files import read_yaml
from components.stages import definition, dependencies, each, section, snapshots
from tests.conftest import ROOT, Checkout


def status(checkout: Checkout, *stages: str) -> dict[str, list]:
    """What DVC finds changed, by stage; in a tree where nothing was run much is missing."""
    return json.loads(checkout.dvc("status", "--json", *stages))


def test_a_stage_is_the_same_by_its_name_in_dvc_yaml_and_by_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DJEPA_HOME", str(tmp_path))
    params = read_yaml(PARAMS)
    params["feedback"]["rounds"]["my-round"] = params["feedback"]["rounds"]["r1"]
    names = []
    for name, entry in read_yaml(Path("dvc.yaml"))["stages"].items():
        if "foreach" not in entry:
            names.append(name)
        elif entry["foreach"] == "${feedback.rounds}":
            names += [f"{name}@{key}" for key in params["feedback"]["rounds"]]
    assert {"evaluate-dpo", "phase2@my-round", "curate"} <= set(names)
    for name in names:
        assert definition(name)["name"] == name
        base, dash, key = name.partition("-")
        own = f"{base}@{key}" if dash and "@" not in name else name  # as its command calls it
        assert section(own, params) == section(name, params)
        assert dependencies(own, params) == dependencies(name, params)
        assert not any("$" in path for path in dependencies(name, params))
    assert len({snapshots(name, params) for name in names}) == len(names)


def test_another_seed_trains_again_but_curates_and_encodes_nothing_again(
    checkout: Checkout,
) -> None:
    stages = ("curate", "contract", "encode", "phase1")
    before = status(checkout, *stages)
    checkout.djepa("compose", "seed=1")
    after = status(checkout, *stages)
    for stage in ("curate", "contract", "encode"):
        assert after.get(stage) == before.get(stage)
    assert '"seed": "modified"' in json.dumps(after["phase1"])
    assert '"seed": "modified"' not in json.dumps(before["phase1"])


def test_pictures_drawn_for_the_first_time_are_not_said_to_be_as_recorded(
    checkout: Checkout,
) -> None:
    checkout.djepa("compose", "scale=micro", "data.raw.pictures=20")
    (checkout.root / "data.dvc").unlink()
    assert "now recorded in data.dvc" in checkout.djepa("data")
    shutil.rmtree(checkout.root / "data")
    assert "as recorded in data.dvc" in checkout.djepa("data")


def test_edited_labels_rerun_the_critic_of_a_round_that_people_label(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dvc.repo import Repo

    monkeypatch.chdir(checkout.root)
    for folder in ("references/r1", "curated", "critics/r1", "metrics/critic"):
        Path(folder).mkdir(parents=True)
        Path(folder, "r1.json").write_text("{}")
    labels = Path("labels/r1.jsonl")

    def changed_by(line: str) -> dict[str, list]:
        """What DVC finds changed by a label after it took the critic for finished."""
        with Repo() as repo:
            repo.commit("critic@r1", force=True)
            assert repo.status("critic@r1") == {}
            labels.write_text(line)
        with Repo() as repo:
            return repo.status("critic@r1")

    assert changed_by('{"file": "00000/samples/0000.png", "label": true}\n') == {}
    compose(overrides=["feedback.rounds.r1.labels=r1"])
    again = changed_by('{"file": "00000/samples/0000.png", "label": false}\n')
    assert again == {"critic@r1": [{"changed deps": {"labels/r1.jsonl": "modified"}}]}


def test_a_round_without_its_labels_fails_with_the_commands_that_make_them(
    checkout: Checkout,
) -> None:
    checkout.djepa("compose", "feedback.rounds.r1.labels=people")
    labels = checkout.root / "labels" / "people.jsonl"
    assert labels.read_text() == ""
    references = checkout.root / "references" / "r1"
    for folder in (references, checkout.root / "curated"):
        folder.mkdir(parents=True)
    pd.DataFrame({"file": ["00000/samples/0000.png"], "label": [True]}).to_parquet(
        references / "references.parquet"
    )
    (checkout.root / "curated" / "x").write_text("x")
    way = "--job labels/r1 --out labels/people.jsonl` writes what people said"
    answer = checkout.call(sys.executable, "-m", "dvc", "repro", "-s", "critic@r1")
    said = answer.stdout + answer.stderr
    assert answer.returncode and "`djepa rate labels references/r1`" in said and way in said
    labels.unlink()
    answer = checkout.call(sys.executable, "-m", "components.cli", "stage", "critic@r1")
    assert answer.returncode == 2 and way in answer.stderr and "Traceback" not in answer.stderr


def test_a_model_scored_beside_is_a_stage_of_its_own_and_the_last_row(monkeypatch):
    monkeypatch.chdir(ROOT)
    params = composed(["scale=demo"])
    assert list(each("evaluate-beside@starter", params)) == ["starter"]
    assert "components/starter/model/transformer" in dependencies("evaluate-beside@starter", params)
    assert "samples/starter" in dependencies("compare-beside@starter", params)
    found = {f"evaluate/{name}": {} for name in ("aside", "dpo", "phase1", "r1")}
    found |= {f"train/{name}": {} for name in ("dpo", "phase1", "r1")}
    assert models(found) == ["phase1", "r1", "dpo", "aside"]
