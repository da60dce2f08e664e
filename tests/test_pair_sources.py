"""Preference pairs from raters, a set of high quality and Pick-a-Pic, and what they refuse."""

import copy
import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from components.curation.pictures import DamagedPicture
from components.curation.shards import write_shard
from components.errors import UserError
from components.evaluation.folder import write_prompt
from components.feedback.pair_set import draw_or_read
from components.feedback.pair_sources import held_out_words, picture_of, quality, raters
from components.feedback.pairs import Tally
from components.feedback.pickapic import pickapic
from components.files import read_json, write_json
from components.model import DJEPAPipeline
from components.model.djepa import DJEPA
from components.model.sampler import SamplerConfig
from components.rating.exchange import export
from components.rating.jobs import pair_job
from components.rating.store import Store
from components.scenes.world import World
from components.tokens.text import WordEncoder
from components.tokens.tokenizer import PatchTokenizer
from components.tracking import Tracker
from components.training.preference import dpo
from tests.tiny_curated import tiny_config

ROOT = Path(__file__).parents[1]
RED, BLUE = (220, 30, 30), (30, 30, 220)
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
PARAMS["evaluation"]["workers"] = 1
PARAMS["dpo"] |= {"size": "16x16", "least_pairs": 4, "steps": 4, "check_every": 2, "batch": 4}
PARAMS["dpo"] |= {"check_draws": 1, "bootstrap": 20, "warmup": 1, "adapter": "lora"}
WORLD = World.from_params(PARAMS["data"])
HELD_OUT = WORLD.prompts("held_out", "colors")[0]["prompt"]
SEEN = [m["prompt"] for m in WORLD.prompts("seen", "colors")]


def with_pairs(path, source, **more):
    params = copy.deepcopy(PARAMS)
    params["dpo"]["pairs"] |= {"source": source, "path": str(path)} | more
    return params


def png(colour, size=(16, 16), kind="PNG"):
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, kind)
    return stream.getvalue()


def colour(image):
    """Which of the two colours a picture is."""
    return "red" if np.asarray(image)[..., 0].mean() > np.asarray(image)[..., 2].mean() else "blue"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved pipeline that knows nothing, and its state."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = PatchTokenizer(4, 8)
    tokenizer.fit([torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1])
    torch.manual_seed(0)
    network = DJEPA(tiny_config(8, 32))
    sampler = SamplerConfig(2, 2, 1.0, 1.0, 1.0, 16, 16)
    DJEPAPipeline(network, tokenizer, WordEncoder(16, 32), sampler).save_pretrained(
        folder / "models"
    )
    (folder / "states").mkdir()
    write_json(folder / "states/state.json", {"images": 5})
    return folder


# ---- what enters


@pytest.mark.parametrize(
    ("caption", "combination"),
    [
        (HELD_OUT, HELD_OUT.split(" ", 4)[4]),
        (HELD_OUT.upper() + "!", HELD_OUT.split(" ", 4)[4]),
        (f"On the table, the {HELD_OUT.split(' ', 4)[4]}s of my aunt", HELD_OUT.split(" ", 4)[4]),
        (SEEN[0], ""),
        ("a cat", ""),
    ],
)
def test_held_out_combinations_are_found_in_captions(caption, combination):
    assert held_out_words(PARAMS)(caption) == combination


def test_every_held_out_prompt_is_found_and_no_training_prompt():
    named = held_out_words(PARAMS)
    prompts = [m for task in World.TASKS for m in WORLD.all_prompts(task)]
    for metadata in prompts:
        assert bool(named(metadata["prompt"])) == WORLD.is_held_out(metadata), metadata["prompt"]


def test_pictures_are_cut_and_reduced_to_one_size_and_never_enlarged():
    assert picture_of(png(RED, (40, 38), "JPEG"), PARAMS).size == (16, 16)
    for data in (png(RED, (15, 16)), png(RED, (64, 16)), b"no picture", png(RED)[:60]):
        with pytest.raises(DamagedPicture):
            picture_of(data, PARAMS)


# ---- Pick-a-Pic


def row(caption=SEEN[0], first=1.0, second=0.0, **more):
    values = {"caption": caption, "jpg_0": png(RED, (20, 20)), "jpg_1": png(BLUE, (32, 31))}
    values |= {"label_0": first, "label_1": second, "has_label": True}
    values |= {"best_image_uid": "x", "image_0_uid": "x", "image_1_uid": "y", "other": 1}
    return values | more


def pick(tmp_path, rows, name="a.parquet", **more):
    pd.DataFrame(rows).to_parquet(tmp_path / name)
    tally = Tally()
    found = pickapic(tmp_path, Path(), with_pairs(tmp_path, "pickapic", **more), tally)
    return list(found), tally


def test_pickapic_gives_what_was_preferred(tmp_path):
    rows = [row(), row(first=0.0, second=1.0, best_image_uid="y")]
    pairs, tally = pick(tmp_path, rows)
    assert [colour(p.winner) for p in pairs] == ["red", "blue"]
    assert [colour(p.loser) for p in pairs] == ["blue", "red"]
    assert {p.winner.size for p in pairs} | {p.loser.size for p in pairs} == {(16, 16)}
    assert not tally.rejected and pairs[1].facts == {"place": "a.parquet:1"}


def test_pickapic_counts_ties_and_lists_what_cannot_be_used(tmp_path):
    rows = [
        row(first=0.5, second=0.5, best_image_uid="tie"),
        row(has_label=False),
        row(jpg_0=b"\xff\xd8\xff nothing"),
        row(jpg_1=None),
        row(jpg_1=png(BLUE, (8, 8))),
        row(caption=" "),
        row(caption=HELD_OUT),
        row(first=0.7, second=0.3),
        row(first=None, second=None),
        row(best_image_uid="y"),
        row(),
    ]
    pairs, tally = pick(tmp_path, rows)
    assert len(pairs) == 1
    assert tally.figures == {"ties": 1, "unlabelled": 1, "rejected": 8}
    words = ("image file", "no bytes", "8x8", "0 letters", "held-out", "0.7", "label_0", "uid")
    for (place, why), number, word in zip(tally.rejected, range(2, 10), words, strict=True):
        assert place == f"a.parquet:{number}" and word in why


def test_pickapic_stops_at_the_limit_and_passes_over_damaged_files(tmp_path):
    (tmp_path / "0.parquet").write_bytes(b"PAR1 nothing PAR1")
    pairs, tally = pick(tmp_path, [row()] * 5, most=3)
    assert len(pairs) == 3 and [what for what, _ in tally.rejected] == ["0.parquet"]


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_pickapic_with_bytes_spoilt_anywhere_raises_nothing_else(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("spoilt")
    pd.DataFrame([row()] * 8).to_parquet(folder / "a.parquet")
    spoilt = bytearray((folder / "a.parquet").read_bytes())
    for _ in range(data.draw(st.integers(1, 20))):
        spoilt[data.draw(st.integers(0, len(spoilt) - 1))] = data.draw(st.integers(0, 255))
    (folder / "a.parquet").write_bytes(spoilt)
    try:
        pairs = list(pickapic(folder, Path(), with_pairs(folder, "pickapic"), Tally()))
    except UserError:  # a column's name was hit
        return
    assert all(pair.winner.size == (16, 16) for pair in pairs)


def test_pickapic_without_its_columns_or_files_is_refused(tmp_path):
    with pytest.raises(UserError, match="no parquet file"):
        list(pickapic(tmp_path, Path(), PARAMS, Tally()))
    with pytest.raises(UserError, match="lacks the columns jpg_0, jpg_1"):
        pick(tmp_path, pd.DataFrame([row()]).drop(columns=["jpg_0", "jpg_1"]))


# ---- raters


@pytest.fixture
def rated(tmp_path):
    """Two folders of pictures, a red and b blue, the first prompt's with two pictures each."""
    for name, paint in (("a", RED), ("b", BLUE)):
        for index, prompt in enumerate(SEEN[:4]):
            metadata = next(m for m in WORLD.all_prompts("colors") if m["prompt"] == prompt)
            samples = write_prompt(tmp_path / name, index, metadata)
            for k in range(2 if index == 0 else 1):
                (samples / f"{k:04d}.png").write_bytes(png(paint))
    return tmp_path


def lines(folder, said, name="ratings.jsonl"):
    """An export: of each picture what raters said of it; ((index, sample), (winner, …))."""
    rows = [
        {"prompt_index": index, "sample": sample, "prompt": SEEN[index], "a": "a", "b": "b"}
        | {"rater": f"rater {n}", "winner": winner, "question": "adherence"}
        for (index, sample), winners in said
        for n, winner in enumerate(winners)
    ]
    (folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows))


def read_raters(folder):
    tally = Tally()
    return list(raters(folder, Path(), with_pairs(folder, "raters"), tally)), tally


def test_most_raters_decide_and_ties_are_skipped(rated):
    said = [((0, "0000"), "ABA"), ((0, "0001"), "BB"), ((1, "0000"), "AB")]
    lines(rated, [*said, ((2, "0000"), ("A", "same", "same")), ((3, "0000"), ("A", "same"))])
    pairs, tally = read_raters(rated)
    assert [(p.prompt, colour(p.winner), colour(p.loser)) for p in pairs] == [
        (SEEN[0], "red", "blue"),
        (SEEN[0], "blue", "red"),
    ]
    assert pairs[0].facts == {"winner": "a", "loser": "b", "place": "00000/0000", "raters": 3}
    assert tally.figures == {"ties": 3}


def test_the_same_verdict_twice_counts_once_and_a_later_one_replaces_it(rated):
    lines(rated, [((0, "0000"), "AB")], "1.jsonl")
    lines(rated, [((0, "0000"), "BB")], "2.jsonl")
    pairs, _ = read_raters(rated)
    assert [colour(p.winner) for p in pairs] == ["blue"] and pairs[0].facts["raters"] == 2


def test_what_the_raters_page_exports_is_read(rated):
    job, store = pair_job(rated / "a", rated / "b"), Store(rated / "ratings.sqlite", True)
    store.register(job)
    for item in job.items:
        store.answer(job, item, "Ann", "adherence", "B")
    export(store, rated / "ratings.jsonl", None, False)
    pairs, tally = read_raters(rated)
    assert len(pairs) == 5 and {colour(p.winner) for p in pairs} == {"blue"}
    assert not tally.figures


def test_pictures_that_are_gone_or_damaged_are_listed(rated):
    (rated / "b/00001/samples/0000.png").write_bytes(b"nothing")
    (rated / "a/00002/metadata.jsonl").write_text((rated / "a/00003/metadata.jsonl").read_text())
    lines(rated, [((i, "0000"), "A") for i in range(4)] + [((0, "0007"), "A")])
    pairs, tally = read_raters(rated)
    assert [p.prompt for p in pairs] == [SEEN[0], SEEN[3]]
    assert [what for what, _ in tally.rejected] == [
        f"{place} of a and b" for place in ("00001/0000", "00002/0000", "00000/0007")
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"a": "../a"}, "not there"),
        ({"a": "/etc"}, "not there"),
        ({"b": "phase1"}, "copy the folders"),
        ({"winner": "C"}, "line 1.*winner 'C'"),
        ({"sample": None}, "line 1"),
        ({"prompt": HELD_OUT}, f"held-out combinations.*{HELD_OUT}"),
    ],
)
def test_bad_ratings_are_refused_by_name(rated, change, words):
    line = {"prompt_index": 0, "sample": "0000", "prompt": SEEN[0], "a": "a", "b": "b"}
    line |= {"rater": "Ann", "winner": "A", "question": "adherence"} | change
    (rated / "ratings.jsonl").write_text(json.dumps(line))
    with pytest.raises(UserError, match=words):
        read_raters(rated)


def test_a_folder_without_ratings_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match=r"no folder with ratings"):
            read_raters(path)


# ---- a set of high quality


def shard(folder, captions, size=(24, 24), meta=None):
    folder.mkdir(exist_ok=True)
    truth = json.dumps(meta or {}).encode()
    members = [
        (f"{i:05d}", {"png": png(RED, size), "txt": text.encode(), "json": truth})
        for i, text in enumerate(captions)
    ]
    write_shard(folder / "00000.tar", members)
    return folder


def test_the_sets_pictures_win_over_the_models_own(tmp_path, model):
    folder = shard(tmp_path / "fine", [*SEEN[:3], "", SEEN[3]])
    (folder / "loose.jpg").write_bytes(b"no picture")
    tally = Tally()
    params = with_pairs(folder, "quality", most=4)
    pairs = list(quality(folder, model / "models", params, tally))
    assert [p.prompt for p in pairs] == SEEN[:4]
    assert {colour(p.winner) for p in pairs} == {"red"}
    assert {p.loser.size for p in pairs} == {(16, 16)}
    assert ("00003", "no caption") in tally.rejected
    again = list(quality(folder, model / "models", params, Tally()))
    assert all(np.array_equal(a.loser, b.loser) for a, b in zip(pairs, again, strict=True))


def test_held_out_combinations_of_the_set_are_refused_said_or_shown(tmp_path, model):
    folder = shard(tmp_path / "said", [SEEN[0], HELD_OUT])
    with pytest.raises(UserError, match=f"1 pictures are of held-out.*{HELD_OUT}"):
        list(quality(folder, model / "models", with_pairs(folder, "quality"), Tally()))
    thing, paint = next(iter(WORLD.held_out.color_shape))[::-1]
    meta = {"scene": {"objects": [{"class": thing, "color": paint, "box": [1, 1, 9, 9]}]}}
    folder = shard(tmp_path / "shown", ["a nice picture"], meta=meta)
    with pytest.raises(UserError, match="a nice picture"):
        list(quality(folder, model / "models", with_pairs(folder, "quality"), Tally()))
    with pytest.raises(UserError, match="No folder"):
        list(quality(tmp_path / "no", model / "models", PARAMS, Tally()))


# ---- the stage on them


def run(model, out, params):
    dpo(
        model / "states", model / "models", model / "encoded", out / "model", out / "state",
        out / "dpo.json", out / "resume", params, Tracker(),
    )  # fmt: skip
    return read_json(out / "dpo.json")


def test_the_stage_tunes_an_adapter_on_given_pairs(tmp_path, model):
    rows = [row(SEEN[i % 6], *((1.0, 0.0) if i % 2 else (0.5, 0.5))) for i in range(20)]
    (tmp_path / "picks").mkdir()
    rows.append(row(has_label=False))
    pd.DataFrame(rows).to_parquet(tmp_path / "picks" / "a.parquet")
    figures = run(model, tmp_path, with_pairs(tmp_path / "picks", "pickapic"))
    assert (figures["pairs"], figures["ties"], figures["unlabelled"]) == (10, 10, 1)
    assert figures["trained_parameters"] < figures["parameters"]
    table = pd.read_parquet(tmp_path / "state/pairs.parquet")
    assert table.groupby("prompt")["held_out"].nunique().eq(1).all() and table["held_out"].any()
    assert (tmp_path / "state/curves.png").is_file()
    # The adapter on the model it began with draws what the tuned model draws.
    tuned = DJEPAPipeline.from_pretrained(tmp_path / "model")
    start = DJEPAPipeline.from_pretrained(model / "models")
    start.load_lora_weights(tmp_path / "state/lora")
    drawn = [
        pipe(SEEN[0], generator=torch.Generator().manual_seed(0), output_type="np").images
        for pipe in (tuned, start)
    ]
    assert np.abs(drawn[0] - drawn[1]).max() < 1 / 255


def test_too_few_given_pairs_are_an_error_that_says_why(tmp_path, model):
    (tmp_path / "picks").mkdir()
    file = tmp_path / "picks" / "a.parquet"
    params = with_pairs(tmp_path / "picks", "pickapic")
    pd.DataFrame([row(), row(first=0.5, second=0.5)]).to_parquet(file)
    with pytest.raises(UserError, match=r"1 pairs, fewer than dpo.least_pairs 4 \(ties 1\)"):
        run(model, tmp_path, params)
    # The mended file is read, not the pairs of the first try.
    pd.DataFrame([row()] * 6).to_parquet(file)
    with pytest.raises(UserError, match="6 pairs, all of one prompt"):
        run(model, tmp_path, params)
    assert not (tmp_path / "model").exists()


def test_an_interrupted_run_reads_the_pairs_that_it_has_made(tmp_path, model):
    params, pipe = with_pairs(tmp_path, "pickapic"), DJEPAPipeline.from_pretrained(model / "models")
    pd.DataFrame([row(SEEN[i]) for i in range(4)]).to_parquet(tmp_path / "a.parquet")
    made, figures = draw_or_read(tmp_path / "pairs", model, pipe, tmp_path, params)
    (tmp_path / "a.parquet").unlink()
    read, again = draw_or_read(tmp_path / "pairs", model, pipe, tmp_path, params)
    assert figures == again and made.prompts == read.prompts == SEEN[:4]
    assert torch.equal(made.winner, read.winner) and torch.equal(made.states, read.states)
