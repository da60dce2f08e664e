"""The paper's tables with rows of ours: what stands where, what is marked, what LaTeX gets."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from components.evaluation.ablation import GROUPS, Result, summary
from components.evaluation.folder import Sample
from components.evaluation.paper_tables import left_out, paper_tables, published
from components.evaluation.scoring import Scored
from components.evaluation.seen import COUNTED, sheet, things
from components.evaluation.tables import (
    LATEX,
    Table,
    html_tables,
    latex,
    latex_page,
    markdown_page,
    write_tables,
)
from components.scenes.tasks import TASKS

PARAMS = {"seed": 7}
PART = {
    "overall": 0.25,
    "tasks": {task: 0.1 * i for i, task in enumerate(TASKS)},
    "n": 336,
    "prompts": 74,
    "stderr": 0.031,
    "chance": 0.012,
    "chance_tasks": dict.fromkeys(TASKS, 0.01),
}
WORLD = PART | {
    "seen": PART | {"overall": 0.35},
    "held_out": PART,
    "scored_by": {"detector": "embedded"},
}
OFFICIAL = PART | {"n": 2212, "prompts": 553, "scored_by": {"detector": "Mask2Former"}}
SKILLS = (
    "attribute,scene,spatial relation,action relation,part relation,counting,comparison,"
    "differentiation,negation,universal,basic,advanced,all"
)
FOUND: dict[str, Any] = {
    "evaluate/r_1": {"geneval": WORLD, "parameters": 1_401_708},
    "compbench/r_1": {
        "benchmark": "T2I-CompBench++",
        "n": 900,
        "categories": {
            name: {"score": 0.4321, "n": 300, "stderr": 0.011, "scored_by": "BLIP-VQA"}
            for name in ("color", "texture")
        },
    },
    "genai/r_1": {
        "benchmark": "GenAI-Bench",
        "n": 527,
        "scored_by": "clip-flant5-xxl & co",
        "skills": {
            name: {"score": 0.1 + 0.05 * i, "n": 100 + i, "stderr": 0.02}
            for i, name in enumerate(SKILLS.split(","))
        },
    },
}


def ablation(groups: str = "AHI") -> dict[str, Any]:
    rng = np.random.default_rng(0)
    win = {"win_rate": 0.55, "low": 0.5, "high": 0.6}
    results = [
        Result(g, seed, 16_000 * GROUPS[g].phases, 0.1 + rng.random() / 100, 0.02, 0.03, 100,
               0.12, 0.02, 0.03, 200, win if g in "HI" else None)
        for g in groups for seed in (0, 1)
    ]  # fmt: skip
    return summary(results)


@pytest.fixture(scope="module")
def tables() -> list[Table]:
    return paper_tables(FOUND, ["r_1"], PARAMS, ablation())


def ours(table: Table) -> list[dict[str, str]]:
    return [
        {f"{i} {c}": v for i, (c, v) in enumerate(zip(table.columns, row, strict=True))}
        for section in table.sections
        if section.ours
        for row in section.rows
    ]


def test_published_figures_agree_with_themselves() -> None:
    """Overall is the mean of six rounded tasks: a slip of the pen would show."""
    for name, _, _, overall, *rest in published()["geneval"]["rows"]:
        assert np.mean(rest[:6]) == pytest.approx(overall, abs=0.011), name
    for group, *_, score, win in published()["ablation"]["rows"]:
        given = score if win is None else win / 100
        assert GROUPS[group].paper == pytest.approx(given)
    for half in ("basic", "advanced"):
        for name, (*skills, mean) in published()["genai"][half].items():
            assert min(skills) <= mean <= max(skills), name


def test_a_score_of_the_embedded_world_never_stands_among_official_ones(
    tables: list[Table],
) -> None:
    table = next(t for t in tables if t.number == 2)
    assert [section.ours for section in table.sections] == [False, True, True]
    theirs, official, world = table.sections
    assert not any("†" in row[0] for row in theirs.rows + official.rows)
    assert world.title.startswith("†")
    assert "NOT GenEval" in world.title
    assert [row[0] for row in world.rows] == ["r_1 †, held-out", "r_1 †, seen", "r_1 †, chance"]
    assert any(note.startswith("†") and "not its 553 prompts" in note for note in table.notes)
    # T2I-CompBench++ was drawn for its own prompts: not in the embedded world's row.
    assert [row[0] for row in official.rows] == ["r_1"]
    assert official.rows[0][3:10] == ["–"] * 7
    assert official.rows[0][10:13] == ["0.4321 ± 0.0110", "–", "0.4321 ± 0.0110"]
    assert world.rows[0][:4] == ["r_1 †, held-out", "✓", "1.4M", "0.250 ± 0.031"]
    assert world.rows[0][-2:] == ["336", "1"]
    assert world.rows[1][3] == "0.350 ± 0.031"
    assert world.rows[2][3] == "0.012"


@pytest.mark.parametrize(
    ("change", "official"),
    [
        ({}, True),
        ({"prompts": 552}, False),
        ({"seen": PART}, False),
        ({"scored_by": {"detector": "embedded"}}, False),
    ],
)
def test_what_counts_as_official(change: dict[str, Any], official: bool) -> None:
    found = {"evaluate/dpo": {"geneval": OFFICIAL | change, "parameters": 2_600_000_000}}
    (table,) = paper_tables(found, ["dpo"], PARAMS, None)
    row = ours(table)[0]
    assert ("†" not in row["0 Model"]) is official
    assert ("†" in "".join(table.notes)) is not official
    assert row["2 #Params"] == "2.6B"
    if official:
        assert any("Mask2Former" in note for note in table.notes)


def test_table_1_takes_the_tags_and_not_the_mean(tables: list[Table]) -> None:
    basic, advanced = (t for t in tables if t.number == 1)
    (row,) = ours(basic)
    assert row["6 Avg"] == "0.60 ± 0.02"  # of the tag, where the five have a mean of 0.20
    assert (row["7 n"], row["8 seeds"]) == ("110", "1")
    (row,) = ours(advanced)
    # The paper's order is not the file's: differentiation before comparison.
    assert (row["2 Differ"], row["3 Compare"]) == ("0.45 ± 0.02", "0.40 ± 0.02")
    assert "clip-flant5-xxl & co" in basic.notes[0]


def test_table_4(tables: list[Table]) -> None:
    table = next(t for t in tables if t.number == 4)
    a, h, i = ours(table)
    assert a["1 Steps (k)"] == "0–16k images"
    assert h["1 Steps (k)"] == "48–64k images"
    assert [a[k] for k in ("2 SAS", "3 CMS (Auto)", "4 CMS (Human)")] == ["w/o"] * 3
    assert [h[k] for k in ("2 SAS", "3 CMS (Auto)", "4 CMS (Human)")] == ["w/", "w/", "w/o"]
    assert i["4 CMS (Human)"] == "w/ ‡"  # no person labelled
    assert (a["6 Win Rate (%)"], h["6 Win Rate (%)"]) == ("–", "55.0 ± 0.0")
    assert (a["8 n"], a["9 seeds"]) == ("200", "2")
    assert re.fullmatch(r"0\.10\d ± 0\.00\d", a["5 GenEval Overall"])


def test_a_table_without_a_row_of_ours_is_left_out_and_named(tmp_path: Path) -> None:
    tables = paper_tables({"evaluate/r_1": {"geneval": WORLD}}, ["r_1"], PARAMS, None)
    assert [table.number for table in tables] == [2]
    assert [way.partition(" (")[0] for way in left_out(tables)] == ["Table 1", "Table 4"]
    write_tables(tables, left_out(tables), tmp_path)
    assert "djepa score genai" in (tmp_path / "tables.md").read_text()
    assert paper_tables({}, [], PARAMS, None) == []


def test_markdown_and_html_have_a_cell_for_each_column(tables: list[Table]) -> None:
    page = markdown_page(tables)
    for block in page.split("\n\n"):
        if block.startswith("|"):
            assert len({line.replace("\\|", "").count("|") for line in block.splitlines()}) == 1

    class Rows(HTMLParser):
        widths: list[int] = []  # noqa: RUF012

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag == "tr":
                self.widths.append(0)
            if tag in ("td", "th"):
                self.widths[-1] += int(dict(attrs).get("colspan") or 1)

    parser = Rows()
    for table in tables:
        parser.widths.clear()
        text = html_tables([table])
        parser.feed(text)
        assert set(parser.widths) == {len(table.columns)}
        assert text.count('class="ours"') == sum(section.ours for section in table.sections)
    assert "flant5-xxl &amp; co" in html_tables(tables)


def test_latex_is_whole(tables: list[Table]) -> None:
    page = latex_page(tables)
    assert page.isascii()
    assert r"r\_1 \dag{}, held-out" in page
    assert r"flant5-xxl \& co" in page
    opened: list[str] = []
    for verb, name in re.findall(r"\\(begin|end)\{(\w+)\}", page):
        if verb == "begin":
            opened.append(name)
        else:
            assert opened.pop() == name
    assert not opened
    bare = re.sub(r"\\[\\{}%]", "", page)
    assert bare.count("{") == bare.count("}")
    tabulars = re.findall(r"\\begin\{tabular\}\{(lc*)\}(.*?)\\end\{tabular\}", page, re.DOTALL)
    assert [len(head) for head, _ in tabulars] == [len(table.columns) for table in tables]
    for head, body in tabulars:
        for line in body.strip().splitlines():
            if line.endswith(r"\\"):
                spans = [int(n) - 1 for n in re.findall(r"\\multicolumn\{(\d+)\}", line)]
                assert len(re.findall(r"(?<!\\)&", line)) + 1 + sum(spans) == len(head), line
    for number in (1, 2, 4):
        assert rf"\setcounter{{table}}{{{number - 1}}}" in page


@given(st.text(st.characters(codec="ascii", categories=["L", "N", "P", "S", "Z"])))
def test_no_character_of_a_name_is_a_command(text: str) -> None:
    written = latex(text)
    for command in sorted(set(LATEX.values()), key=len, reverse=True):
        written = written.replace(command, "")
    assert not set(written) & set("\\&%$#_{}~^")


def test_what_counts_is_numbered_first_and_drawn(tmp_path: Path) -> None:
    path = tmp_path / "0000.png"
    Image.new("RGB", (32, 24), (128, 128, 128)).save(path)
    metadata = {
        "tag": "counting",
        "include": [{"class": "ring", "count": 2}],
        "exclude": [{"class": "ring", "count": 3}],
        "prompt": "a photo of two rings",
    }
    weak, strong = [1.0, 1.0, 9.0, 9.0, 0.6, "red"], [12.0, 4.0, 28.0, 20.0, 0.95, "blue"]
    sample = Sample("00000/samples/0000.png", metadata, path)
    one = Scored(sample, {"ring": [weak, strong]}, False, "expected ring>=2, found 1", 0.0, "seen")
    assert [(t.words, t.counts) for t in things(one)] == [
        ("blue ring 0.95", True),
        ("red ring 0.60 (not counted)", False),
    ]
    page = np.asarray(sheet([one], "counting", 2, 192))
    pink = np.argwhere((page == COUNTED).all(-1))
    (top, left), (bottom, right) = pink.min(0), pink.max(0)
    # Six times as large, 12 right of the edge and below the title; its number stands on top.
    assert abs(left - (12 + 12 * 6)) <= 2
    assert abs(right - (12 + 28 * 6)) <= 2
    assert abs(bottom - (30 + 20 * 6)) <= 2
    assert top < 30 + 4 * 6
