"""The report's pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # the backend must be chosen first
import numpy as np
from matplotlib.ticker import MaxNLocator

from components.scenes.tasks import TASKS

CURVES = ("loss", "flow", "jepa", "gradient_norm", "rate", "accuracy", "margin", "winner")


def score_plot(models: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """scores.png: tasks and overall (± 1 standard error) of each model, and chance."""
    groups = [*TASKS, "overall", "overall, seen"]
    width = 0.8 / len(models)
    figure, axes = plt.subplots(figsize=(10, 4.2))
    for i, (name, scores) in enumerate(models.items()):
        seen = scores.get("seen", {})
        heights = [scores["tasks"].get(task, 0.0) for task in TASKS]
        heights += [scores["overall"], seen.get("overall", 0.0)]
        errors = [0.0] * len(TASKS) + [scores["stderr"], seen.get("stderr", 0.0)]
        floors = [scores["chance_tasks"].get(task, 0.0) for task in TASKS]
        floors += [scores["chance"], seen.get("chance", 0.0)]
        at = np.arange(len(groups)) + (i - (len(models) - 1) / 2) * width
        shown = [error if error else np.nan for error in errors]
        axes.bar(at, heights, width * 0.92, yerr=shown, label=name, capsize=3)
        axes.hlines(floors, at - width / 2, at + width / 2, colors="black", linestyles="dotted",
                    label="chance" if i == 0 else "_")  # fmt: skip
    axes.set_xticks(range(len(groups)), groups, rotation=20)
    axes.set_ylabel("share right, GenEval's rules")
    axes.set_ylim(0, 1)
    axes.legend(frameon=False, ncols=6, loc="lower left", bbox_to_anchor=(0, 1), fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(folder / "scores.png", dpi=110)
    plt.close(figure)


def attribute_plot(values: Mapping[str, Mapping[str, float]], name: str, path: Path) -> None:
    """Each attribute's share in the set and in what was trained on, with the target if any."""
    words = list(values)[:40]  # the most frequent ones; more names would not be read
    at = np.arange(len(words))
    figure, axes = plt.subplots(figsize=(10, 3.6))
    axes.bar(at - 0.2, [values[w]["set"] for w in words], 0.4, label="in the set")
    axes.bar(at + 0.2, [values[w]["trained"] for w in words], 0.4, label="trained on")
    if all("target" in values[w] for w in words):
        axes.plot(at, [values[w]["target"] for w in words], "k_", markersize=14, label="target")
    axes.set_xticks(at, words, rotation=60, ha="right", fontsize=8)
    axes.set_ylabel("share of its kind")
    axes.set_title(f"Statistical-analysis sampling: {name}", fontsize=10)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def coverage_plot(coverage: Mapping[str, Any], name: str, path: Path) -> None:
    """How often samples were drawn, and the notions of which the samples were drawn least."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    drawn = coverage["drawn"]
    left.bar(range(len(drawn)), drawn, 0.9, color=["tab:red"] + ["tab:blue"] * (len(drawn) - 1))
    left.set_xlabel("times trained on")
    left.set_ylabel("samples")
    left.set_title(f"never: {coverage['never']} of {coverage['samples']}", fontsize=10)
    least = coverage["attributes"]["notion"]["least"]
    right.barh(range(len(least)), [notion["draws_a_sample"] for notion in least.values()])
    right.set_yticks(range(len(least)), list(least), fontsize=8)
    right.invert_yaxis()
    right.set_xlabel("draws a sample")
    right.set_title("notions drawn least", fontsize=10)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Coverage, {name}", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def curve_plot(history: Sequence[Mapping[str, float]], name: str, path: Path) -> None:
    """A panel for each figure of a training history, by images seen, or by step."""
    across = "images" if "images" in history[0] else "step"
    shown = [k for k in history[0] if k in CURVES and all(k in line for line in history)]
    if not shown:
        return
    figure, panels = plt.subplots(
        1, len(shown), figsize=(3.4 * len(shown), 2.8), squeeze=False, layout="constrained"
    )
    for axes, key in zip(panels[0], shown, strict=True):
        axes.plot([line[across] for line in history], [line[key] for line in history])
        axes.set_title(key.replace("_", " "), fontsize=10)
        axes.set_xlabel("images seen" if across == "images" else across)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(name, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def validation_plot(validation: Mapping[str, Any], name: str, path: Path) -> None:
    """The losses held out: by rung over the images seen, and by t from the first point to the last.

    validation: that of metrics/train/NAME.json.
    """
    history = validation["history"]
    images = [point["images"] for point in history]
    wide = 3 if "jepa" in history[0] else 2
    figure, panels = plt.subplots(1, wide, figsize=(4 * wide, 3.6), layout="constrained")
    by_rung, by_time = panels[0], panels[1]
    for rung in validation["rungs"]:
        by_rung.plot(images, [point["rungs"][rung] for point in history], ".-", lw=1, label=rung)
    flow = [point["flow"] for point in history]
    by_rung.plot(images, flow, "k.-", lw=2.5, label="all")
    by_rung.set_title("flow error by size", fontsize=10)
    if len(validation["rungs"]) <= 12:  # more lines than that are no key
        by_rung.legend(frameon=False, fontsize=8, ncols=2)
    bins = list(validation["times"])
    for i, point in enumerate(history):
        shade = plt.get_cmap("viridis_r")(0.15 + 0.85 * i / max(len(history) - 1, 1))
        ends = i in (0, len(history) - 1)
        label = f"{point['images']:,} images" if ends else None
        values = [point["times"][each] for each in bins]
        by_time.plot(bins, values, "o-", color=shade, lw=2 if ends else 1, ms=4, label=label)
    by_time.set_title("flow error by t (0 noise, 1 data)", fontsize=10)
    by_time.set_xlabel("t")
    by_time.legend(frameon=False, fontsize=8)
    if wide == 3:
        panels[2].plot(images, [point["jepa"] for point in history], "k.-", lw=2)
        panels[2].set_title("JEPA loss", fontsize=10)
    for axes in panels:
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        if axes is not by_time:
            axes.set_xlabel("images seen")
            axes.xaxis.set_major_locator(MaxNLocator(4))
    figure.suptitle(
        f"Held out for validation, {name}: {validation['pictures']} pictures", fontsize=10
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
