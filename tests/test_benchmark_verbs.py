"""The benchmarks' verbs as a user calls them, in the project's own folder."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from components.cli import app
from components.errors import UserError
from components.evaluation.compbench import write_results
from tests.test_compbench import PROMPTS, samples
from tests.test_genai import N, bench, drawn, results
from tests.test_human_preference import ROW, rows, sources

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def djepa(*words: object) -> tuple[str, str]:
    """Standard output and error; UserError as raised."""
    answer = CliRunner().invoke(app, [str(word) for word in words])
    if answer.exception is not None:
        raise answer.exception
    return answer.stdout, answer.stderr


def test_compbench_is_written_for_the_report(tmp_path: Path) -> None:
    samples(tmp_path / "set/color", PROMPTS)
    write_results(tmp_path / "official/color/annotation_blip/vqa_result.json", [0.5] * 20, "blip")
    out = tmp_path / "metrics/compbench/demo.json"
    said, warned = djepa(
        "score", "compbench", tmp_path / "set", "--annotations", tmp_path / "official", "--out", out
    )
    assert said.startswith("color") and "0.5000 ± 0.0000  n 20  official result file" in said
    assert "it has 2 prompts, officially 300 (or 700)" in warned
    written = json.loads(out.read_text())
    assert written["benchmark"] == "T2I-CompBench++" and written["n"] == 20
    assert set(written["categories"]["color"]) == {"score", "n", "stderr", "scored_by"}


def test_chunks_that_are_not_here_are_named(tmp_path: Path) -> None:
    samples(tmp_path / "set/color", PROMPTS)
    with pytest.raises(UserError, match=r"none.jsonl cannot be read as JSON lines with prompt"):
        djepa("score", "compbench", tmp_path / "set", "--chunks", tmp_path / "none.jsonl")


def test_genai_is_written_for_the_report(tmp_path: Path) -> None:
    out = tmp_path / "metrics/genai/demo.json"
    said, warned = djepa(
        "score", "genai", drawn(tmp_path / "out/demo"), "--results", results(tmp_path, [0.5] * N),
        "--prompts", bench(tmp_path / "files"), "--out", out, "--json",
    )  # fmt: skip
    written = json.loads(out.read_text())
    assert json.loads(said) == written and "officially 527 or 1600" in warned
    assert {"benchmark", "n", "scored_by", "skills"} <= set(written)
    assert written["skills"]["advanced"]["score"] == 0.5


def test_raters_win_rate_is_printed(tmp_path: Path) -> None:
    lines = [ROW | {"prompt_index": i, "prompt": f"a cup {i}"} for i in range(3)]
    file = rows(tmp_path / "pairs.jsonl", *lines)
    assert djepa("winrate", file)[0].strip() == (
        "new against old: win rate 1.000 [1.000, 1.000], 3 better, 0 same, 0 worse; 3 pairs, "
        "1 raters"
    )
    assert json.loads(djepa("winrate", file, "--json")[0])["n"] == 3


def test_the_preference_set_is_printed(tmp_path: Path) -> None:
    compbench, _, parti = sources(tmp_path / "s")
    said, warned = djepa(
        "prompts", "preference", "--compbench", compbench, "--parti", parti, "--count", 30
    )
    assert len({json.loads(line)["prompt"] for line in said.splitlines()}) == 30
    assert warned.strip() == "djepa: The source pickscore is missing: give it with --pickscore."
