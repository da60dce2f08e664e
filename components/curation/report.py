"""report.html: what the filters did, with pictures; one file that needs no network."""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from PIL import Image

from components.curation import plots
from components.curation.filters import Filter
from components.curation.notions import NotionTables
from components.curation.summary import Summary
from components.files import atomic_file

STYLE = """
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2126; background: #fff; margin: 0 auto;
  max-width: 84em; display: grid; grid-template-columns: 13em minmax(0, 1fr) }
nav { position: sticky; top: 0; height: 100vh; overflow: auto; padding: 2em 1em;
  border-right: 1px solid #e3e3df; font-size: 13px }
nav a { display: block; padding: .12em .6em; color: #33536f; text-decoration: none }
nav a:hover { background: #f0f1ee } nav a.inner { padding-left: 1.6em; color: #555 }
main { padding: 1.5em 2.5em 6em } h1 { font-size: 1.6em; margin: .3em 0 }
h2 { font-size: 1.25em; margin: 2.4em 0 .5em; border-bottom: 1px solid #e3e3df }
h3 { font-size: 1.05em; margin: 2em 0 .3em } h4 { margin: 1em 0 .2em; font-size: .9em }
p { max-width: 44em; margin: .5em 0 } .part { color: #555; font-size: 13px }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: 13px; margin: .6em 0 }
td, th { padding: .2em .9em; text-align: right; font-variant-numeric: tabular-nums }
th { border-bottom: 1px solid #999; text-align: right; font-weight: 600 }
td:first-child, th:first-child { text-align: left; padding-left: 0 }
tr:nth-child(even) td { background: #f6f6f4 } img.plot { max-width: 100%; display: block }
.tiles { display: flex; flex-wrap: wrap; gap: .4em 2.6em; margin: 1em 0 }
.tiles b { display: block; font-size: 1.7em; font-weight: 600; line-height: 1.2 }
.pictures { display: flex; flex-wrap: wrap; gap: .5em }
figure { margin: 0; text-align: center; font-size: 11px; line-height: 1.3; max-width: 14em }
figure img { height: 96px; max-width: 100%; display: block; margin: auto }
figcaption span { color: #666; overflow-wrap: anywhere }
li { overflow-wrap: anywhere } summary { cursor: pointer; color: #33536f }
pre { background: #f6f6f4; padding: 1em; overflow: auto; font-size: 12px }
@media (max-width: 60em) { body { display: block }
  nav { position: static; height: auto; border: 0 } main { padding: 0 1em 4em } }
"""


def write_report(
    path: Path,
    title: str,
    summary: Summary,
    tables: NotionTables,
    shown: Mapping[tuple[str, str], str],
    parameters: Mapping[str, Any] | None = None,
) -> None:
    """Write the report of a finished run to `path`, one HTML file without scripts.

    shown: small pictures by (shard, key) as `thumbnail_uri` makes them; a place of
    `summary.nearest` without one is left out. parameters: plain dicts and lists, printed at
    the end.
    """
    figures = summary.figures()
    sections = [
        ("counts", "Counts at each filter", funnel_table(figures)),
        ("filters", "Filters", _filters(summary, shown)),
        ("gates", "Gates", _gates(figures["gates"])),
        ("truth", "Against the ground truth", _truth(figures["ground_truth"])),
        ("notions", "Notions", _notions(tables)),
        ("sources", "Sources", _sources(tables)),
        ("parameters", "Parameters", _parameters(parameters)),
    ]
    links, body = [], []
    for anchor, name, text in sections:
        if not text:
            continue
        links.append(f'<a href="#{anchor}">{name}</a>')
        if anchor == "filters":
            links += [
                f'<a class=inner href="#filter-{_text(n)}">{_text(n)}</a>' for n in summary.names
            ]
        body.append(f'<section id="{anchor}"><h2>{name}</h2>{text}</section>')
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width">'
        f"<title>{_text(title)}</title><style>{STYLE}</style><body>"
        f"<nav>{''.join(links)}</nav><main><h1>{_text(title)}</h1>{_tiles(figures, tables)}"
        f"{''.join(body)}</main></body></html>\n"
    )
    with atomic_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")


def thumbnail_uri(pixels: np.ndarray, side: int) -> str:
    """Return a JPEG data URI of uint8 RGB pixels (H, W, 3), at most `side` px high, 2 × wide."""
    image = Image.fromarray(pixels)
    image.thumbnail((side * 2, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def funnel(figures: Mapping[str, Any]) -> list[tuple[str, int, int, int]]:
    """Return filter, came in, rejected, left, in the order of application."""
    rows, left = [], int(figures["total"])
    for name, rejected in figures["rejected"].items():
        rows.append((name, left, int(rejected), left - int(rejected)))
        left -= int(rejected)
    return rows


def funnel_table(figures: Mapping[str, Any]) -> str:
    """Return the counts at each filter as an HTML table."""
    total = figures["total"]
    rows = [
        (name, came, rejected, _percent(rejected, came), left, _percent(left, total))
        for name, came, rejected, left in funnel(figures)
    ]
    head = ("filter", "came in", "rejected", "share rejected", "left", "left of all")
    text = "A picture is rejected by the first filter it does not pass; this is their order."
    return f"<p class=part>{text}</p>" + _table(head, rows)


def markdown(figures: Mapping[str, Any]) -> str:
    """Return a short account of `Summary.figures()` in Markdown, for a Prefect artifact."""
    lines = [
        f"**{figures['kept']} of {figures['total']} pictures kept** "
        f"({_percent(figures['kept'], figures['total'])}).",
        "",
        "| filter | came in | rejected | share rejected | left |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, came, rejected, left in funnel(figures):
        lines.append(f"| {name} | {came} | {rejected} | {_percent(rejected, came)} | {left} |")
    lines += ["", "With pictures, score histograms and notions: `report.html` beside the manifest."]
    return "\n".join(lines) + "\n"


def _tiles(figures: Mapping[str, Any], tables: NotionTables) -> str:
    tiles = [
        (figures["total"], "pictures came in"),
        (figures["kept"], "kept"),
        (_percent(figures["kept"], figures["total"]), "of all"),
        (f"{100 * figures['synthetic_share']:.1f} %", "of the kept are synthetic"),
        (len(tables.notions), "notions"),
        (len(tables.sources()), "sources"),
    ]
    return "<div class=tiles>" + "".join(f"<div><b>{n}</b>{t}</div>" for n, t in tiles) + "</div>"


def _filters(summary: Summary, shown: Mapping[tuple[str, str], str]) -> str:
    stages = {stage.name: stage for stage in summary.filters}
    return "".join(_filter(name, stages.get(name), summary, shown) for name in summary.names)


def _filter(
    name: str, stage: Filter | None, summary: Summary, shown: Mapping[tuple[str, str], str]
) -> str:
    """One filter's section: histogram, just kept, just rejected, reasons."""
    parts = [f'<h3 id="filter-{_text(name)}">{_text(name)}: {summary.rejected[name]} rejected</h3>']
    if stage is not None and summary.histograms[name].sum():
        edges, counts = summary.edges[name], summary.histograms[name]
        drawn = plots.score_histogram(name, edges, counts, stage.threshold, stage.keep_high)
        parts.append(_plot(drawn, f"scores of {name}, threshold {stage.threshold:.4g}"))
    for kept, title in ((True, "Just kept"), (False, "Rejected, nearest to the threshold")):
        heap = sorted(summary.nearest.get((name, kept), ()), reverse=True)
        cells = [
            f'<figure><img src="{_text(shown[shard, key])}" alt="{_text(key)}">'
            f"<figcaption>{score:.3g}<br><span>{_text(key)}</span></figcaption></figure>"
            for _, shard, key, score in heap
            if (shard, key) in shown
        ]
        if cells:
            parts.append(f"<h4>{title}</h4><div class=pictures>{''.join(cells)}</div>")
    if summary.reasons.get(name):
        lines = "".join(f"<li>{_text(reason)}" for reason in summary.reasons[name])
        parts.append(f"<h4>Examples</h4><ul class=part>{lines}</ul>")
    return "".join(parts)


def _gates(gates: Mapping[str, Mapping[str, Any]]) -> str:
    if not gates:
        return ""
    rows = [
        (n, g["suspects"], g["suspects_found"], g["sampled"], g["sampled_found"], g["passed"],
         "not known" if g["recall"] is None else f"{g['recall']:.3f} (≥ {g['recall_low']:.3f})")
        for n, g in gates.items()
    ]  # fmt: skip
    head = ("gate", "suspects", "found", "random others", "found", "not examined", "recall")
    return (
        "<p class=part>Recall: suspects found over all there are, estimated from the random "
        "others; in brackets its lower 95 % bound.</p>" + _table(head, rows)
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
        f"<p>{sound['passed']} of {sound['count']} sound pictures pass "
        f"({100 * sound['share']:.2f} %); the others: {_text(wrong or 'none')}.</p>"
        + _table(("defect", "pictures", "rejected", "recall", "by"), rows)
        + _table(("filter", "precision"), truth["precision"].items())
    )


def _notions(tables: NotionTables) -> str:
    frequencies, pairs = tables.frequencies(), tables.cooccurrence()
    if frequencies.empty:
        return "<p>No word is in enough captions to be a notion.</p>"
    pairs = pairs.sort_values("count", ascending=False, kind="stable").head(50)
    shares = [f"{100 * share:.2f} %" for share in frequencies["share"]]
    listed = frequencies[["notion", "kind", "count"]].assign(share=shares)
    return (
        _plot(plots.frequency_plot(frequencies), "the most frequent notions of each kind")
        + _plot(
            plots.cooccurrence_plot(frequencies, tables.cooccurrence()),
            "how often the most frequent notions occur together",
        )
        + _folded("All notions", listed)
        + _folded("The 50 most frequent pairs", pairs)
    )


def _sources(tables: NotionTables) -> str:
    counts = tables.sources()
    if not counts:
        return ""
    rows = [(name, n, _percent(n, tables.total)) for name, n in counts.items()]
    return (
        _plot(plots.distribution_plot(tables.distributions()), "sizes by source")
        + _table(("source", "kept", "share"), rows)
        + _folded("Sizes by source", tables.distributions())
    )


def _parameters(parameters: Mapping[str, Any] | None) -> str:
    if not parameters:
        return ""
    text = yaml.safe_dump(dict(parameters), sort_keys=False, allow_unicode=True, width=96)
    return f"<pre>{_text(text)}</pre>"


def _folded(title: str, frame: pd.DataFrame) -> str:
    rows = frame.itertuples(index=False)
    return f"<details><summary>{title}</summary>{_table(list(frame.columns), rows)}</details>"


def _table(head: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    top = "".join(f"<th>{_text(name)}" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}" for cell in row) for row in rows)
    return f"<div class=wide><table><tr>{top}{body}</table></div>"


def _plot(png: bytes, alt: str) -> str:
    uri = "data:image/png;base64," + base64.b64encode(png).decode()
    return f'<img class=plot src="{uri}" alt="{_text(alt)}">'


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):.1f} %"


def _text(value: Any) -> str:
    """Escape anything for the page: keys, captions and sources are not trusted."""
    return html.escape(str(value), quote=True)
