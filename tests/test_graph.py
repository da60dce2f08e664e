"""The whole graph at scale micro, run once by the flow, then looked at as a user would."""

import json
import shutil
import sqlite3
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import yaml
from PIL import Image

from components.scenes.world import World
from tests.conftest import Checkout


def runs(checkout: Checkout) -> pd.DataFrame:
    """Name, status, parent and stage of every run in the checkout's sqlite store."""
    with sqlite3.connect(checkout.root / ".djepa" / "mlflow.db") as store:
        frame = pd.read_sql("select run_uuid, name, status from runs", store)
        tags = pd.read_sql("select run_uuid, key, value from tags", store)
    wide = tags.pivot(index="run_uuid", columns="key", values="value").reset_index()
    return frame.merge(wide, on="run_uuid")


def metric_names(checkout: Checkout, run: str) -> set[str]:
    with sqlite3.connect(checkout.root / ".djepa" / "mlflow.db") as store:
        rows = store.execute("select distinct key from metrics where run_uuid = ?", (run,))
        return {row[0] for row in rows}


def copy(checkout: Checkout, target: Path) -> Checkout:
    """A copy of a finished checkout that a test may change."""
    shutil.copytree(checkout.root, target, symlinks=True)
    environment = checkout.environment | {
        "DJEPA_HOME": str(target / ".djepa"),
        "PREFECT_HOME": str(target / ".djepa" / "prefect"),
    }
    return Checkout(target, environment)


def stages(checkout: Checkout) -> list[str]:
    """Of the graph; dvc.lock may have those of other scales too."""
    return checkout.dvc("stage", "list", "--name-only").split()


def test_every_stage_left_its_files(micro: Checkout) -> None:
    for name in (
        "curated/manifest.parquet",
        "curated/report.html",
        "encoded/index.parquet",
        "models/phase1/model_index.json",
        "models/r1/model_index.json",
        "models/dpo/model_index.json",
        "critics/r1/scores.parquet",
        "references/r1/references.parquet",
        "samples/dpo/00000/metadata.jsonl",
        "samples/dpo/grid.png",
        "metrics/evaluate/dpo.json",
        "metrics/compare/dpo.json",
        "reports/run/report.html",
    ):
        assert (micro.root / name).exists(), name


def test_scores_come_with_floor_error_and_both_splits(micro: Checkout) -> None:
    evaluated = json.loads((micro.root / "metrics/evaluate/dpo.json").read_text())
    trained = json.loads((micro.root / "metrics/train/phase1.json").read_text())
    assert evaluated["parameters"] == trained["parameters"]
    result = evaluated["geneval"]
    tasks = {"single_object", "two_object", "counting", "colors", "position", "color_attr"}
    assert set(result["tasks"]) == tasks
    assert 0 <= result["overall"] <= 1
    assert {"chance", "stderr", "n", "seen", "held_out"} <= set(result)
    mean = sum(result["tasks"].values()) / 6
    assert result["overall"] == pytest.approx(mean, abs=1e-4)


def test_held_out_combinations_are_in_nothing_that_trains(micro: Checkout) -> None:
    params = yaml.safe_load((micro.root / "params.yaml").read_text())
    world = World.from_params(params["data"])
    held_out = {m["prompt"] for task in world.TASKS for m in world.prompts("held_out", task)}
    manifest = pd.read_parquet(micro.root / "curated/manifest.parquet")
    references = pd.read_parquet(micro.root / "references/r1/references.parquet")
    assert held_out
    assert not held_out & set(manifest["caption"])
    assert not held_out & set(references["prompt"])


def test_tables_and_pictures_are_published(micro: Checkout) -> None:
    """By Prefect as artifacts, by MLflow beside the runs, by DVC in a short row a model."""
    with sqlite3.connect(micro.root / ".djepa/prefect/prefect.db") as database:
        artifacts = dict(database.execute("select key, data from artifact"))
    assert {"curation", "report", "tables", "table-2", "scores"} <= set(artifacts)
    rows = json.loads(json.loads(artifacts["table-2"]))
    assert {"dpo †, held-out", "D-JEPA·T2I"} <= {row["Model"] for row in rows}
    kept = {path.name for path in (micro.root / ".djepa").rglob("artifacts/**/*.*")}
    assert {"tables.md", "tables.tex", "samples.html", "color_attr.png"} <= kept
    shown = json.loads(micro.dvc("metrics", "show", "--json"))[""]["data"]
    assert {Path(path).stem for path in shown} == {"phase1", "r1", "dpo", "curation"}
    assert all(len(file["data"]) < 25 for file in shown.values())


def test_one_parent_with_a_finished_child_a_stage(micro: Checkout) -> None:
    frame = runs(micro)
    parents = frame[frame["kind"] == "pipeline"]
    children = frame[frame["kind"] == "stage"]
    assert len(parents) == 1
    assert set(children["mlflow.parentRunId"]) == set(parents["run_uuid"])
    assert set(frame["status"]) == {"FINISHED"}
    ran = Counter(stage.replace("@", "-") for stage in children["stage"])
    assert ran == Counter(stage.replace("@", "-") for stage in stages(micro))
    assert set(children["scale"]) == {"micro"}


def test_curves_by_step_and_by_images_and_final_figures_on_the_parent(micro: Checkout) -> None:
    frame = runs(micro)
    phase1 = frame[frame["stage"] == "phase1"]["run_uuid"].item()
    names = metric_names(micro, phase1)
    assert any(name.startswith("by_images/") for name in names)
    assert "seconds" in names
    parent = frame[frame["kind"] == "pipeline"]["run_uuid"].item()
    shared = {"geneval.overall", "geneval.chance", "geneval.tasks.colors", "win_rate", "images"}
    figures = metric_names(micro, parent)
    assert {"evaluate/dpo/geneval.overall", "compare/dpo/win_rate", *shared} <= figures


def test_second_repro_does_nothing_and_leaves_no_runs(micro: Checkout) -> None:
    before = len(runs(micro))
    answer = micro.dvc("repro")
    assert "Running stage" not in answer
    assert len(runs(micro)) == before


def test_one_parameter_reruns_only_what_depends_on_it(micro: Checkout, tmp_path: Path) -> None:
    changed = copy(micro, tmp_path / "changed")
    changed.djepa("compose", "scale=micro", "evaluation.sampler.guidance_scale=2.0")
    answer = changed.dvc("repro")
    again = {line.split("'")[1] for line in answer.splitlines() if line.startswith("Running stage")}
    # Every picture changes, nothing is trained again.
    drawn = {"evaluate-phase1", "evaluate@r1", "evaluate-dpo"}
    assert again == drawn | {"compare@r1", "compare-dpo", "report"}


def test_composing_then_a_bare_experiment_changes_nothing(micro: Checkout, tmp_path: Path) -> None:
    same = copy(micro, tmp_path / "same")
    params, lock = ((same.root / name).read_bytes() for name in ("params.yaml", "dvc.lock"))
    same.djepa("compose")
    same.ok("git", "add", "-A")
    same.ok("git", "commit", "-qm", "micro")
    same.dvc("exp", "run")
    assert (same.root / "params.yaml").read_bytes() == params
    assert (same.root / "dvc.lock").read_bytes() == lock


def test_generate_writes_a_png_of_the_size_asked(micro: Checkout, tmp_path: Path) -> None:
    out = tmp_path / "circle.png"
    micro.djepa("generate", "a photo of a red circle", "--size", "48x32", "--out", str(out))
    with Image.open(out) as picture:
        assert picture.size == (48, 32)


def test_summary_names_models_and_where_to_look(micro: Checkout) -> None:
    text = micro.djepa("summary")
    for word in ("phase1", "r1", "dpo", "single_object", "grid.png", "make ui"):
        assert word in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("generate", "a circle", "--model", "nowhere"), "nowhere"),
        (("generate", "a circle", "--size", "big"), "WxH"),
        (("generate", " "), "prompt is empty"),
        (("stage", "phase9"), "phase9"),
        (("curate", "nowhere", "out"), "nowhere"),
    ],
)
def test_wrong_arguments_are_one_sentence(
    micro: Checkout, arguments: tuple[str, ...], said: str
) -> None:
    answer = micro.call(sys.executable, "-m", "components.cli", *arguments)
    assert answer.returncode == 2
    assert said in answer.stderr
    assert "Traceback" not in answer.stderr


def test_changed_raw_pictures_are_refused_before_anything_is_retrained(
    micro: Checkout, tmp_path: Path
) -> None:
    changed = copy(micro, tmp_path / "changed")
    shard = sorted((changed.root / "data").glob("*.tar"))[0]
    shard.chmod(0o644)
    shard.write_bytes(shard.read_bytes() + b"\0" * 512)
    model = (changed.root / "models/phase1/model_index.json").stat().st_mtime_ns
    answer = changed.call(sys.executable, "-m", "dvc", "repro")
    assert answer.returncode != 0
    assert "nothing was retrained" in answer.stdout + answer.stderr
    assert (changed.root / "models/phase1/model_index.json").stat().st_mtime_ns == model


def test_lost_raw_pictures_are_drawn_again_as_recorded(micro: Checkout, tmp_path: Path) -> None:
    lost = copy(micro, tmp_path / "lost")
    record = (lost.root / "data.dvc").read_text()
    shutil.rmtree(lost.root / "data")
    assert "as recorded" in lost.djepa("data")
    assert (lost.root / "data.dvc").read_text() == record


def test_a_record_of_lost_results_does_not_hide_what_the_run_cache_has(
    micro: Checkout, tmp_path: Path
) -> None:
    """As on a clone whose dvc.lock another machine made, with its own seconds in the figures."""
    clone = copy(micro, tmp_path / "clone")
    lock = yaml.safe_load((clone.root / "dvc.lock").read_text())
    lock["stages"]["curate"]["outs"][1]["md5"] = "0" * 32
    (clone.root / "dvc.lock").write_text(yaml.safe_dump(lock))
    assert "results of 1 stages that are neither here nor in DVC's cache (curate)" in clone.djepa(
        "data"
    )
    assert "'curate' is cached - skipping run" in clone.dvc("repro", "--single-item", "curate")
    assert "dvc.lock" not in clone.djepa("data")
