"""evaluate, compare and report on a pipeline that draws the truth, or sometimes not."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from dvc_render.vega import VegaRenderer
from PIL import Image

from components.errors import UserError
from components.evaluation.compare import answers, compare, verdict
from components.evaluation.detector import Blob
from components.evaluation.evaluate import benchmark, evaluate, parse_size
from components.evaluation.report import report, table
from components.scenes import tasks
from components.scenes.draw import draw_scene
from components.scenes.world import World
from components.tracking import Tracker

ROOT = Path(__file__).parents[1]
DATA = yaml.safe_load((ROOT / "params/data/scenes.yaml").read_text())
# All the shapes there are, whatever the committed world uses.
DATA["shapes"] = ["circle", "square", "triangle", "cross", "ring", "bar"]
EVALUATION = yaml.safe_load((ROOT / "params/evaluation/default.yaml").read_text())
WORLD = World.from_params(DATA)
PARAMS: dict[str, Any] = {
    "scale": "micro",
    "seed": 0,
    "data": DATA,
    "evaluation": EVALUATION | {"pictures": 6, "images": 2, "bootstrap": 100},
}


class Truthful:
    """Draws what is asked for with probability `honesty`, else another prompt of the task."""

    def __init__(self, honesty: float) -> None:
        self.honesty = honesty
        self.by_prompt = {m["prompt"]: m for task in tasks.TASKS for m in WORLD.all_prompts(task)}

    def __call__(self, prompt: list[str], **settings: Any) -> SimpleNamespace:
        width, height = settings["width"], settings["height"]
        images = []
        for text, generator in zip(prompt, settings["generator"], strict=True):
            rng = np.random.default_rng(generator.initial_seed())
            metadata = self.by_prompt[text]
            if rng.random() > self.honesty:
                others = WORLD.all_prompts(metadata["tag"])
                metadata = others[int(rng.integers(len(others)))]
            scene = WORLD.scene_for(metadata, rng, width / height)
            images.append(Image.fromarray(draw_scene(scene, width, height, rng)))
        return SimpleNamespace(images=images)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluated")
    for name, honesty in (("phase1", 0.3), ("r1", 1.0)):
        evaluate(
            root / "models" / name,
            root / "samples" / name,
            root / "metrics" / "evaluate" / f"{name}.json",
            PARAMS,
            Tracker(),
            lambda model, honesty=honesty: Truthful(honesty),
        )
    samples = root / "samples"
    compare(samples / "r1", samples / "phase1", root / "metrics/compare/r1.json", PARAMS, Tracker())
    return root


def test_benchmark_has_as_many_pictures_of_each_task_and_split() -> None:
    chosen = benchmark(WORLD, EVALUATION)
    counts: dict[tuple[str, bool], int] = {}
    for metadata, n in chosen:
        key = (metadata["tag"], WORLD.is_held_out(metadata))
        counts[key] = counts.get(key, 0) + n
    assert set(counts.values()) == {EVALUATION["pictures"]}
    assert len(counts) == 11  # single_object has nothing to hold out
    assert sum(counts.values()) >= 600
    assert len({m["prompt"] for m, _ in chosen}) == len(chosen)


def test_result_is_held_out_with_seen_beside_it(evaluated: Path) -> None:
    result = json.loads((evaluated / "metrics/evaluate/r1.json").read_text())["geneval"]
    assert list(result["tasks"]) == list(tasks.TASKS)
    assert result["overall"] >= 0.97
    assert result["overall"] == result["held_out"]["overall"]
    assert result["seen"]["overall"] >= 0.97
    assert result["shared"] == ["single_object"]
    assert result["all"]["n"] == 66
    assert result["chance"] < 0.06
    assert result["difference"]["low"] > 0.8
    worse = json.loads((evaluated / "metrics/evaluate/phase1.json").read_text())["geneval"]
    assert worse["overall"] < 0.7
    assert worse["stderr"] > 0


def test_folder_is_the_official_one(evaluated: Path) -> None:
    folder = evaluated / "samples/r1"
    metadata = (folder / "00000/metadata.jsonl").read_text().splitlines()
    assert len(metadata) == 1
    assert set(json.loads(metadata[0])) <= {"tag", "include", "exclude", "prompt"}
    assert Image.open(folder / "00000/samples/0000.png").size == (32, 32)
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert len(lines) == 66
    assert lines[0]["filename"] == "00000/samples/0000.png"
    assert Image.open(folder / "grid.png").width > 500


def test_what_the_detector_saw_is_drawn_task_by_task(evaluated: Path) -> None:
    sheets = sorted((evaluated / "samples/phase1/seen").iterdir())
    assert sorted(sheet.stem for sheet in sheets) == sorted(tasks.TASKS)
    assert sum(sheet.stat().st_size for sheet in sheets) < 400_000
    for sheet in sheets:
        assert Image.open(sheet).width > 1000


def test_dvc_draws_what_the_report_wrote(evaluated: Path, tmp_path: Path) -> None:
    """The plots section of dvc.yaml, its templates and the files' fields belong together."""
    history = [{"step": i, "images": 8 * i, "flow": 1 / i, "jepa": 0.1} for i in (1, 2)]
    trained: dict[str, Any] = {"history": history, "final": {"flow": 0.5}}
    by: dict[str, Any] = {"rungs": {"32x32": 0.6}, "times": {"0-0.5": 0.7, "0.5-1": 0.5}}
    points = [point | by for point in history[1:]]
    trained["validation"] = {"flow": 0.6, "jepa": 0.2, **by, "pictures": 4, "history": points}
    preferred: dict[str, Any] = {"accuracy": 0.6, "margin": 0.2}
    preferred["history"] = [{"step": 0, "loss": 0.7, "accuracy": 0.5, "margin": 0.0}]
    metrics = tmp_path / "metrics"
    shutil.copytree(evaluated / "metrics", metrics)
    (metrics / "train").mkdir(exist_ok=True)
    (metrics / "train/r1.json").write_text(json.dumps(trained))
    (metrics / "train/dpo.json").write_text(json.dumps(preferred))
    report(metrics, tmp_path / "reports/run", tmp_path / "plots", PARAMS, Tracker())
    pipeline = yaml.safe_load((ROOT / "dvc.yaml").read_text())
    (folder,) = pipeline["metrics"]
    shown = {file.stem: json.loads(file.read_text()) for file in (tmp_path / folder).iterdir()}
    assert set(shown) == {"phase1", "r1", "dpo"}
    assert shown["dpo"] == {"accuracy": 0.6, "margin": 0.2}
    losses = {"flow": 0.5, "validation_flow": 0.6, "validation_jepa": 0.2}
    assert losses.items() <= shown["r1"].items()
    assert {"overall", "stderr", "chance", "counting", "seen", "win_rate"} <= set(shown["r1"])
    assert all(isinstance(value, float) for row in shown.values() for value in row.values())
    drawn = [entry for entry in pipeline["plots"] if isinstance(entry, dict)]
    assert len(drawn) == 3
    for entry in drawn:
        (settings,) = entry.values()
        ((file, field),) = settings["y"].items()
        settings["y"] = field
        points = [point | {"rev": "HEAD"} for point in json.loads((tmp_path / file).read_text())]
        assert all({"model", settings["x"], settings["y"]} <= set(point) for point in points)
        renderer = VegaRenderer(points, file, template_dir=str(ROOT / ".dvc/plots"), **settings)
        filled = renderer.get_filled_template()
        assert "DVC_METRIC" not in json.dumps(filled)
        assert len(filled["data"]["values"]) == len(points)
    points = json.loads((tmp_path / "reports/run/training.json").read_text())
    assert [p["value"] for p in points if p["set"] == "validation"] == [0.5, 0.1]


def test_win_rate(evaluated: Path, tmp_path: Path) -> None:
    outcome = json.loads((evaluated / "metrics/compare/r1.json").read_text())
    assert outcome["better"] + outcome["same"] + outcome["worse"] == outcome["n"] == 66
    points = outcome["better"] + outcome["same"] / 2
    assert outcome["win_rate"] == pytest.approx(points / 66, abs=1e-4)
    assert 0.6 < outcome["low"] <= outcome["win_rate"] <= outcome["high"]
    assert outcome["baseline"] == "phase1"
    samples = evaluated / "samples"
    self = compare(samples / "r1", samples / "r1", tmp_path / "c.json", PARAMS, Tracker())
    assert (self["win_rate"], self["same"]) == (0.5, 66)


def blob(shape: str, score: float = 0.99, fit: float = 0.9, color: str = "red") -> Blob:
    return Blob(shape, score, fit, color, (0, 0, 9, 9))


def test_the_next_question_counts_only_after_same() -> None:
    prompt = tasks.two_object("circle", "square")
    both = answers(prompt, [blob("circle", fit=0.8), blob("square", fit=0.8)])
    pretty_half = answers(prompt, [blob("circle", fit=1.0)])
    nothing = answers(prompt, [])
    messy = answers(prompt, [blob("circle"), blob("square"), blob("ring", score=0.1)])
    crowded = answers(prompt, [blob("circle"), blob("square"), blob("ring")])
    nicer = answers(prompt, [blob("circle", fit=0.95), blob("square", fit=0.95)])
    assert verdict(both, pretty_half, 0.01) == 1  # adherence before realism
    assert verdict(pretty_half, nothing, 0.01) == 1  # a clause met is more than none
    assert verdict(both, messy, 0.01) == verdict(both, crowded, 0.01) == 1  # coherence
    assert verdict(nicer, both, 0.01) == 1  # realism
    assert verdict(both, nicer, 0.2) == 0  # too near to call
    assert verdict(messy, both, 0.01) == -1


def test_other_prompts_cannot_be_compared(evaluated: Path, tmp_path: Path) -> None:
    samples = evaluated / "samples"
    other = PARAMS | {"evaluation": PARAMS["evaluation"] | {"pictures": 2, "seed": 5}}
    evaluate(
        tmp_path, tmp_path / "few", tmp_path / "few.json", other, Tracker(), lambda m: Truthful(1)
    )
    with pytest.raises(UserError, match="other prompts"):
        compare(tmp_path / "few", samples / "r1", tmp_path / "c.json", PARAMS, Tracker())


def test_report_and_table(evaluated: Path, tmp_path: Path) -> None:
    metrics = evaluated / "metrics"
    (metrics / "train").mkdir(exist_ok=True)
    shares = {"set": 0.6, "trained": 0.5, "target": 0.5}
    kinds = {"notion": {"values": {"red": shares, "blue": shares}}, "style": {"values": {}}}
    kinds["source"] = {
        "values": {"a": {"set": 0.6, "trained": 0.5}, "b": {"set": 0.4, "trained": 0.5}}
    }
    least = {"red": {"samples": 9, "never": 1, "draws_a_sample": 1.5}}
    coverage = {
        "samples": 9,
        "never": 2,
        "drawn": [2, 7],
        "attributes": {"notion": {"least": least}},
    }
    lines = [{"step": i, "images": 8 * i, "loss": 1 / i, "flow": 1 / i} for i in (1, 2)]
    phase1 = {"history": lines, "loss": 0.5, "sampling": {"kinds": kinds}, "name": "<b>"}
    phase1["coverage"] = coverage
    (metrics / "train/phase1.json").write_text(json.dumps(phase1))
    summary = report(metrics, tmp_path / "reports", tmp_path / "plots", PARAMS, Tracker())
    assert list(summary["models"]) == ["phase1", "r1"]
    assert summary["models"]["r1"]["win_rate"]["baseline"] == "phase1"
    assert json.loads((tmp_path / "reports/summary.json").read_text()) == summary
    page = (tmp_path / "reports/report.html").read_text()
    assert "http" not in page
    assert "<b>" not in page
    assert "data:image/png;base64," in page
    assert "| r1 |" in (tmp_path / "reports/report.md").read_text()
    for kind in ("scores", "notions-phase1", "sources-phase1", "curves-phase1", "coverage-phase1"):
        name = f"{kind}.png"
        assert Image.open(tmp_path / "plots" / name).width > 500
    # One picture for each plot and one for each model's grid.
    assert page.count("data:image/png;base64,") == 7
    reports = tmp_path / "reports"
    for name in ("samples.html", "tables.html", "tables.md", "tables.tex"):
        assert f'href="{name}"' in page
        assert (reports / name).stat().st_size > 1000
    # A sheet for each task and model.
    assert (reports / "samples.html").read_text().count("data:image/png;base64,") == 12
    said = table(metrics).splitlines()
    assert [line.split(" | ")[0].strip() for line in said[:3]] == ["model", "phase1", "r1"]
    assert all(len(line) <= 130 for line in said[:7])
    assert len({line.index("|") for line in said[:3]}) == 1


def test_report_says_so_when_there_is_nothing(tmp_path: Path) -> None:
    (tmp_path / "metrics").mkdir()
    assert "No model is evaluated" in table(tmp_path / "metrics")
    report(tmp_path / "metrics", tmp_path / "r", tmp_path / "p", PARAMS, Tracker())
    (tmp_path / "metrics/curate.json").write_text("{")
    with pytest.raises(UserError, match=r"curate\.json is no JSON"):
        table(tmp_path / "metrics")


def test_sizes() -> None:
    assert parse_size("48x32") == (48, 32)
    with pytest.raises(UserError, match="WIDTHxHEIGHT"):
        parse_size("48")


def test_evaluating_any_model_takes_nothing_away_from_another_folder(tmp_path: Path) -> None:
    from components.evaluation.alone import evaluate_alone

    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="theirs holds something else"):
        evaluate_alone(tmp_path / "model", tmp_path / "theirs", {})
    assert (tmp_path / "theirs" / "thesis.txt").read_text() == "years of work"
