"""The report's plots, as the bytes of PNG files; the same figures give the same bytes.

Drawn on a Figure of their own, without pyplot: worker threads share no state.
"""

import io
import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

BAR, LINE, MUTED = "#7a9cc6", "#c0392b", "#555555"
LONGEST = 28  # characters of a label; sources and notions come from the data
PANELS = 3  # plots of a row


def score_histogram(
    name: str, edges: np.ndarray, counts: np.ndarray, threshold: float, keep_high: bool
) -> bytes:
    """Draw a filter's scores, log count, with the threshold and the side that is kept.

    edges: (bins + 1,) in the unit of the score; counts: (bins,). A threshold that is not
    finite rejects nothing and is not drawn.
    """
    figure = Figure(figsize=(7.2, 2.2), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=BAR, log=True)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0.7, 2 * max(int(counts.max()), 5))  # a single picture shows
    if np.isfinite(threshold):
        at = min(max(threshold, edges[0]), edges[-1])
        axes.axvline(at, color=LINE)
        kept = "kept from here up" if keep_high else "kept up to here"
        left = at > (edges[0] + edges[-1]) / 2
        axes.annotate(f"threshold {threshold:.4g}: {kept}", (at, 1), (-5 if left else 5, 3),
                      xycoords=("data", "axes fraction"), textcoords="offset points",
                      ha="right" if left else "left", color=LINE, fontsize=8)  # fmt: skip
    _label(axes, "", f"{name} (last bar: and above)", "pictures")
    return _png(figure)


def frequency_plot(frequencies: pd.DataFrame, top: int = 12) -> bytes:
    """Draw the `top` most frequent notions of each kind, one panel a kind.

    frequencies: of NotionTables, at least one row.
    """
    kinds = [(kind, rows.head(top)) for kind, rows in _sorted(frequencies).groupby("kind")]
    lines, deepest = math.ceil(len(kinds) / PANELS), max(len(rows) for _, rows in kinds)
    high = lines * (0.8 + 0.19 * deepest)
    figure = Figure(figsize=(10.5, high), dpi=100, layout="constrained")
    panels = figure.subplots(lines, PANELS, squeeze=False).ravel()
    for axes, (kind, rows) in zip(panels, kinds, strict=False):
        axes.barh(range(len(rows)), rows["count"], color=BAR, height=0.75)
        axes.set_yticks(range(len(rows)), [short(w) for w in rows["notion"]], parse_math=False)
        axes.set_ylim(deepest - 0.4, -0.6)
        _label(axes, str(kind).replace("_", " "), "captions", "")
    for axes in panels[len(kinds) :]:
        axes.set_axis_off()
    return _png(figure)


def cooccurrence_plot(frequencies: pd.DataFrame, pairs: pd.DataFrame, top: int = 36) -> bytes:
    """Draw how often the `top` most frequent notions occur together; the colour is log count.

    frequencies, pairs: of NotionTables; at least one row of frequencies. Notions are put by
    kind; a pair that never occurs is white.
    """
    rows = _sorted(frequencies).head(top).sort_values("kind", kind="stable")
    place = {word: i for i, word in enumerate(rows["notion"])}
    together = np.zeros((len(place), len(place)))
    for a, b, count in pairs[["notion_a", "notion_b", "count"]].itertuples(index=False):
        if a in place and b in place:
            together[place[a], place[b]] = together[place[b], place[a]] = count
    side = 2.2 + 0.18 * len(place)
    figure = Figure(figsize=(side + 1, side), dpi=100, layout="constrained")
    axes = figure.subplots()
    shown = np.ma.masked_equal(together, 0)
    most = max(int(together.max()), 2)
    norm = LogNorm(0.5, most)  # once together is no white yet
    image = axes.imshow(shown, cmap="Blues", norm=norm, interpolation="nearest")
    labels = [short(word) for word in place]
    axes.set_xticks(range(len(place)), labels, rotation=90, parse_math=False)
    axes.set_yticks(range(len(place)), labels, parse_math=False)
    bar = figure.colorbar(image, ax=axes, shrink=0.6)
    ticks = [10**i for i in range(len(str(most))) if 10**i < most / 2] + [most]
    bar.set_ticks(ticks, labels=[str(tick) for tick in ticks], minor=False)
    bar.minorticks_off()
    bar.set_label("captions with both", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    _label(axes, "", "", "")
    return _png(figure)


def distribution_plot(distributions: pd.DataFrame, top: int = 6) -> bytes:
    """Draw shorter side and aspect of the `top` largest sources, as shares of the source.

    distributions: of NotionTables, at least one row.
    """
    figure = Figure(figsize=(10.5, 2.8), dpi=100, layout="constrained")
    units = {"shorter_side": "shorter side in px", "aspect": "width / height"}
    totals = distributions.groupby(["quantity", "source"])["count"].sum()
    largest = totals["aspect"].sort_values(ascending=False, kind="stable").index[:top]
    for axes, (quantity, unit) in zip(figure.subplots(1, 2), units.items(), strict=True):
        for source in largest:
            chosen = (distributions["quantity"] == quantity) & (distributions["source"] == source)
            rows = distributions[chosen].sort_values("low")
            share = rows["count"] / totals[quantity, source]
            axes.plot(rows["low"], share, marker=".", linewidth=1.2, label=short(source))
        _label(axes, "", f"{unit} (lower edge of the bin)", "share of the source")
    legend = axes.legend(frameon=False, fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return _png(figure)


def short(text: str) -> str:
    """Return the text on one line, cut to what a label can hold."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"


def _sorted(frequencies: pd.DataFrame) -> pd.DataFrame:
    return frequencies.sort_values(["count", "notion"], ascending=[False, True])


def _label(axes: Axes, title: str, across: str, up: str) -> None:
    axes.set_title(title, fontsize=9, loc="left", fontweight="bold", parse_math=False)
    axes.set_xlabel(across, fontsize=8, color=MUTED)
    axes.set_ylabel(up, fontsize=8, color=MUTED)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # No version, no date: the same figures give the same bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
