"""The curation report: whole, offline, and harmless whatever captions and keys hold."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from components.curation import plots
from components.curation.filters import Measure
from components.curation.notions import Notion, NotionTables
from components.curation.report import funnel, markdown, thumbnail_uri, write_report

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>\ud800"
NAMES = ["damaged", "caption", "resolution", "sharpness", "near_duplicate", "synthetic"]
REJECTED = {"damaged": 3, "caption": 10, "resolution": 0, "sharpness": 40, "near_duplicate": 12,
            "synthetic": 5}  # fmt: skip


class Page(HTMLParser):
    """Collects the tags and attributes that a browser would see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs


def summary(key: str = "000000007") -> Any:
    """What the report reads of a Summary, with one unfriendly key."""
    rng = np.random.default_rng(0)
    stages = [
        Measure("caption", lambda p: 0.0, 3.0, True, "few letters"),
        Measure("resolution", lambda p: 0.0, 512.0, True, "small"),
        Measure("sharpness", lambda p: 0.0, 0.27, True, "blurred"),
    ]
    edges = {s.name: np.linspace(0, 4 * s.threshold, 41) for s in stages}
    total = 1000
    kept = total - sum(REJECTED.values())
    scores = {s.name: rng.normal(2 * s.threshold, s.threshold / 2, total) for s in stages}
    nearest = {
        ("sharpness", side): [(-0.01 * i, "00000", key if i == 3 else f"{i:09d}", 0.27 + sign * i)
                              for i in range(8)]
        for side, sign in ((True, 0.01), (False, -0.01))
    }  # fmt: skip
    figures = {
        "total": total, "kept": kept, "kept_share": kept / total, "synthetic_share": 0.031,
        "rejected": REJECTED, "thresholds": {s.name: s.threshold for s in stages},
        "gates": {"text": {"suspects": 40, "suspects_found": 31, "sampled": 20,
                           "sampled_found": 0, "passed": 800, "recall": 1.0, "recall_low": 0.62}},
        "notions": {}, "ground_truth": {
            "sound": {"count": 900, "passed": 890, "share": 0.9889, "rejected_by": {"noise": 10}},
            "defects": {"blur": {"count": 40, "rejected": 38, "recall": 0.95,
                                 "by": {"sharpness": 38}}},
            "precision": {"sharpness": 0.98},
        },
    }  # fmt: skip
    return SimpleNamespace(
        filters=stages, names=NAMES, rejected=REJECTED, total=total, nearest=nearest, edges=edges,
        reasons={"damaged": [f"00000 {key}: no picture {key}"]},
        histograms={n: np.histogram(s, edges[n])[0] for n, s in scores.items()},
        figures=lambda: figures,
    )  # fmt: skip


def notion_tables(source: str = "studio") -> NotionTables:
    words = {"colour": ["red", "blue", "green"], "numeral": ["two", "three"],
             "entity": ["dog", "cat", "tree", "$x$"], "style": ["oil painting"]}  # fmt: skip
    notions = [Notion(word, kind) for kind, listed in words.items() for word in listed]
    rng = np.random.default_rng(1)
    tables = NotionTables(notions, 64, 0.25)
    sizes = [(("web", source)[i % 2], *rng.integers(128, 900, 2).tolist()) for i in range(400)]
    tables.add(rng.random((400, len(notions))) < np.linspace(0.6, 0.05, len(notions)), sizes)
    return tables


def thumbnails(key: str) -> dict[tuple[str, str], str]:
    rng = np.random.default_rng(2)
    pixels = [rng.integers(0, 255, (3, 4, 3), np.uint8).repeat(40, 0).repeat(40, 1)] * 8
    keys = [key if i == 3 else f"{i:09d}" for i in range(8)]
    return {("00000", k): thumbnail_uri(p, 96) for k, p in zip(keys, pixels, strict=True)}


def written(folder: Path, key: str = "000000007", source: str = "studio") -> str:
    path, parameters = folder / "report.html", {"faces": {"policy": "tag"}, "caption": key}
    write_report(
        path, f"Curation of {key}", summary(key), notion_tables(source), thumbnails(key), parameters
    )
    return path.read_text(encoding="utf-8")


def test_nothing_untrusted_reaches_the_page_as_markup(tmp_path: Path) -> None:
    page = written(tmp_path, HOSTILE, HOSTILE[:-1])
    seen = Page(page)
    assert "<script" not in page and "<img src=x" not in page and "script" not in seen.tags
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    kept = HOSTILE.replace("\ud800", "\\ud800")
    assert [value for name, value in seen.attributes if name == "alt"].count(kept) == 2
    assert page.count("&lt;script&gt;") > 6  # title twice, alt, caption, reason, source, parameters


def test_page_is_whole_and_offline(tmp_path: Path) -> None:
    page = written(tmp_path)
    seen = Page(page)
    assert "http" not in page and "//" not in re.sub(r"base64,[\w+/=]+", "", page)
    assert all(v.startswith("data:image/") for n, v in seen.attributes if n == "src" and v)
    targets = {value for name, value in seen.attributes if name == "id"}
    assert {v[1:] for n, v in seen.attributes if n == "href" and v} <= targets
    assert {f"filter-{name}" for name in NAMES} <= targets
    for text in ("sharpness: 40 rejected", "Just kept", "nearest to the threshold", "0.28",
                 "Against the ground truth", "oil painting", "policy: tag", "93.0 %"):  # fmt: skip
        assert text in page
    assert written(tmp_path) == page


def test_every_threshold_is_drawn(tmp_path: Path) -> None:
    page = written(tmp_path)
    for name, drawn in (("caption", "3"), ("resolution", "512"), ("sharpness", "0.27")):
        assert f'alt="scores of {name}, threshold {drawn}"' in page
    edges, counts = np.linspace(0, 1, 41), np.arange(40)
    red = np.array([192, 57, 43])
    for threshold, there in ((0.3, True), (0.9, True), (7.0, True), (-np.inf, False)):
        png = plots.score_histogram("sharpness", edges, counts, threshold, True)
        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
        column = (np.abs(pixels - red).max(axis=2) < 40).sum(axis=0).max()
        assert (column > pixels.shape[0] / 3) == there
        assert png == plots.score_histogram("sharpness", edges, counts, threshold, True)


def test_funnel_adds_up() -> None:
    rows = funnel(summary().figures())
    assert [row[0] for row in rows] == NAMES and rows[0][1] == 1000
    assert all(came - rejected == left for _, came, rejected, left in rows)
    assert [left for *_, left in rows[:-1]] == [came for _, came, *_ in rows[1:]]
    text = markdown(summary().figures())
    assert "930 of 1000 pictures kept" in text and "report.html" in text
    assert "| sharpness | 987 | 40 | 4.1 % | 947 |" in text


def test_report_of_nothing_is_a_page_still(tmp_path: Path) -> None:
    empty = summary()
    figures = empty.figures() | {"total": 0, "kept": 0, "gates": {}, "ground_truth": None}
    figures["rejected"] = dict.fromkeys(NAMES, 0)
    empty.figures, empty.nearest, empty.reasons = (lambda: figures), {}, {}
    empty.histograms = {name: h * 0 for name, h in empty.histograms.items()}
    write_report(tmp_path / "report.html", "Nothing", empty, NotionTables([], 64, 0.25), {})
    page = (tmp_path / "report.html").read_text()
    assert "No word is in enough captions" in page and "Ground truth" not in page


@pytest.mark.filterwarnings("ignore:Glyph")
def test_plots_take_any_label() -> None:
    tables = notion_tables("$\\frac{<b>\n" + "long " * 30 + "\x00犬")
    frequencies = tables.frequencies()
    for png in (
        plots.frequency_plot(frequencies),
        plots.cooccurrence_plot(frequencies, tables.cooccurrence()),
        plots.cooccurrence_plot(frequencies.head(1), tables.cooccurrence().head(0)),
        plots.distribution_plot(tables.distributions()),
    ):
        assert Image.open(io.BytesIO(png)).width > 200
    assert plots.short("a\nb\x00" + "c" * 99) == "a b " + "c" * 23 + "…"


def test_thumbnail_is_small_and_a_jpeg() -> None:
    uri = thumbnail_uri(np.zeros((400, 100, 3), np.uint8), 96)
    image = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    assert uri.startswith("data:image/jpeg;base64,") and image.size == (24, 96)
