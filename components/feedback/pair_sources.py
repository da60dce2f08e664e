"""Preference pairs from files: raters' verdicts, and a set of high quality.

Their pictures are read as curation reads pictures, without trust, and brought to `dpo.size` as
encode does: cut at the centre and reduced, never enlarged. What cannot be used is listed with
its reason. Captions that ask for held-out combinations of the embedded world never enter.
"""

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from components.curation.pictures import DamagedPicture, decode
from components.curation.sources import find_units, read_unit
from components.errors import UserError
from components.evaluation.drawing import draw_pictures
from components.evaluation.folder import Sample, read_folder
from components.feedback.pairs import FIRST_SEED, Pair, Tally
from components.feedback.pictures import BATCH
from components.scenes.world import World
from components.tokens.rungs import fitted, reaching, rung_size

SHOWN = 5  # names in a message
DOCS = "see docs/dpo.md"


def held_out_words(params: Mapping[str, Any]) -> Callable[[str], str]:
    """A function that gives the held-out combination which a caption names, or "".

    Looked for are the world's own words ("red circle", "two bars", "bar above a ring") anywhere in
    a caption, whatever the capitals.
    """
    world = World.from_params(params["data"])
    phrases = {
        re.sub(r"^a photo of (an? )?", "", metadata["prompt"])
        for task in World.TASKS
        for metadata in world.prompts("held_out", task)
    }
    if not phrases:
        return lambda caption: ""
    longest_first = sorted(phrases, key=lambda phrase: (-len(phrase), phrase))
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, longest_first))})(?:e?s)?\b")

    def named(caption: str) -> str:
        found = pattern.search(" ".join(re.findall(r"\w+", caption.casefold())))
        return found[1] if found else ""

    return named


def refuse_held_out(path: Path, leaked: list[str]) -> None:
    """UserError if there are captions among these."""
    if leaked:
        more = ", …" if len(leaked) > SHOWN else ""
        raise UserError(
            f"{path}: {len(leaked)} pictures are of held-out combinations "
            f"({', '.join(map(repr, leaked[:SHOWN]))}{more}), which the benchmark keeps from all "
            "training; take these pictures out."
        )


def picture_of(data: bytes, params: Mapping[str, Any]) -> Image.Image:
    """Bytes as a picture of `dpo.size`. DamagedPicture where they are none that reaches it."""
    limits, name = params["curation"]["limits"], params["dpo"]["size"]
    if len(data) > limits["picture_bytes"]:
        raise DamagedPicture(f"{len(data)} bytes, limit {limits['picture_bytes']}")
    pixels = decode(data, limits)
    height, width = pixels.shape[:2]
    cropped = float(params["model"]["encode"]["most_cropped"])
    if not len(reaching(np.array([width]), np.array([height]), rung_size(name), cropped)):
        raise DamagedPicture(
            f"{width}x{height} does not reach {name}: smaller, or more than {cropped} of it to crop"
        )
    return Image.fromarray(fitted(pixels, rung_size(name)))


def raters(path: Path, model: Path, params: Mapping[str, Any], tally: Tally) -> Iterator[Pair]:
    """Pairs that raters decided: the folder `path` has `djepa rate export`'s lines and pictures.

    `path/*.jsonl` are exports of pairs; beside them lie the two evaluation folders under the names
    that the lines give them. What more than half of a pair's raters say counts; without such a
    majority, or if it says "same", the pair is a tie and skipped.

    Raises:
        UserError: no such file or folder, lines that are none, held-out combinations.
    """
    votes = _votes(path)
    folders: dict[str, dict[tuple[int, str], Sample]] = {}
    for name in sorted({name for key in votes for name in key[:2]}):
        if Path(name).is_absolute() or ".." in Path(name).parts or not (path / name).is_dir():
            raise UserError(
                f"The ratings in {path} are of a folder {name!r}, which is not there: copy the "
                f"folders whose pictures were rated into {path}; {DOCS}."
            )
        samples = read_folder(path / name)
        folders[name] = {(int(s.path.parent.parent.name), s.path.stem): s for s in samples}
    named = held_out_words(params)
    refuse_held_out(path, sorted({key[4] for key in votes if named(key[4])}))
    for (a, b, index, stem, prompt), said in votes.items():
        words = list(said.values())
        winner = next((word for word in "AB" if 2 * words.count(word) > len(words)), None)
        if winner is None:
            tally.count("ties")
            continue
        place = f"{index:05d}/{stem} of {a} and {b}"
        samples_of = [folders[name].get((index, stem)) for name in (a, b)]
        if not all(s and _utf8(s.metadata["prompt"]) == prompt for s in samples_of):
            tally.reject(place, "no such picture, or one of another prompt")
            continue
        try:
            both = [picture_of(s.path.read_bytes(), params) for s in samples_of if s]
        except (DamagedPicture, OSError) as problem:
            tally.reject(place, str(problem))
            continue
        won, lost = both if winner == "A" else reversed(both)
        names = {"winner": a, "loser": b} if winner == "A" else {"winner": b, "loser": a}
        facts = names | {"place": f"{index:05d}/{stem}", "raters": len(words)}
        yield Pair(prompt, won, lost, facts, f"{words.count(winner)} of {len(words)} raters")


def _votes(path: Path) -> dict[tuple[str, str, int, str, str], dict[str, str]]:
    """Of each pair (a, b, prompt's number, picture's, prompt) what each rater said, the last."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else []
    if not files:
        raise UserError(
            f"dpo.pairs.path is {path}, which is no folder with ratings in it: put there what "
            f"`djepa rate export` wrote (.jsonl) and the folders that were rated; {DOCS}."
        )
    votes: dict[tuple[str, str, int, str, str], dict[str, str]] = {}
    bad = []
    for file in files:
        for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                texts = [row[name] for name in ("a", "b", "sample", "prompt", "rater")]
                a, b, sample, prompt, rater = texts
                if not all(isinstance(text, str) for text in texts) or not prompt.strip():
                    raise ValueError("a, b, sample, prompt and rater are texts")
                if row["winner"] not in ("A", "B", "same"):
                    raise ValueError(f"winner {row['winner']!r}")
                key = (a, b, int(row["prompt_index"]), sample, prompt)
                votes.setdefault(key, {})[rater] = row["winner"]
            except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
                bad.append(f"{file.name} line {number}: {error!r}")
    if bad:
        more = ", …" if len(bad) > SHOWN else ""
        raise UserError(
            f"{path}: {len(bad)} lines are no raters' verdict on a pair "
            f"({'; '.join(bad[:SHOWN])}{more}); export the pairs again, without --answers."
        )
    return votes


def _utf8(prompt: str) -> str:
    """As the raters' page writes prompts."""
    return prompt.encode("utf-8", "replace").decode()


def _shows_held_out(world: World, meta: Mapping[str, Any]) -> bool:
    """Whether a picture of the embedded world shows a held-out combination, said or not."""
    try:
        things = [(o["class"], o["color"], tuple(o["box"])) for o in meta["scene"]["objects"]]
        return world.held_out.scene(things)
    except (KeyError, TypeError, ValueError, IndexError):
        return False  # no picture of the embedded world, or one whose truth is not known


def quality(path: Path, model: Path, params: Mapping[str, Any], tally: Tally) -> Iterator[Pair]:
    """Pictures of high quality win over those that the saved pipeline `model` draws of their texts.

    `path` is what curation reads: webdataset shards (a curated set among them), parquet files with
    pictures, an imagefolder. The first `dpo.pairs.most` pictures that can be used are taken (paper,
    section 4: an additional data set of ultra-high quality).

    Raises:
        UserError: nothing readable there, held-out combinations.
    """
    settings, curation = params["dpo"], params["curation"]
    most, named = int(settings["pairs"]["most"]), held_out_words(params)
    world = World.from_params(params["data"])
    winners: list[tuple[str, str, Image.Image]] = []
    leaked: list[str] = []
    with tempfile.TemporaryDirectory() as work:
        units = find_units(path, Path(work) / "index.parquet", curation)
        for sample in (sample for unit in units for sample in read_unit(unit, curation)):
            if len(winners) == most:
                break
            caption = " ".join(sample.caption.split())
            if sample.error or not caption:
                tally.reject(sample.key, sample.error or "no caption")
            elif named(caption) or _shows_held_out(world, sample.meta):
                leaked.append(f"{caption} ({sample.key})")
            else:
                try:
                    data = sample.members[sample.extension]
                    winners.append((sample.key, caption, picture_of(data, params)))
                except DamagedPicture as problem:
                    tally.reject(sample.key, str(problem))
    refuse_held_out(path, leaked)
    drawn = draw_pictures(
        model,
        [(caption, FIRST_SEED + i) for i, (_, caption, _) in enumerate(winners)],
        rung_size(settings["size"]),
        BATCH,
        settings["sampler"],
        int(params["evaluation"]["workers"]),
        "dpo losers",
    )
    for i, ((key, caption, picture), loser) in enumerate(zip(winners, drawn, strict=True)):
        facts = {"key": key, "seed_loser": FIRST_SEED + i}
        yield Pair(caption, picture, loser, facts, "the model's own")
