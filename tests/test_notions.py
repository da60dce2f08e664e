"""Notions: what is found in captions, and the tables over them."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from components.curation.notions import (
    ENTITY,
    TOKEN,
    Notion,
    NotionFinder,
    NotionTables,
    choose,
    column,
)
from components.errors import UserError
from components.scenes import tasks

PARAMS = Path(__file__).parents[1] / "params"
KINDS = {"numeral", "quantifier", "colour", "shape", "texture", "spatial_relation"}
KINDS |= {"non_spatial_relation", "style"}
WORDS = ["a", "photo", "of", "the", "left", "to", "dark", "blue", "two", "crosses", "dog", "bears"]
WORDS += ["teddy", "wearing", "glasses", ",", "-", "oil", "painting", "geese", "on", "top", "3"]
captions = st.one_of(
    st.lists(st.sampled_from(WORDS), max_size=14).map(" ".join), st.text(max_size=60)
)


@cache
def shipped() -> NotionFinder:
    """The finder with the word lists of the project."""
    return NotionFinder(yaml.safe_load((PARAMS / "curation/default.yaml").read_text())["notions"])


def small(**more: object) -> NotionFinder:
    attributes = {
        "spatial_relation": ["left of", "to the left of", "above"],
        "colour": ["blue", "dark blue"],
        "numeral": ["two"],
        "shape": ["cross"],
    }
    return NotionFinder({"attributes": attributes, "stop_words": ["a photo of"], **more})


def words(finder: NotionFinder, caption: str, kind: str | None = None) -> list[str]:
    return [n.word for n in finder.find(caption) if kind in (None, n.kind)]


def test_longest_match_wins_and_plurals_fold() -> None:
    caption = "A photo of two dark blue crosses to the left of the boxes"
    assert words(small(), caption) == ["two", "dark blue", "cross", "to the left of", "box"]
    assert words(small(), "left of blue") == ["left of", "blue"]
    assert words(small(), "left, of dark-blue") == []  # no phrase reaches across a comma
    assert small().find("") == []


def test_same_counts_as_one_notion() -> None:
    finder = small(same={"to the left of": "left of", "azure": "blue", "puppy": "dog"})
    caption = "an azure box to the left of a blue box, left of puppies"
    assert words(finder, caption) == ["blue", "box", "left of", "dog"]
    assert finder.find("puppy") == [Notion("dog", ENTITY)]


def test_only_nouns_are_entities() -> None:
    finder = shipped()
    assert words(finder, "a happy dog running", ENTITY) == ["dog"]
    assert words(finder, "geese, wolves and buses slowly crossing", ENTITY) == [
        "goose", "wolf", "bus"
    ]  # fmt: skip
    assert words(finder, "the bear's leaves under a hippopotamus", ENTITY) == [
        "bear", "leaf", "hippopotamus"
    ]  # fmt: skip
    found = finder.find("An oil painting of a man wearing glasses, holding teddy bears")
    assert [(n.word, n.kind) for n in found] == [
        ("oil painting", "style"), ("man", ENTITY), ("wearing", "non_spatial_relation"),
        ("glasses", ENTITY), ("holding", "non_spatial_relation"), ("teddy bear", ENTITY),
    ]  # fmt: skip


def test_the_embedded_world_is_described_by_attributes_alone() -> None:
    finder = shipped()
    required = yaml.safe_load((PARAMS / "scale/demo.yaml").read_text())
    required = set(required["curation"]["contract"]["required"])
    shapes = ["circle", "triangle", "cross", "ring", "bar"]
    relations = ["left of", "right of", "above", "below"]
    colours = ["red", "blue", "yellow", "green", "white", "black"]
    scenes = [tasks.counting(shape, count) for shape in shapes for count in (2, 3, 4)]
    scenes += [tasks.position(shape, r, "bar") for shape in shapes for r in relations]
    scenes += [tasks.color_attr("bar", colours[i - 1], "ring", c) for i, c in enumerate(colours)]
    found = {n for scene in scenes for n in finder.find(scene["prompt"])}
    assert {n.word for n in found} == required
    assert {n.kind for n in found} == {"numeral", "colour", "shape", "spatial_relation"}
    assert words(finder, "a red ring to the left of a blue bar") == [
        "red", "ring", "left of", "blue", "bar"
    ]  # fmt: skip


def test_every_listed_word_is_found_as_what_it_is_listed_as() -> None:
    rules = yaml.safe_load((PARAMS / "curation/default.yaml").read_text())["notions"]
    assert set(rules["attributes"]) == KINDS
    for kind, listed in rules["attributes"].items():
        for word in listed:
            assert shipped().find(f"so {word}") == [Notion(word, kind)]
    for word in rules["compounds"]:
        assert shipped().find(word) == [Notion(word, ENTITY)]
    for word, meant in rules["same"].items():
        assert shipped().find(word) == shipped().find(meant) != []
    for word in rules["stop_words"]:
        assert shipped().find(word) == []


def test_words_that_yaml_did_not_read_as_text_are_named() -> None:
    for wrong in ({"same": {2: "two"}}, {"compounds": [True]}, {"tags": {"bear": None}}):
        with pytest.raises(UserError, match=f"{next(iter(wrong))} holds .* in quotes"):
            small(**wrong)
    with pytest.raises(UserError, match=r"attributes\.colour holds 7"):
        NotionFinder({"attributes": {"colour": [7]}, "stop_words": []})


@settings(deadline=None)
@given(captions)
def test_matches_are_longest_and_never_overlap(caption: str) -> None:
    finder, end = shipped(), 0
    tokens = TOKEN.findall(caption.lower())
    phrases = {phrase: len(phrase) for phrase in finder._phrases}
    keys = [finder._fold(token)[0] for token in tokens]
    for at, length, notion in finder.matches(caption):
        assert at >= end and notion.word
        end = at + length
        longer = [p for p, n in phrases.items() if n > length and tuple(keys[at : at + n]) == p]
        assert end <= len(tokens) and not longer


@settings(deadline=None)
@given(st.lists(captions, max_size=6))
def test_find_all_is_find_of_each(texts: list[str]) -> None:
    found = shipped().find_all(texts)
    assert found == [shipped().find(text) for text in texts]
    assert all(len(set(notions)) == len(notions) for notions in found)


def test_hostile_captions_take_no_quadratic_time() -> None:
    for caption in ("(" * 300_000, "a-" * 150_000, "left of " * 40_000):
        assert len(shipped().find(caption)) <= 1


def test_columns_are_safe_and_one_a_name() -> None:
    assert column("to the left of") == "notion_to_the_left_of"
    assert column("teddy-bear's") == "notion_teddy_bear_s"
    counts = {Notion("red", "colour"): 9, Notion("ring", ENTITY): 7, Notion("rare", ENTITY): 1}
    counts |= {Notion("red", ENTITY): 8, Notion("box", ENTITY): 5}
    assert [n.word for n in choose(counts, 2, 2)] == ["red", "ring"]


names = st.text("abé- '", min_size=1, max_size=4)
kinds = st.sampled_from(["colour", "style", ENTITY])


@given(st.dictionaries(st.builds(Notion, names, kinds), st.integers(1, 9)), st.integers(0, 5))
def test_chosen_notions_have_columns_of_their_own(counts: dict[Notion, int], room: int) -> None:
    chosen = choose(counts, 3, room)
    columns = [column(n.word) for n in chosen]
    assert len(set(columns)) == len(columns)
    assert sum(n.kind == ENTITY for n in chosen) <= room
    assert all(counts[n] >= 3 for n in chosen)


NOTIONS = [Notion("red", "colour"), Notion("ring", ENTITY), Notion("two", "numeral")]


def test_notion_tables_count_pairs_and_sizes() -> None:
    tables = NotionTables(NOTIONS[:2], 64, 0.25)
    present = np.array([[True, True], [True, False], [True, True]])
    tables.add(present, [("web", 128, 128), ("web", 192, 128), ("lab", 130, 200)])
    assert tables.frequencies()["count"].tolist() == [3, 2]
    assert tables.cooccurrence()["count"].tolist() == [2]
    sizes = tables.distributions().set_index(["source", "quantity", "low"])["count"]
    assert sizes["web", "shorter_side", 128.0] == 2 and sizes["web", "aspect", 1.5] == 1
    assert sizes["lab", "aspect", 0.5] == 1
    assert tables.sources() == {"lab": 1, "web": 2}


rows = st.tuples(
    st.lists(st.booleans(), min_size=3, max_size=3),
    st.tuples(st.sampled_from(["web", "lab"]), st.integers(1, 3000), st.integers(1, 3000)),
)


@given(st.lists(st.tuples(rows, st.integers(0, 3)), max_size=20))
def test_merged_parts_give_the_tables_of_the_whole(placed: list[tuple]) -> None:
    def tables(of: list[tuple]) -> NotionTables:
        made = NotionTables(NOTIONS, 64, 0.25)
        made.add(np.array([p for p, _ in of], bool).reshape(-1, 3), [size for _, size in of])
        return made

    whole, merged = tables([row for row, _ in placed]), NotionTables(NOTIONS, 64, 0.25)
    for part in (2, 0, 3, 1):
        state = tables([row for row, where in placed if where == part]).state()
        merged.merge(json.loads(json.dumps(state)))
    assert merged.state() == whole.state() and merged.sources() == whole.sources()
    for name in ("frequencies", "cooccurrence", "distributions"):
        pd.testing.assert_frame_equal(getattr(merged, name)(), getattr(whole, name)())


def test_tables_of_other_notions_are_not_merged() -> None:
    with pytest.raises(ValueError, match="same notions"):
        NotionTables(NOTIONS, 64, 0.25).merge(NotionTables(NOTIONS[:1], 64, 0.25).state())
    with pytest.raises(ValueError, match="same notions and bins"):
        NotionTables(NOTIONS, 64, 0.25).merge(NotionTables(NOTIONS, 32, 0.25).state())
