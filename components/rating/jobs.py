"""What raters are asked: labels of reference pictures (paper, 3.2), pairs (its human evaluation).

A job is a list of items; each item is asked its kind's questions one after the other.
"""

import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from components.errors import UserError
from components.evaluation.folder import MAX_PIXELS, read_folder
from components.files import hash_of
from components.progress import Progress

NAME_LENGTH = 40  # characters of a rater's name
SIDES = 20_241_122  # seed of which model is shown at the left


@dataclass(frozen=True)
class Choice:
    """A button: what the page sends, its words, the keys that press it."""

    value: str
    text: str
    keys: tuple[tuple[str, str], ...]  # JavaScript's name of the key, what the page calls it


@dataclass(frozen=True)
class Kind:
    """A kind of job. `questions`: name → what is asked, in order; `values`: answers as kept."""

    title: str
    questions: Mapping[str, str]
    choices: tuple[Choice, ...]
    values: tuple[str, ...]


KINDS = {
    "labels": Kind(
        "Is the picture good?",
        {
            "logic": "Does it make sense? Everything the prompt asks for, and nothing impossible.",
            "realism": "Does it look right? Clean shapes and surfaces, nothing smeared or broken.",
        },
        (
            Choice("good", "Good", (("1", "1"), ("ArrowLeft", "←"))),
            Choice("bad", "Bad", (("2", "2"), ("ArrowRight", "→"))),
        ),
        ("good", "bad"),
    ),
    "pairs": Kind(
        "Which picture is better?",
        {
            "adherence": "Which picture does more exactly what the prompt says?",
            "coherence": "Which picture brings the parts of the prompt together better?",
            "realism": "Which picture is better made and looks more real?",
        },
        (
            Choice("left", "Left", (("1", "1"), ("ArrowLeft", "←"))),
            Choice("same", "Same", (("2", "2"), ("ArrowDown", "↓"))),
            Choice("right", "Right", (("3", "3"), ("ArrowRight", "→"))),
        ),
        ("A", "B", "same"),
    ),
}
FACTS = {
    "labels": ("file", "prompt"),
    "pairs": ("prompt_index", "sample", "prompt", "a", "b"),
}


@dataclass(frozen=True)
class Item:
    """A picture or a pair (A, B). The id changes with the pictures' bytes: redrawn is new."""

    id: str
    facts: dict[str, Any]  # `FACTS` of the kind
    pictures: tuple[Path, ...]


@dataclass(frozen=True)
class Job:
    """What is rated: `name` tells it from other jobs of one store."""

    name: str
    kind: str
    items: tuple[Item, ...]


def pending(kind: str, given: Mapping[str, str]) -> str | None:
    """The question that is next for an item with the answers `given`, None when it is done.

    Labels are asked everything; of a pair the next only after "same" (paper, human evaluation).
    """
    for question in KINDS[kind].questions:
        if question not in given:
            return question
        if kind == "pairs" and given[question] != "same":
            return None
    return None


def verdict(kind: str, given: Mapping[str, str]) -> tuple[str, str] | None:
    """What one rater's answers come to, and the question that decided; None while unfinished.

    labels: "good" when good in every respect, else "bad" by the first that is not. pairs: "A",
    "B" or "same"; "same" only after all questions.
    """
    if pending(kind, given):
        return None
    plain = "good" if kind == "labels" else "same"
    for question in KINDS[kind].questions:
        if given[question] != plain:
            return given[question], question
    return plain, list(KINDS[kind].questions)[-1]


def order(job: Job, rater: str) -> list[Item]:
    """All items in the rater's own order, the same every time.

    An order of one's own puts what people learn and how they tire on other pictures each,
    and those who stop halfway leave no part of the set to nobody.
    """
    return sorted(job.items, key=lambda item: hash_of([job.name, rater, item.id]))


def shown(item: Item, rater: str) -> tuple[int, ...]:
    """Which of the item's pictures are shown, left to right; a pair's sides by `SIDES`."""
    if len(item.pictures) == 2 and int(hash_of([SIDES, item.id, rater]), 16) % 2:
        return 1, 0
    return tuple(range(len(item.pictures)))


def clean_name(name: str) -> str:
    """A rater's name with plain spaces, in one Unicode form. ValueError if it cannot be one."""
    name = " ".join(unicodedata.normalize("NFC", name).split())
    # A spreadsheet takes what begins with = or + for a formula.
    if not 0 < len(name) <= NAME_LENGTH or not name.isprintable() or not name[0].isalnum():
        raise ValueError(f"a name has 1 to {NAME_LENGTH} characters and begins with a letter")
    return name


def label_job(folder: Path) -> Job:
    """The reference pictures of `folder`, what feedback/references.py wrote.

    Raises:
        UserError: no such set, an empty one, or a picture that is missing or none.
    """
    table_file = folder / "references.parquet"
    if not table_file.is_file():
        raise UserError(
            f"{table_file} is missing: give a folder that the stage references wrote, for example "
            "references/r1 after `dvc repro references@r1`."
        )
    table = pd.read_parquet(table_file, columns=["file", "prompt"])
    if table.empty:
        raise UserError(
            f"{folder} holds no pictures: set feedback.critic to resnet18 in params/feedback and "
            "run the stage references again."
        )
    items, progress = [], Progress("pictures to label", len(table), "pictures")
    for number, (file, prompt) in enumerate(zip(table["file"], table["prompt"], strict=True), 1):
        # Of names, not of where they lead: DVC may have put links there.
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise UserError(f"{table_file} names {file!r}, which is not in {folder}; correct it.")
        facts = {"file": str(file), "prompt": _plain(prompt)}
        items.append(Item(label_item(file, folder / file), facts, (folder / file,)))
        progress.at(number)
    return Job(f"labels/{Path(folder).resolve().name}", "labels", tuple(items))


def label_item(file: str, picture: Path) -> str:
    """The name of one picture to label, by its place and its bytes. UserError: it is none."""
    return hash_of(["labels", file, _digest(picture)])


def pair_job(a: Path, b: Path) -> Job:
    """Pairs of pictures of two GenEval folders: the same prompt's folder, the same file's number.

    Raises:
        UserError: as `read_folder`, other prompts under one number, or no pair at all.
    """
    folders = [a.resolve(), b.resolve()]
    if folders[0] == folders[1]:
        raise UserError(f"{a} and {b} are one folder; give the samples of two models.")
    names = [folder.name for folder in folders]
    if names[0] == names[1]:
        names = [f"{folder.parent.name}/{folder.name}" for folder in folders]
    of_a, of_b = (
        {(s.path.parent.parent.name, s.path.stem): s for s in read_folder(folder)}
        for folder in (a, b)
    )
    both = sorted(of_a.keys() & of_b.keys())
    items, progress = [], Progress("pairs", len(both), "pairs")
    for number, key in enumerate(both, 1):
        one, two = of_a[key], of_b[key]
        prompt = one.metadata["prompt"]
        if prompt != two.metadata["prompt"]:
            raise UserError(
                f"{key[0]} asks for {prompt!r} in {a} and for {two.metadata['prompt']!r} in {b}; "
                "compare models that drew the same prompts."
            )
        facts = dict(
            zip(FACTS["pairs"], [int(key[0]), key[1], _plain(prompt), *names], strict=True)
        )
        identity = hash_of(["pairs", *key, _digest(one.path), _digest(two.path)])
        items.append(Item(identity, facts, (one.path, two.path)))
        progress.at(number)
    if not items:
        raise UserError(f"{a} and {b} have no picture of the same number; draw the same prompts.")
    alone = len(of_a) + len(of_b) - 2 * len(both)
    if alone:
        print(f"{alone} pictures are in one of the folders only and are left out", flush=True)
    return Job(f"pairs/{names[0]}-{names[1]}", "pairs", tuple(items))


def _plain(prompt: str) -> str:
    """The prompt without what UTF-8 cannot carry, as JSON's escapes can smuggle it in."""
    return str(prompt).encode("utf-8", "replace").decode()


def _digest(path: Path) -> str:
    """SHA-256 of a file that begins like a picture; UserError where it is none."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(f"{path} has more than {MAX_PIXELS} pixels; scale it down.")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{path} cannot be read as a picture ({error}); draw it again or remove it."
        ) from None
    return digest


def facts_of(kind: str, text: str | Mapping[str, Any]) -> dict[str, Any]:
    """An item's facts out of JSON; ValueError where some are missing."""
    facts = json.loads(text) if isinstance(text, str) else dict(text)
    names: Sequence[str] = FACTS[kind]
    if not isinstance(facts, dict) or set(facts) != set(names):
        raise ValueError(f"facts are {', '.join(names)}")
    return facts
