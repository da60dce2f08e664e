"""The comparison's pictures: a line or a bar a row, errors over seeds."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # the backend must be chosen first
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from components.comparison.rows import Row
from components.files import atomic_file
from components.scenes.tasks import TASKS

PANELS = {
    "scores.png": (
        ("held-out prompts", "by_images/geneval.overall", "geneval.chance"),
        ("all prompts", "by_images/geneval.all.overall", "geneval.all.chance"),
    ),
    "losses.png": (
        ("training loss", "by_images/train/loss", None),
        ("flow error held out for validation", "by_images/validation/flow", None),
    ),
}
WORDS = {
    "scores.png": "GenEval overall by images seen, mean ± standard error over seeds",
    "losses.png": "Losses by images seen, mean ± standard error over seeds",
    "tasks.png": "GenEval's tasks, held out, with the chance floor",
}


def write_plots(rows: Sequence[Row], folder: Path) -> dict[str, str]:
    """Write those that have a point; returns what each shows, by file name."""
    figures = {name: _curves(rows, panels) for name, panels in PANELS.items()}
    figures["tasks.png"] = _tasks(rows)
    written = {}
    for name, figure in figures.items():
        if figure is None:
            (folder / name).unlink(missing_ok=True)  # of an earlier comparison
            continue
        with atomic_file(folder / name) as temporary:
            figure.savefig(temporary, dpi=110, format="png")
        plt.close(figure)
        written[name] = WORDS[name]
    return written


def _curves(rows: Sequence[Row], panels: Sequence[tuple[str, str, str | None]]) -> Figure | None:
    known = [panel for panel in panels if any(row.curve(panel[1]) for row in rows)]
    if not known:
        return None
    figure, axes = plt.subplots(
        1, len(known), figsize=(5 * len(known), 4), squeeze=False, layout="constrained"
    )
    for panel, (title, metric, chance) in zip(axes[0], known, strict=True):
        for number, row in enumerate(rows):
            _line(panel, row, metric, f"C{number % 10}")
        if chance:
            floor = np.nanmean([_mean(row, chance) for row in rows])
            panel.axhline(float(floor), color="k", ls=":", label="chance")
            panel.set_ylim(bottom=0)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("images seen")
        panel.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("GenEval overall" if known[0][2] else "loss")
    axes[0][0].legend(frameon=False, fontsize=8)
    return figure


def _line(axes: Axes, row: Row, metric: str, color: str) -> None:
    points = row.curve(metric)
    if not points:
        return
    x, y, error = (np.array(column) for column in zip(*points, strict=True))
    label = row.name if len(row.parents) == 1 else f"{row.name}, {len(row.parents)} seeds"
    axes.plot(x, y, "o-" if len(x) < 10 else "-", color=color, ms=4, lw=1.2, label=label)
    if error.any():
        axes.fill_between(x, y - error, y + error, color=color, alpha=0.2, lw=0)


def _tasks(rows: Sequence[Row]) -> Figure | None:
    shown = [row for row in rows if row.figure(f"geneval.tasks.{TASKS[0]}")]
    if not shown:
        return None
    figure, axes = plt.subplots(figsize=(10, 4.2), layout="constrained")
    width = 0.8 / len(shown)
    for number, row in enumerate(shown):
        at = np.arange(len(TASKS)) + (number - (len(shown) - 1) / 2) * width
        heights = [_mean(row, f"geneval.tasks.{task}") for task in TASKS]
        errors = [_mean(row, f"geneval.tasks.{task}", "stderr") for task in TASKS]
        axes.bar(at, heights, width * 0.92, yerr=errors, capsize=2, label=row.name,
                 color=f"C{number % 10}")  # fmt: skip
        floors = [_mean(row, f"geneval.chance_tasks.{task}") for task in TASKS]
        axes.hlines(floors, at - width / 2, at + width / 2, colors="k", linestyles="dotted",
                    label="chance" if number == 0 else "_")  # fmt: skip
    axes.set_xticks(range(len(TASKS)), TASKS, rotation=15)
    axes.set_ylabel("share right, GenEval's rules")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8, ncols=4)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _mean(row: Row, name: str, part: str = "mean") -> float:
    """A figure's mean or standard error over seeds, NaN (which is not drawn) if not known."""
    value = (row.figure(name) or {}).get(part)
    return np.nan if value is None else value
