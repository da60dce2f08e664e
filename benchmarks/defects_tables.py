"""Tables and plot of benchmarks/defects.py."""

import itertools
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from scipy.stats import mannwhitneyu, norm

from components.curation.database import open_database
from components.curation.detectors import Nsfw, Text
from components.curation.duplicates import Comparison
from components.curation.filters import Filter, cheap_filters

OWN = {"blank": "contrast", "noisy": "noise", "blurred": "sharpness", "lettering": "text"}
SLIGHT = {"slightly noisy": "noise", "slightly blurred": "sharpness"}
LINE_SCORES = (0.8, 0.9, 0.95)  # tried besides the default
TRIED = {
    "contrast": [8, 16, 24, 32, 48],
    "noise": [6, 8, 10, 12, 14, 16],
    "sharpness": [0.2, 0.23, 0.25, 0.27, 0.3, 0.35, 0.4],
}
REPEATS = ("exact copy", "JPEG q80", "resized 0.9", "2 % cut off each edge", "brightness +8")
DISTANCES, COLOURS = (16, 32, 48, 64), (6.0, 10.0)
SETS = ("scenes", "photographs", "half A", "half B")


def looking(curation: dict[str, Any]) -> list[Filter]:
    """The cheap filters that look at pixels."""
    return [f for f in cheap_filters(curation) if f.name not in ("caption", "resolution")]


def rate(found: Any) -> str:
    """`97.2 % [95.4, 98.3] of 500`: the share that is true with its 95 % Wilson interval."""
    n, k = len(found), int(np.sum(found))
    if not n:
        return "–"
    z, p = float(norm.ppf(0.975)), k / n
    middle = (p + z * z / 2 / n) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return f"{100 * p:.1f} % [{100 * low:.1f}, {100 * high:.1f}] of {n}"


def table(head: list[str], rows: list[list[str]]) -> None:
    """Print a markdown table."""
    for cells in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(cells) + " |")
    print()


def part(scores: pd.DataFrame, name: str, kind: str) -> pd.DataFrame:
    """The rows of a set (photographs: both halves) with this defect."""
    chosen = scores["set"] != "scenes" if name == "photographs" else scores["set"] == name
    return scores[chosen & (scores["kind"] == kind)]


def rejected(rows: pd.DataFrame, filters: list[Filter]) -> np.ndarray:
    """Whether any of the filters rejects, bool (rows,)."""
    return np.any([~f.keeps(rows[f.name].to_numpy()) for f in filters], axis=0)


def report(scores: pd.DataFrame, curation: dict[str, Any]) -> None:
    """Print all tables."""
    cheap = looking(curation)
    filters = {f.name: f for f in [*cheap, Text(curation["text"], 0), Nsfw(curation["nsfw"], 0)]}
    read = scores[scores["text"].notna()]  # all filters looked at these
    print("\n## Recall by the defect's own filter, and by any\n")
    body = []
    for kind, name in (OWN | SLIGHT).items():
        rows = read if kind == "lettering" else scores
        for label, stages in ((name, [filters[name]]), ("any", list(filters.values()))):
            found = [rate(rejected(part(rows, group, kind), stages)) for group in SETS]
            body.append([kind, label, *found])
    table(["defect", "filter", *SETS], body)
    print("## Sound pictures rejected\n")
    body = []
    for name, stage in filters.items():
        rows = read if name in ("text", "nsfw") else scores
        body.append([name, *(rate(rejected(part(rows, group, ""), [stage])) for group in SETS)])
    found = [rate(rejected(part(read, group, ""), list(filters.values()))) for group in SETS]
    body.append(["all", *found])
    table(["filter", *SETS], body)
    print("## Sound crops rejected, by photograph (median score)\n")
    body = []
    for name, rows in part(scores, "photographs", "").groupby("source"):
        cells = []
        for stage in filters.values():
            known = rows[rows[stage.name].notna()]
            if known.empty:
                cells.append("–")
                continue
            share = 100 * rejected(known, [stage]).mean()
            cells.append(f"{share:.0f} % ({known[stage.name].median():.3g})")
        body.append([str(name), rows["set"].iloc[0][-1], str(len(rows)), *cells])
    table(["photograph", "half", "crops", *filters], body)
    report_thresholds(scores, filters)
    report_repeats(scores)


def report_thresholds(scores: pd.DataFrame, filters: dict[str, Filter]) -> None:
    """Print AUROC, thresholds to choose from, and what the gate before the reader lets through."""
    print("## AUROC\n")
    body = []
    for kind, name in (OWN | SLIGHT).items():
        cells = []
        for group in SETS:
            bad, good = (part(scores, group, k)[name].dropna() for k in (kind, ""))
            area = mannwhitneyu(bad, good).statistic / len(bad) / len(good)
            cells.append(f"{1 - area if filters[name].keep_high else area:.4f}")
        body.append([kind, name, *cells])
    table(["defect", "score", *SETS], body)
    print("## Thresholds: found and falsely rejected, %\n")
    for kind, name in (("blank", "contrast"), ("noisy", "noise"), ("blurred", "sharpness")):
        body = []
        for value in TRIED[name]:
            stage = filters[name]
            chosen = stage.threshold
            stage.threshold = value
            cells = [f"**{value:g}**" if value == chosen else f"{value:g}"]
            for group in SETS:
                kinds = [kind, "", *([f"slightly {kind}"] if kind != "blank" else [])]
                shares = [100 * rejected(part(scores, group, k), [stage]).mean() for k in kinds]
                slight = f" (slight {shares[2]:.1f})" if len(shares) > 2 else ""
                cells.append(f"{shares[0]:.1f}{slight} / {shares[1]:.1f}")
            stage.threshold = chosen
            body.append(cells)
        table([f"{name}: {kind} / sound", *SETS], body)
    print("## Lettering read / sound pictures rejected, %\n")
    columns = {"default": "text"} | {str(least): f"text {least}" for least in LINE_SCORES}
    body = []
    for label, column in columns.items():
        cells = []
        for group in SETS:
            both = [part(scores, group, k)[column].dropna() > 0 for k in ("lettering", "")]
            cells.append(f"{100 * both[0].mean():.1f} / {100 * both[1].mean():.1f}")
        body.append([label, *cells])
    table(["text.line_score", *SETS], body)
    print("## Gate before the reader: lettering that passes it / sound pictures read, %\n")
    body = []
    for value in (1, 2, 3, 5, 7):
        cells = []
        for group in SETS:
            both = [part(scores, group, k)["gate"].dropna() >= value for k in ("lettering", "")]
            cells.append(f"{100 * both[0].mean():.1f} / {100 * both[1].mean():.1f}")
        body.append([str(value), *cells])
    table(["gate.threshold", *SETS], body)


def stacked(rows: pd.DataFrame, column: str) -> np.ndarray:
    """The bytes of a column, uint8 (rows, bytes)."""
    return np.stack([np.frombuffer(value, np.uint8) for value in rows[column]])


def near(rows: pd.DataFrame, distance: int, colour: float) -> dict[int, int]:
    """Row of a near duplicate -> row of the picture it repeats, as curation finds them."""
    numbers = range(len(rows))
    names = [str(i) for i in numbers]
    with tempfile.TemporaryDirectory() as folder, open_database(Path(folder) / "db", "512MB") as db:
        comparison = Comparison(db, distance)
        comparison.add("all", numbers, names, names, rows["phash"].tolist(), rows["thumb"].tolist())
        comparison.find(colour)
        comparison.write(Path(folder) / "repeats.parquet")
        found = pd.read_parquet(Path(folder) / "repeats.parquet")
    return {row: int(first) for row, first in zip(found["row"], found["first"], strict=True)}


def report_repeats(scores: pd.DataFrame) -> None:
    """Print which repeats are found, and how many different pictures are taken for one."""
    print("## Repeats found, by duplicates.distance and duplicates.colour\n")
    body = []
    for group, distance, colour in itertools.product(
        ("scenes", "half A", "half B"), DISTANCES, COLOURS
    ):
        first = part(scores, group, "")
        hashes, thumbs = stacked(first, "phash"), stacked(first, "thumb")
        cells = [group, f"{distance}, {colour:g}"]
        for kind in REPEATS:
            again = part(scores, group, kind)
            # Each repeat against its own picture, by the two rules of duplicates.py.
            bits = np.bitwise_count(hashes ^ stacked(again, "phash")).sum(axis=1, dtype=int)
            levels = np.abs(thumbs.astype(int) - stacked(again, "thumb")).mean(axis=1)
            cells.append(rate((bits <= distance) & (levels <= colour)))
        names = first["source"].tolist()
        dropped = near(first, distance, colour)
        cells.append(rate([i in dropped and names[dropped[i]] != names[i]
                           for i in range(len(names))]))  # fmt: skip
        body.append(cells)
    table(["set", "distance, colour", *REPEATS, "different pictures dropped"], body)


def draw(scores: pd.DataFrame, curation: dict[str, Any], path: Path) -> None:
    """Histograms of each score, sound against defect, with the threshold."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = {f.name: f.threshold for f in cheap_filters(curation)}
    lines["text"] = curation["text"]["area"]
    ranges = {"contrast": (0, 256), "noise": (0, 45), "sharpness": (0, 1), "text": (0, 0.3)}
    figure, axes = plt.subplots(2, 4, figsize=(13, 5), constrained_layout=True)
    for row, group in zip(axes, ("scenes", "photographs"), strict=True):
        for axis, (kind, name) in zip(row, OWN.items(), strict=True):
            kinds = ["", kind, *([f"slightly {kind}"] if f"slightly {kind}" in SLIGHT else [])]
            for label, colour in zip(kinds, ("tab:green", "tab:red", "tab:orange"), strict=False):
                values = part(scores, group, label)[name].dropna()
                axis.hist(
                    values, bins=60, range=ranges[name], alpha=0.6, color=colour,
                    weights=np.full(len(values), 1 / len(values)), label=label or "sound",
                )  # fmt: skip
            axis.axvline(lines[name], color="black", linewidth=1, linestyle="--")
            axis.set(title=f"{group}: {name}", yscale="log")
            axis.legend(fontsize=7)
    figure.savefig(path, dpi=80)
