"""Preference: PickScore as a judge, raters' win rates, and the set of prompts."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from components.errors import UserError
from components.evaluation.folder import read_folder, write_prompt
from components.evaluation.pick_score import PickScore, judge_folders
from components.evaluation.preference_prompts import even_shares, preference_set
from components.evaluation.win_rates import raters_win_rate, sentence, win_rate
from components.rating.exchange import export
from components.rating.exchange import win_rate as exported_win_rate
from components.rating.jobs import pair_job
from components.rating.store import Store
from tests.test_mask2former import write_clip

SETTINGS = {"bootstrap": 500, "seed": 0}


def pictures(folder: Path, seed: int, prompts: int = 6, each: int = 2) -> Path:
    """An evaluation folder of noise."""
    rng = np.random.default_rng(seed)
    for index in range(prompts):
        tag = ("colors", "counting")[index % 2]
        metadata = {"tag": tag, "include": [], "prompt": f"a cup {index}"}
        place = write_prompt(folder, index, metadata)
        for i in range(each):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{i:04d}.png")
    return folder


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> PickScore:
    """PickScore with random weights, and its preparation in another folder, as in public."""
    place = tmp_path_factory.mktemp("clip")
    write_clip(place)
    return PickScore({
        "model": str(place), "revision": "main", "processor": str(place),
        "processor_revision": "main", "batch": 5,
    })  # fmt: skip


def test_the_preference_is_a_softmax_of_scaled_cosines(judge: PickScore) -> None:
    rng = np.random.default_rng(0)
    a, b = (
        [Image.fromarray(rng.integers(0, 256, (20, 16, 3), dtype=np.uint8)) for _ in range(3)]
        for _ in range(2)
    )
    prompts = ["a cup", "two cups " * 60, ""]  # too long ones are cut
    found = judge.preferences(a, b, prompts)
    assert judge.preferences(b, a, prompts) == pytest.approx([1 - p for p in found])
    scale = float(judge.clip.model.logit_scale.exp())
    said = judge.clip.texts(prompts, cut=True)
    for i, chance in enumerate(found):
        cosines = [float(judge.clip.pictures([side[i]])[0] @ said[i]) for side in (a, b)]
        assert chance == pytest.approx(
            1 / (1 + np.exp(scale * (cosines[1] - cosines[0]))), abs=1e-4
        )


def test_two_folders_are_judged(judge: PickScore, tmp_path: Path) -> None:
    a, b = pictures(tmp_path / "a", 0), pictures(tmp_path / "b", 1)
    found, back = judge_folders(a, b, judge, SETTINGS), judge_folders(b, a, judge, SETTINGS)
    assert found["n"] == 12 and found["better"] == back["worse"] and found["same"] == 0
    assert found["win_rate"] == pytest.approx(1 - back["win_rate"], abs=2e-4)
    assert found["preference"] == pytest.approx(1 - back["preference"], abs=2e-4)
    assert set(found["tasks"]) == {"colors", "counting"}
    assert (found["model"], found["baseline"]) == ("a", "b") and "PickScore" in found["judge"]
    same = judge_folders(a, a, judge, SETTINGS)
    assert (same["win_rate"], same["same"], same["low"]) == (0.5, 12, 0.5)
    (b / "00002/samples/0001.png").unlink()
    with pytest.raises(UserError, match=r"b lacks 00002/samples/0001"):
        judge_folders(a, b, judge, SETTINGS)
    (a / "00002/samples/0001.png").unlink()
    (b / "00003/samples/0000.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"00003/samples/0000.png cannot be read"):
        judge_folders(a, b, judge, SETTINGS)
    file = b / "00001/metadata.jsonl"
    file.write_text(file.read_text().replace("a cup 1", "a dog"))
    with pytest.raises(UserError, match=r"'a cup 1' in .*'a dog'"):
        judge_folders(a, b, judge, SETTINGS)
    with pytest.raises(UserError, match=r"failed its self-test"):
        judge.self_test()


@given(st.lists(st.sampled_from([-1, 0, 1]), min_size=1, max_size=40), st.integers(1, 8))
def test_win_rate_and_its_interval(verdicts: list[int], prompts: int) -> None:
    names = [str(i % prompts) for i in range(len(verdicts))]
    tags = ["even" if i % 2 == 0 else "odd" for i in range(len(verdicts))]
    found = win_rate(verdicts, names, tags, {"bootstrap": 50, "seed": 0})
    better, same, worse = (verdicts.count(v) for v in (1, 0, -1))
    assert found["win_rate"] == pytest.approx((better + same / 2) / len(verdicts), abs=1e-4)
    assert (found["better"], found["same"], found["worse"]) == (better, same, worse)
    assert 0 <= found["low"] <= found["high"] <= 1
    assert found["tasks"]["even"] == pytest.approx(
        np.mean([(v + 1) / 2 for v in verdicts[::2]]), abs=1e-4
    )


def rated(folder: Path) -> Store:
    """Two raters' answers to pairs of two folders, through the real store."""
    job = pair_job(pictures(folder / "old", 0), pictures(folder / "new", 1))
    store = Store(folder / "ratings.sqlite", create=True)
    store.register(job)
    answers = {"Ada": ["B", "B", "same", "A"], "Bob": ["B", "A", "B", "same"]}
    for rater, said in answers.items():
        for item, value in zip(job.items, said, strict=False):
            for question in ("adherence", "coherence", "realism"):
                store.answer(job, item, rater, question, value)
                if value != "same":
                    break
    return store


ROW = {
    "prompt_index": 0, "sample": "0000", "prompt": "a cup", "a": "old", "b": "new",
    "rater": "Ada", "winner": "B", "question": "realism",
}  # fmt: skip


def rows(file: Path, *lines: dict) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_win_rate_of_lines(tmp_path: Path) -> None:
    lines = [
        ROW | {"prompt_index": i, "prompt": f"a cup {i}", "rater": rater, "winner": winner}
        for i in range(8)
        for rater, winner in (("Ada", "B"), ("Bob", "same" if i % 2 else "A"))
    ]
    file = rows(tmp_path / "pairs.jsonl", *lines)
    found = raters_win_rate(file, SETTINGS)
    assert found["win_rate"] == 0.625 and found["n"] == 16 and found["pairs"] == 8
    assert (found["better"], found["same"], found["worse"]) == (8, 4, 4)
    assert found["raters"] == {"Ada": 8, "Bob": 8} and found["tasks"] == {}
    assert "win rate 62.5 % (better 8, same 4, worse 4)" in exported_win_rate(lines)
    assert sentence(found).startswith("new against old: win rate 0.625 [")
    # Two answers to one pair are not independent: the interval is over prompts.
    alone = raters_win_rate(rows(tmp_path / "one.jsonl", *lines[::2], *lines[1::2]), SETTINGS)
    assert (alone["low"], alone["high"]) == (found["low"], found["high"])
    assert found["low"] >= 0.5  # each prompt's mean is 0.5 or 0.75
    tags = rows(
        tmp_path / "tags.jsonl",
        *({"prompt": f"a cup {i}", "tag": ("even", "odd")[i % 2]} for i in range(8)),
    )
    tagged = raters_win_rate(file, SETTINGS, tags)
    assert tagged["tasks"] == {"even": 0.5, "odd": 0.75}
    assert tagged["intervals"]["odd"] == {"mean": 0.75, "low": 0.75, "high": 0.75, "n": 8}
    with pytest.raises(UserError, match=r"no line for 8 prompts \(e.g. 'a cup 0'\)"):
        raters_win_rate(file, SETTINGS, rows(tags, {"prompt": "x", "tag": "y"}))


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_win_rate_of_an_export(ending: str, tmp_path: Path) -> None:
    store = rated(tmp_path)
    file = tmp_path / f"pairs.{ending}"
    export(store, file, None, every_answer=False)
    found = raters_win_rate(file, SETTINGS)
    assert (found["model"], found["baseline"]) == ("new", "old")
    assert (found["better"], found["same"], found["worse"]) == (4, 2, 2)
    assert found["win_rate"] == 0.625 and found["raters"] == {"Ada": 4, "Bob": 4}
    export(store, file, None, every_answer=True)
    with pytest.raises(UserError, match=r"are no verdicts on pairs \(line .*without --answers"):
        raters_win_rate(file, SETTINGS)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([ROW, ROW], "line 2: .*Ada has judged this pair in line 1 too"),
        ([ROW, ROW | {"winner": "C"}], "line 2: .*winner 'C'"),
        ([ROW, ROW | {"a": "older", "rater": "Bob"}], "new against old; new against older"),
        ([{"prompt": "a cup"}], "line 1: .*prompt_index"),
        ([], "holds no verdict"),
    ],
)
def test_lines_that_are_no_verdicts_are_named(lines: list, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        raters_win_rate(rows(tmp_path / "pairs.jsonl", *lines), SETTINGS)
    with pytest.raises(UserError, match=r"ends in .jsonl or .csv"):
        raters_win_rate(rows(tmp_path / "pairs.txt", *lines), SETTINGS)


def sources(folder: Path) -> tuple[Path, Path, Path]:
    """Made-up files in the formats of the four sources."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    for name in ("color", "shape", "texture", "spatial", "3d_spatial", "non_spatial", "numeracy"):
        text = "\r\n".join(f"made up {name} {i}" for i in range(40))
        (folder / f"{name}_val.txt").write_bytes(text.encode())
    # A prompt that another source has too, in other letters.
    (folder / "complex_val.txt").write_text("A photo of a bench\nmade up whole")
    captions = [f"a picked prompt {i // 2}" for i in range(400)]
    pq.write_table(pa.table({"caption": captions, "label_0": [1.0] * 400}), folder / "p.parquet")
    lines = ["Prompt\tCategory\tChallenge\tNote"]
    for i in range(300):
        challenge = ("Basic", "Complex", "Imagination")[i % 3]
        lines.append(f'a "parti" prompt {i}\t{("Animals", "People")[i % 2]}\t{challenge}\t')
    (folder / "PartiPrompts.tsv").write_text("\n".join(lines))
    return folder, folder / "p.parquet", folder / "PartiPrompts.tsv"


def test_the_set_is_balanced_and_always_the_same(tmp_path: Path) -> None:
    files = sources(tmp_path / "s")
    chosen, missing = preference_set(*files)
    assert len(chosen) == 532 and missing == []
    assert Counter(p.source for p in chosen) == dict.fromkeys(
        ("geneval", "compbench", "pickscore", "parti"), 133
    )
    of = {s: Counter(p.category for p in chosen if p.source == s) for s in ("geneval", "compbench")}
    assert set(of["geneval"].values()) == {22, 23}
    assert of["compbench"]["complex"] == 1  # all that it has beside GenEval's own
    assert {n for name, n in of["compbench"].items() if name != "complex"} == {18, 19}
    parti = Counter((p.category, p.kind) for p in chosen if p.source == "parti")
    assert len(parti) == 6 and set(parti.values()) <= {22, 23}
    assert len({p.prompt.casefold() for p in chosen}) == 532
    assert any('a "parti" prompt' in p.prompt for p in chosen)
    assert preference_set(*files)[0] == chosen
    other = preference_set(*files, seed=1)[0]
    assert other != chosen and Counter(p.source for p in other) == Counter(p.source for p in chosen)


def test_missing_sources_are_named_and_few_prompts_refused(tmp_path: Path) -> None:
    compbench, picked, _ = sources(tmp_path / "s")
    (compbench / "shape_val.txt").unlink()
    picked = tmp_path / "picked.txt"
    picked.write_text("one\ntwo\n")
    chosen, missing = preference_set(compbench, picked, None, count=100)
    assert len(chosen) == 100 and Counter(p.source for p in chosen)["pickscore"] == 2
    said = " ".join(missing)
    assert "source parti is missing: give it with --parti" in said
    assert "lacks shape_val.txt" in said and "pickscore has only 2 prompts of the 33" in said
    with pytest.raises(UserError, match=r"hold 553 different prompts, and the set is of 554"):
        preference_set(None, None, None, count=554)
    with pytest.raises(UserError, match=r"cannot be read as PartiPrompts.tsv"):
        preference_set(None, None, compbench / "color_val.txt")
    with pytest.raises(UserError, match=r"column caption"):
        bad = tmp_path / "bad.parquet"
        bad.write_bytes(b"no parquet")
        preference_set(None, bad, None)


def test_its_lines_are_metadata_of_folders_that_are_rated_and_judged(tmp_path: Path) -> None:
    chosen, _ = preference_set(*sources(tmp_path / "s"), count=8)
    for index, prompt in enumerate(chosen):
        place = write_prompt(tmp_path / "out", index, prompt.line())
        Image.new("RGB", (8, 8)).save(place / "0000.png")
    read = read_folder(tmp_path / "out")
    assert [s.metadata["prompt"] for s in read] == [p.prompt for p in chosen]
    assert {s.metadata["source"] for s in read} == {"geneval", "compbench", "pickscore", "parti"}


@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.integers(0, 100))
def test_shares_are_even_and_complete(sizes: list[int], count: int) -> None:
    shares = even_shares({str(i): n for i, n in enumerate(sizes)}, count)
    given_ = [shares[str(i)] for i in range(len(sizes))]
    assert sum(given_) == min(count, sum(sizes))
    assert all(0 <= got <= n for got, n in zip(given_, sizes, strict=True))
    # Whoever got less than the most by two or more had no more to give.
    assert all(got == n for got, n in zip(given_, sizes, strict=True) if got < max(given_) - 1)
