"""report.html: what the filters did, with pictures; one file that needs no network."""

import base64
import html
import io
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from components.curation.filters import Filter
from components.curation.passes import Job
from components.curation.pictures import DamagedPicture, decode
from components.curation.shards import read_shard
from components.curation.summary import Summary
from components.files import atomic_file

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 68em; padding: 0 1em }
table { border-collapse: collapse } td, th { padding: .15em .8em; text-align: right }
td:first-child, th:first-child { text-align: left } tr:nth-child(even) { background: #f4f4f2 }
figure { display: inline-block; margin: .2em; text-align: center; font-size: 11px }
figure img { height: 96px } h2 { margin-top: 2em } .part { color: #555 }
"""


def write_report(
    path: Path, source: Path, shards: Sequence[Path], job: Job, summary: Summary
) -> None:
    """Write the report of a finished run to `path`; pictures come from the raw shards."""
    shown = _pictures(shards, job, (p for heap in summary.nearest.values() for p in heap))
    figures = summary.figures()
    parts = [
        f"<h1>Curation of {html.escape(source.name)}</h1>",
        f"<p>{figures['kept']} of {figures['total']} pictures kept "
        f"({100 * figures['kept_share']:.1f} %), {100 * figures['synthetic_share']:.1f} % of them "
        "synthetic. A picture is rejected by the first filter it does not pass.</p>",
        _table(("filter", "rejected"), figures["rejected"].items()),
        _gates(figures["gates"]),
        _truth(figures["ground_truth"]),
    ]
    stages = {f.name: f for f in summary.filters}
    for name in summary.names:
        parts.append(_filter(name, stages.get(name), summary, shown))
    parts += ["<h2>Notions</h2>", _table(("notion", "captions"), figures["notions"].items())]
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><title>Curation</title>"
        f"<style>{STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )
    with atomic_file(path) as temporary:
        temporary.write_text(page)


def _pictures(
    shards: Sequence[Path], job: Job, places: Iterable[tuple[float, str, str, float]]
) -> dict[tuple[str, str], str]:
    """Read the pictures at the places and return small JPEG data URIs by (shard, key)."""
    wanted: dict[str, set[str]] = defaultdict(set)
    for _, stem, key, _ in places:
        wanted[stem].add(key)
    shown: dict[tuple[str, str], str] = {}
    side = int(job.curation["report"]["thumbnail"])
    limits = job.curation["limits"]
    for shard in shards:
        keys = wanted.get(shard.stem)
        for sample in read_shard(shard, limits) if keys else ():
            if sample.key not in (keys or ()) or sample.error:
                continue
            try:
                pixels = decode(sample.members[sample.extension], limits)
            except DamagedPicture:
                continue
            image = Image.fromarray(pixels)
            image.thumbnail((side * 2, side))
            shown[shard.stem, sample.key] = _uri(image, "JPEG", quality=80)
    return shown


def _filter(
    name: str, stage: Filter | None, summary: Summary, shown: Mapping[tuple[str, str], str]
) -> str:
    """One filter's section: histogram, just kept, just rejected, reasons."""
    parts = [f"<h2>{name}: {summary.rejected[name]} rejected</h2>"]
    if stage is not None and summary.histograms[name].sum():
        parts.append(f'<img src="{_histogram(stage, summary)}" alt="scores of {name}">')
    for kept, title in ((True, "just kept"), (False, "rejected, nearest to the threshold")):
        heap = sorted(summary.nearest.get((name, kept), ()), reverse=True)
        cells = [
            f'<figure><img src="{shown[shard, key]}" alt="{key}"><br>{key}<br>{score:.3g}</figure>'
            for _, shard, key, score in heap
            if (shard, key) in shown
        ]
        if cells:
            parts.append(f"<p class=part>{title}</p>{''.join(cells)}")
    if summary.reasons.get(name):
        lines = "".join(f"<li>{html.escape(text)}" for text in summary.reasons[name])
        parts.append(f"<ul class=part>{lines}</ul>")
    return "".join(parts)


def _histogram(stage: Filter, summary: Summary) -> str:
    """The scores' histogram with the threshold drawn, as a PNG data URI."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 1.8), dpi=80, layout="tight")
    axes = figure.subplots()
    edges, counts = summary.edges[stage.name], summary.histograms[stage.name]
    axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color="#7a9cc6", log=True)
    if np.isfinite(stage.threshold):
        axes.axvline(stage.threshold, color="#c0392b")
    axes.set_xlabel(f"{stage.name} (last bar: and above)", fontsize=8)
    axes.tick_params(labelsize=7)
    buffer = io.BytesIO()
    # No version, no date: the same scores give the same bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _gates(gates: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        (n, g["suspects"], g["suspects_found"], g["sampled"], g["sampled_found"], g["passed"],
         "not known" if g["recall"] is None else f"{g['recall']:.3f} (≥ {g['recall_low']:.3f})")
        for n, g in gates.items()
    ]  # fmt: skip
    head = ("gate", "suspects", "found", "random others", "found", "not examined", "recall")
    return (
        "<h2>Gates</h2><p class=part>Recall: suspects found over all there are, estimated from "
        "the random others; in brackets its lower 95 % bound.</p>" + _table(head, rows)
    )


def _truth(truth: Mapping[str, Any] | None) -> str:
    if not truth:
        return ""
    sound = truth["sound"]
    rows = [
        (kind, row["count"], row["rejected"], f"{row['recall']:.3f}",
         ", ".join(f"{n} {c}" for n, c in row["by"].items()))
        for kind, row in truth["defects"].items()
    ]  # fmt: skip
    wrong = ", ".join(f"{n} {c}" for n, c in sound["rejected_by"].items())
    return (
        "<h2>Against the ground truth</h2>"
        f"<p>{sound['passed']} of {sound['count']} sound pictures pass "
        f"({100 * sound['share']:.2f} %); the others: {wrong or 'none'}.</p>"
        + _table(("defect", "pictures", "rejected", "recall", "by"), rows)
        + _table(("filter", "precision"), truth["precision"].items())
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    top = "".join(f"<th>{html.escape(name)}" for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}" for cell in row) for row in rows
    )
    return f"<table><tr>{top}{body}</table>"


def _uri(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()
