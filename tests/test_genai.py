"""GenAI-Bench: official files, VQAScore's results, the aggregates, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from components.errors import UserError
from components.evaluation.draw_sets import draw_genai
from components.evaluation.genai import ADVANCED, BASIC, read_prompts, read_skills, score_genai
from tests.test_draw_sets import model as drawing_model  # noqa: F401

SETTINGS = {"bootstrap": 200, "seed": 0}
N = 12


def bench(folder: Path, first: int = 0, grouped: bool = True) -> Path:
    """The official files in small: a prompt a skill, two of both kinds, made-up prompts."""
    ids = [f"{i:05d}" for i in range(first, first + N)]
    prompts = {key: {"id": key, "prompt": f"a made-up prompt {key}", "models": {}} for key in ids}
    tags = {tag: [first + i, first + 10] for i, tag in enumerate(BASIC)}
    tags |= {tag: [first + 5 + i, first + 10, first + 11] for i, tag in enumerate(ADVANCED)}
    if grouped:
        tags["basic"] = [first + i for i in range(5)]
        tags["advanced"] = [first + i for i in range(5, 12)]
    folder.mkdir(parents=True)
    (folder / "genai_image.json").write_text(json.dumps(prompts))
    (folder / "genai_skills.json").write_text(json.dumps(tags))
    return folder / "genai_image.json"


def drawn(folder: Path, first: int = 0) -> Path:
    folder.mkdir(parents=True)
    for i in range(first, first + N):
        Image.new("RGB", (8, 8)).save(folder / f"{i:05d}.jpeg")
    return folder


def results(folder: Path, scores: list[float]) -> Path:
    """As genai_bench/evaluate.py saves them: a picture and a text a prompt."""
    file = folder / "clip-flant5-xxl_527_prompts.pt"
    torch.save(torch.tensor(scores)[:, None, None], file)
    return file


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("grouped", [True, False])
def test_the_table_is_the_official_one(first: int, grouped: bool, tmp_path: Path) -> None:
    prompts = bench(tmp_path / "files", first, grouped)
    pictures = drawn(tmp_path / "out/model", first)
    scores = [i / 20 for i in range(N)]
    result = score_genai(pictures, results(tmp_path, scores), SETTINGS, prompts)
    skills = result["skills"]
    assert list(skills) == [*BASIC, *ADVANCED, "basic", "advanced", "all"]
    assert skills["attribute"] == {"score": 0.25, "n": 2, "stderr": skills["attribute"]["stderr"]}
    assert skills["counting"]["score"] == pytest.approx((5 + 10 + 11) / 60, abs=1e-4)
    # The tag, not the mean of its skills; what is both is advanced.
    assert skills["basic"]["score"] == pytest.approx(np.mean(scores[:5]), abs=1e-4)
    assert skills["basic"]["n"] == 5 and skills["advanced"]["n"] == 7
    assert skills["advanced"]["score"] == pytest.approx(np.mean(scores[5:]), abs=1e-4)
    assert skills["all"] == {"score": 0.275, "n": 12, "stderr": skills["all"]["stderr"]}
    assert result["benchmark"] == "GenAI-Bench" and result["n"] == 12
    assert "clip-flant5-xxl_527_prompts.pt" in result["scored_by"]
    assert "12 prompts, officially 527 or 1600" in result["problems"][0]
    # JSON of the same scores is the same.
    file = tmp_path / "scores.json"
    file.write_text(json.dumps({f"{first + i:05d}": s for i, s in enumerate(scores)}))
    assert score_genai(pictures, file, SETTINGS, prompts)["skills"] == skills


@hypothesis_settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_basic_and_advanced_are_disjoint_unions(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Computed where the file lacks them; of the official rule by plain sets."""
    file = tmp_path_factory.mktemp("s") / "genai_skills.json"
    numbers = st.lists(st.integers(0, N - 1), min_size=1, max_size=6)
    tags = {tag: data.draw(numbers) for tag in (*BASIC, *ADVANCED)}
    file.write_text(json.dumps(tags))
    found = read_skills(file, {f"{i:05d}": "x" for i in range(N)})
    advanced = {f"{n:05d}" for tag in ADVANCED for n in tags[tag]}
    assert set(found["advanced"]) == advanced
    assert set(found["basic"]) == {f"{n:05d}" for tag in BASIC for n in tags[tag]} - advanced
    assert set(found["all"]) == set(found["basic"]) | advanced


def spoil(folder: Path, how: str) -> None:
    """One thing wrong in a sound folder."""
    skills = folder / "files/genai_skills.json"
    tags = json.loads(skills.read_text())
    match how:
        case "missing picture":
            (folder / "out/model/00003.jpeg").unlink()
        case "unreadable picture":
            (folder / "out/model/00003.jpeg").write_bytes(b"")
        case "unknown tag":
            skills.write_text(json.dumps(tags | {"colour": [1]}))
        case "no tag":
            del tags["negation"]
            skills.write_text(json.dumps(tags))
        case "foreign number":
            skills.write_text(json.dumps(tags | {"scene": [99]}))
        case "other union":
            skills.write_text(json.dumps(tags | {"basic": [0, 1, 2, 3, 5]}))
        case "partial run":
            results(folder, [0.5] * 11)
        case "no score":
            results(folder, [0.5] * 11 + [float("nan")])
        case "no tensor":
            (folder / "clip-flant5-xxl_527_prompts.pt").write_bytes(b"scores")
        case "part of the prompts":
            file = folder / "files/genai_image.json"
            prompts = json.loads(file.read_text())
            del prompts["00003"]
            file.write_text(json.dumps(prompts))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing picture", r"lacks 1 of 12 pictures \(00003.jpeg\)"),
        ("unreadable picture", r"00003.jpeg cannot be read as a picture"),
        ("unknown tag", "tags that are unknown: colour"),
        ("no tag", "lacks negation"),
        ("foreign number", r"tags prompts that genai_image.json lacks: 99"),
        ("other union", r"the tag basic is not the union of its skills \(4, 5 differ\)"),
        ("partial run", "has 11 scores, and there are 12 prompts"),
        ("no score", r"what is no score of 0 to 1 \(00011: nan\)"),
        ("no tensor", "cannot be read as VQAScore's results"),
        ("part of the prompts", "its ids are not numbered on"),
    ],
)
def test_bad_input_is_refused_by_name(how: str, words: str, tmp_path: Path) -> None:
    prompts = bench(tmp_path / "files")
    pictures = drawn(tmp_path / "out/model")
    scores = results(tmp_path, [0.5] * N)
    spoil(tmp_path, how)
    with pytest.raises(UserError, match=words):
        score_genai(pictures, scores, SETTINGS, prompts)


def test_other_files_sizes_and_ids_are_named(tmp_path: Path) -> None:
    prompts = bench(tmp_path / "files")
    pictures = drawn(tmp_path / "out/model")
    Image.new("RGB", (9, 8)).save(pictures / "00002.jpeg")
    (pictures / "grid.png").touch()
    result = score_genai(pictures, results(tmp_path, [0.5] * N), SETTINGS, prompts)
    assert any("no picture of a prompt: grid.png" in gap for gap in result["problems"])
    assert any("2 sizes: 11 of 8x8, 1 of 9x8" in gap for gap in result["problems"])
    file = tmp_path / "scores.json"
    file.write_text(json.dumps({str(i): 0.5 for i in range(N)}))
    with pytest.raises(UserError, match=r"12 have no score.*12 scores have no prompt"):
        score_genai(pictures, file, SETTINGS, prompts)
    with pytest.raises(UserError, match=r"give the genai_image.json"):
        score_genai(pictures, file, SETTINGS)
    with pytest.raises(UserError, match=r"cannot be read as GenAI-Bench's genai_image.json"):
        read_prompts(tmp_path / "nothing.json")


def test_the_official_layout_is_drawn_gone_on_with_and_scored(
    drawing_model: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    file, out = bench(tmp_path / "official"), tmp_path / "out/tiny"
    settings = {"batch_size": 6, "workers": 1, "seed": 0, "sampler": {"autoregressive_steps": 2}}
    assert draw_genai(drawing_model, file, out, None, settings) == N
    before = (out / "00003.jpeg").read_bytes()
    assert before[:2] == b"\xff\xd8"  # a JPEG
    (out / "00003.jpeg").unlink()
    assert draw_genai(drawing_model, file, out, None, settings) == 1
    assert (out / "00003.jpeg").read_bytes() == before
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps({key: 0.5 for key in read_prompts(file)}))
    result = score_genai(out, scores, SETTINGS, file)
    assert not any("no picture of a prompt" in problem for problem in result["problems"])
