"""T2I-CompBench++'s files and scores (Karine-Huang/T2I-CompBench).

Layout: `DIR/CATEGORY/samples/{prompt}_{000000}.png`, ten pictures a prompt, results beside them in
`annotation_blip/vqa_result.json` and the like: `[{"question_id": 0, "answer": …}, …]`.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from components.errors import UserError
from components.evaluation.folder import SUFFIXES
from components.evaluation.statistics import spreads
from components.files import atomic_file

IMAGES = 10  # pictures of a prompt
COUNTS = (300, 700)  # prompts of a category: validation, training
SHOWN = 5  # names in a sentence
# Category: what scores it here, if anything does, and where the official tool writes its results.
CATEGORIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "color": ("blip", ("annotation_blip",)),
    "shape": ("blip", ("annotation_blip",)),
    "texture": ("blip", ("annotation_blip",)),
    "spatial": ("", ("labels/annotation_obj_detection_2d", "annotation_obj_detection_2d")),
    "3d_spatial": ("", ("labels/annotation_obj_detection_3d", "annotation_obj_detection_3d")),
    "non_spatial": ("clip", ("annotation_clip",)),
    "numeracy": ("", ("annotation_num",)),
    "complex": ("", ("annotation_3_in_1",)),
}


class Scorer(Protocol):
    """What scores pictures of prompts."""

    def about(self) -> str:
        """What made the scores, for a result file."""
        ...

    def scores(self, pictures: Sequence[tuple[Path, str]]) -> list[float]:
        """A score of each (picture, prompt)."""
        ...


@dataclass(frozen=True)
class Picture:
    """A picture of an official samples folder: its prompt and number are its name's."""

    path: Path
    prompt: str
    number: int


def read_prompts(file: Path) -> list[str]:
    """The prompts of an official file, one a line; what stands behind a tab is left out."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as a file of prompts ({error}).") from None
    prompts = [line.split("\t")[0] for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{file} holds no prompt; give an official file such as color_val.txt.")
    return prompts


def read_samples(folder: Path) -> list[Picture]:
    """The pictures of `folder/samples`, in the order of their numbers.

    Raises:
        UserError: no such folder or no picture, a file that is not named as officially, a number
            that stands twice, or a file that is no picture.
    """
    place = folder / "samples"
    if not place.is_dir():
        raise UserError(f"{place} is not there: pictures lie in CATEGORY/samples, as officially.")
    pictures: dict[int, Picture] = {}
    for path in sorted(place.iterdir()):
        if path.name.startswith(".") or ".tmp-" in path.name:
            continue
        number = path.stem.rpartition("_")[2]
        prompt = path.name.partition("_")[0]
        if path.suffix.lower() not in SUFFIXES or not number.isdecimal() or "_" not in path.name:
            raise UserError(
                f"{path} is not named like 'a green bench and a blue bowl_000000.png'; move other "
                "files elsewhere."
            )
        if int(number) in pictures:
            other = pictures[int(number)].path.name
            raise UserError(f"{place}: {other!r} and {path.name!r} have one number; remove one.")
        pictures[int(number)] = Picture(path, prompt, int(number))
    if not pictures:
        raise UserError(f"{place} holds no picture; draw its prompts first.")
    return [pictures[number] for number in sorted(pictures)]


def gaps(pictures: Sequence[Picture], prompts: Sequence[str] | None = None) -> list[str]:
    """What an official run would not show, a sentence each.

    prompts: of the official file, if it is at hand. UserError for a file that is no picture.
    """
    said, numbers = [], {picture.number for picture in pictures}
    absent = sorted(set(range(max(numbers) + 1)) - numbers)
    if absent:
        said.append(f"{len(absent)} pictures are missing ({_some([f'{n:06d}' for n in absent])})")
    counts = Counter(picture.prompt for picture in pictures)
    wanted = Counter(prompts) if prompts is not None else None
    odd = [
        f"{prompt!r} {count}"
        for prompt, count in counts.items()
        if count != IMAGES * (wanted.get(prompt, 1) if wanted else 1)
    ]
    if odd:
        said.append(f"{len(odd)} prompts have other than {IMAGES} pictures ({_some(odd)})")
    if wanted is not None:
        lacking = [repr(prompt) for prompt in wanted if prompt not in counts]
        if lacking:
            said.append(f"{len(lacking)} prompts have no picture ({_some(lacking)})")
        foreign = [repr(prompt) for prompt in counts if prompt not in wanted]
        if foreign:
            said.append(f"{len(foreign)} prompts are not in the prompt file ({_some(foreign)})")
    elif len(counts) not in COUNTS:
        said.append(f"it has {len(counts)} prompts, officially {COUNTS[0]} (or {COUNTS[1]})")
    cut = [repr(p.path.name) for p in pictures if p.path.name.count("_") > 1]
    if cut:
        said.append(
            f"{len(cut)} prompts are read up to their first '_', as officially ({_some(cut)})"
        )
    sizes = Counter(_size(picture.path) for picture in pictures)
    if len(sizes) > 1:
        named = [f"{n} of {w}x{h}" for (w, h), n in sizes.most_common()]
        said.append(f"its pictures have {len(sizes)} sizes ({_some(named)})")
    return said


def _size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{path} cannot be read as a picture ({error}); draw it again or remove it."
        ) from None


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")


def read_results(file: Path, pictures: Sequence[Picture]) -> list[float]:
    """The answers of an official `vqa_result.json`, in the order of the pictures.

    The official scripts number answers by picture (detectors) or by place (BLIP-VQA, CLIPScore,
    3-in-1); the two differ only where pictures are missing.

    Raises:
        UserError: a damaged file, answers that are no scores, or of other pictures.
    """
    try:
        rows = json.loads(file.read_text())
        answers = {int(row["question_id"]): float(row["answer"]) for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is no result of the official tool ({error!r}); it is a list of question_id "
            "and answer."
        ) from None
    wrong = [f"{i}: {a}" for i, a in answers.items() if not math.isfinite(a) or abs(a) > 1]
    if wrong:
        raise UserError(f"{file} holds answers that are no scores ({_some(wrong)}).")
    if len(rows) != len(answers):
        raise UserError(f"{file} has {len(rows) - len(answers)} answers of one question_id.")
    numbers = [picture.number for picture in pictures]
    for names in (numbers, list(range(len(pictures)))):
        if set(names) == set(answers):
            return [answers[name] for name in names]
    raise UserError(
        f"{file} has {len(answers)} answers, and there are {len(pictures)} pictures in "
        f"{pictures[0].path.parent}, numbered otherwise; run the official tool on these pictures."
    )


def write_results(file: Path, answers: Sequence[float], kind: str) -> None:
    """Write an official `vqa_result.json`; BLIP-VQA's answers are text of four decimals."""
    rows = [
        {"question_id": i, "answer": f"{answer:.4f}" if kind == "blip" else answer}
        for i, answer in enumerate(answers)
    ]
    with atomic_file(file) as temporary:
        temporary.write_text(json.dumps(rows))


def score_compbench(
    folder: Path,
    settings: Mapping[str, Any],
    scorer: Callable[[str], Scorer],
    categories: Sequence[str] = (),
    annotations: Path | None = None,
    prompts: Path | None = None,
) -> dict[str, Any]:
    """Score the categories of a folder in the official layout.

    Args:
        folder: holds color/samples, …; or samples/ of the only category that is asked for.
        settings: `params["evaluation"]`.
        scorer: gives what scores "blip" or "clip"; asked for only if it is needed.
        categories: those asked for; none for all that are there.
        annotations: the official tool's results, laid out as `folder`; what it has is read, not
            scored here. The other categories' results are looked for in `folder`.
        prompts: a folder of the official files, color_val.txt, …, to check the pictures by.

    What is scored here is written to `folder` as the official tool would. `problems` names what is
    missing; a category is scored by what is there.

    Raises:
        UserError: an unknown category, nothing to score, a category asked for without a way to
            score it, or what `read_samples`, `read_results` and the scorers raise.
    """
    places = _places(folder, categories)
    found: dict[str, Any] = {}
    missing: list[str] = []
    for name, place in places.items():
        kind, spots = CATEGORIES[name]
        pictures = read_samples(place)
        wanted = read_prompts(prompts / f"{name}_val.txt") if prompts else None
        file = _results(name, place, annotations, not kind, len(places) == 1)
        if file is None and not kind:
            sentence = (
                f"{name}: scored by the official tool's detectors only; run them (docs/"
                f"benchmarks.md) and give their folder with --annotations, {spots[0]}/"
                "vqa_result.json in it"
            )
            if categories:
                raise UserError(f"{place}: {sentence}.")
            missing.append(f"{sentence}.")
            continue
        missing += [f"{name}: {gap}." for gap in gaps(pictures, wanted)]
        if file is not None:
            answers, about = read_results(file, pictures), f"official result file {file}"
        else:
            judge = scorer(kind)
            answers = judge.scores([(p.path, p.prompt) for p in pictures])
            about = judge.about()
            write_results(place / spots[0] / "vqa_result.json", answers, kind)
        (spread,) = spreads(
            [answers],
            [name] * len(answers),
            [p.prompt for p in pictures],
            int(settings["bootstrap"]),
            int(settings["seed"]),
        )
        found[name] = {
            "score": round(spread.mean, 4),
            "n": len(answers),
            "stderr": round(spread.stderr, 4),
            "scored_by": about,
        }
    if not found:
        raise UserError(f"{folder}: no category could be scored. {' '.join(missing)}")
    return {
        "benchmark": "T2I-CompBench++",
        "n": sum(category["n"] for category in found.values()),
        "categories": found,
        "problems": missing,
    }


def _places(folder: Path, categories: Sequence[str]) -> dict[str, Path]:
    """The folder of each category that is to be scored, in the benchmark's order."""
    unknown = [name for name in categories if name not in CATEGORIES]
    if unknown:
        raise UserError(
            f"T2I-CompBench++ has no category {', '.join(unknown)}: it has {', '.join(CATEGORIES)}."
        )
    if (folder / "samples").is_dir():
        if len(categories) != 1:
            raise UserError(f"{folder} holds samples/ of one category: name it with --category.")
        return {categories[0]: folder}
    if not folder.is_dir():
        raise UserError(f"No folder {folder}: give one that holds color/samples, ….")
    strange = [
        place.name for place in folder.iterdir()
        if (place / "samples").is_dir() and place.name not in CATEGORIES
    ]  # fmt: skip
    if strange and not categories:
        raise UserError(
            f"{folder} holds {', '.join(sorted(strange))}, which are no categories of "
            f"T2I-CompBench++ ({', '.join(CATEGORIES)}); rename them, or choose with --category."
        )
    chosen = [c for c in CATEGORIES if (c in categories if categories else (folder / c).is_dir())]
    if not chosen:
        raise UserError(f"{folder} holds no category's folder, such as color/samples.")
    return {name: folder / name for name in chosen}


def _results(
    name: str, place: Path, annotations: Path | None, beside: bool, alone: bool
) -> Path | None:
    """The official result file of a category, or None.

    beside: look beside the pictures too; not where we score, for there may be our own of other
    pictures. alone: no other category is scored, so `annotations` may be its own folder.
    """
    bases = [place] if beside else []
    if annotations is not None:
        if not annotations.is_dir():
            raise UserError(f"No folder {annotations} of the official tool's results.")
        bases = [annotations / name, *([annotations] if alone else []), *bases]
    files = [base / spot / "vqa_result.json" for base in bases for spot in CATEGORIES[name][1]]
    return next((file for file in files if file.is_file()), None)
