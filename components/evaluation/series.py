"""What `dvc plots` draws, a record a point, and what `dvc metrics` shows, a row a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.files import write_json
from components.scenes.tasks import TASKS

Series = list[dict[str, Any]]
LOSSES = ("flow", "jepa")
PREFERENCE = ("loss", "accuracy", "margin", "winner")


def training(found: Mapping[str, Any]) -> Series:
    """Losses by images seen in all; `set`: training, or validation where it was measured.

    The two are on other draws of t (docs/validation.md): each compares with itself only.
    found: metrics by path, see report.read_metrics.
    """
    series: Series = []
    for model, values in _trained(found):
        held_out = values.get("validation", {}).get("history", [])
        for name, lines in (("training", values.get("history", [])), ("validation", held_out)):
            known = [line for line in lines if "images" in line]
            series += [
                {"model": model, "set": name, "figure": figure, "images": line["images"],
                 "value": line[figure]}
                for figure in LOSSES for line in known if figure in line
            ]  # fmt: skip
    return series


def preference(found: Mapping[str, Any]) -> Series:
    """What preference optimisation came to, by its steps."""
    return [
        {"model": model, "set": "held-out pairs", "figure": figure, "step": line["step"],
         "value": line[figure]}
        for model, values in _trained(found) for figure in PREFERENCE
        for line in values.get("history", []) if "margin" in line and figure in line
    ]  # fmt: skip


def scores(found: Mapping[str, Any], models: Sequence[str]) -> Series:
    """Overall and each task of each model, with its chance floor."""
    series: Series = []
    for model in models:
        geneval = found[f"evaluate/{model}"]["geneval"]
        rows = [("overall", geneval["overall"], geneval["chance"])]
        tasks = [task for task in TASKS if task in geneval["tasks"]]
        rows += [(task, geneval["tasks"][task], geneval["chance_tasks"][task]) for task in tasks]
        series += [
            {"model": model, "task": task, "score": score, "chance": chance}
            for task, score, chance in rows
        ]
    return series


def headline(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A few figures of each model, and of curation: small enough for a table in a terminal."""
    rows: dict[str, dict[str, Any]] = {}
    for path, values in found.items():
        kind, _, name = path.partition("/")
        row: dict[str, Any] = {}
        if kind == "evaluate":
            geneval = values["geneval"]
            row = {key: geneval[key] for key in ("overall", "stderr", "chance")} | geneval["tasks"]
            row |= {
                split: geneval[split]["overall"] for split in ("seen", "all") if split in geneval
            }
        elif kind == "compare":
            row = {key: values[key] for key in ("win_rate",) if key in values}
        elif kind == "train":
            row = {key: values[key] for key in ("accuracy", "margin") if key in values}
            row |= {key: v for key, v in values.get("final", {}).items() if key in LOSSES}
            held_out = values.get("validation", {})
            row |= {f"validation_{key}": held_out[key] for key in LOSSES if key in held_out}
        elif kind == "critic":
            row = {"critic_auroc": values["auroc"]} if "auroc" in values else {}
        elif kind in ("compbench", "genai"):
            graded = values.get("categories", values.get("skills", {}))
            row = {f"{kind}_{key}": one["score"] for key, one in graded.items()}
        elif path == "curate":
            name, row = "curation", {k: values[k] for k in ("total", "kept") if k in values}
        if row:
            rows.setdefault(name, {}).update(row)
    return rows


def write_series(found: Mapping[str, Any], models: Sequence[str], folder: Path) -> None:
    """Write training.json, preference.json and scores.json, those that have a point."""
    all_of_them = {
        "training": training(found),
        "preference": preference(found),
        "scores": scores(found, models),
    }
    for name, series in all_of_them.items():
        if series:
            write_json(folder / f"{name}.json", series)


def _trained(found: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(k.removeprefix("train/"), v) for k, v in found.items() if k.startswith("train/")]
