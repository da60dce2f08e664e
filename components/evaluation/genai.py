"""GenAI-Bench's files, skills and aggregates (linzhiqiu/t2v_metrics, genai_bench/evaluate.py).

`genai_image.json`: {id: {"prompt": …}}; `genai_skills.json` beside it: {tag: [number of prompt]}.
Pictures: `OUT/MODEL/{id}.jpeg`. VQAScore is its own tool's: this reads what that tool writes.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.errors import UserError
from components.evaluation.folder import RUN, Sample
from components.evaluation.statistics import spreads

BASIC = ("attribute", "scene", "spatial relation", "action relation", "part relation")
ADVANCED = ("counting", "comparison", "differentiation", "negation", "universal")
OFFICIAL = (527, 1600)  # prompts: of the VQAScore paper, of GenAI-Bench's
SHOWN = 5  # names in a sentence


def read_prompts(file: Path) -> dict[str, str]:
    """The prompt of each id, in the order of the official file."""
    try:
        prompts = {key: row["prompt"] for key, row in json.loads(file.read_text()).items()}
        if not prompts or not all(isinstance(p, str) for p in prompts.values()):
            raise ValueError("a prompt is no text")
        numbers = [int(key) for key in prompts]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} cannot be read as GenAI-Bench's genai_image.json ({error!r}); give the one "
            "that its tool has downloaded, with --prompts."
        ) from None
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise UserError(f"{file}: its ids are not numbered on; give the whole official file.")
    return prompts


def read_skills(file: Path, prompts: Mapping[str, str]) -> dict[str, list[str]]:
    """The ids of each skill, and of basic, advanced and all.

    basic and advanced are the official file's own tags; where it lacks them, advanced is the union
    of its skills, and basic that of the others without what is advanced. all: every tagged prompt.

    Raises:
        UserError: a damaged file, a tag that is unknown or missing, a number without a prompt, or
            a basic or advanced that is not that union.
    """
    by_number = {int(key): key for key in prompts}
    try:
        tags = {
            str(t): [int(n) for n in numbers] for t, numbers in json.loads(file.read_text()).items()
        }
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} cannot be read as GenAI-Bench's genai_skills.json ({error!r}); it lies beside "
            "genai_image.json."
        ) from None
    known = {*BASIC, *ADVANCED, "basic", "advanced"}
    if set(tags) - known:
        raise UserError(
            f"{file} has tags that are unknown: {', '.join(sorted(set(tags) - known))}."
        )
    absent = [tag for tag in (*BASIC, *ADVANCED) if not tags.get(tag)]
    if absent:
        raise UserError(f"{file} lacks {', '.join(absent)}.")
    foreign = sorted({n for numbers in tags.values() for n in numbers} - set(by_number))
    if foreign:
        raise UserError(f"{file} tags prompts that genai_image.json lacks: {_some(foreign)}.")
    advanced = set().union(*(tags[tag] for tag in ADVANCED))
    unions = {"basic": set().union(*(tags[tag] for tag in BASIC)) - advanced, "advanced": advanced}
    for tag, union in unions.items():
        if set(tags.setdefault(tag, sorted(union))) != union:
            raise UserError(
                f"{file}: the tag {tag} is not the union of its skills ("
                f"{_some(sorted(set(tags[tag]) ^ union))} differ); fetch the file again."
            )
    tags["all"] = sorted({n for numbers in tags.values() for n in numbers})
    return {tag: [by_number[n] for n in dict.fromkeys(numbers)] for tag, numbers in tags.items()}


def read_scores(file: Path, prompts: Mapping[str, str]) -> dict[str, float]:
    """The score of each id from `MODEL_N_prompts.pt`, as genai_bench/evaluate.py writes it.

    That is a tensor (prompts, 1, 1) in the order of genai_image.json; also read is X.json:
    {id: score}.

    Raises:
        UserError: the file cannot be read, holds other than one score of 0 to 1 a prompt, or is
            of another number of prompts.
    """
    import torch

    try:
        if file.suffix == ".json":
            scores = {str(key): float(value) for key, value in json.loads(file.read_text()).items()}
        else:
            tensor = torch.load(file, map_location="cpu", weights_only=True)
            if len(tensor) != len(prompts):
                raise UserError(
                    f"{file} has {len(tensor)} scores, and there are {len(prompts)} prompts; give "
                    "the prompts that were scored, or score all pictures."
                )
            # One picture and one text a prompt; the official tool takes the mean over pictures.
            means = tensor.float().reshape(len(tensor), -1).mean(1).tolist()
            scores = dict(zip(prompts, means, strict=True))
    except UserError:
        raise
    # A file that is no tensor fails in a dozen ways that mean the same.
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0].rstrip(".")
        raise UserError(
            f"{file} cannot be read as VQAScore's results ({type(error).__name__}, {reason}): it "
            "is the MODEL_N_prompts.pt of genai_bench/evaluate.py, or JSON, {id: score}."
        ) from None
    lacking = [key for key in prompts if key not in scores]
    foreign = [key for key in scores if key not in prompts]
    if lacking or foreign:
        raise UserError(
            f"{file} is of other prompts: {len(lacking)} have no score ({_some(lacking)}), "
            f"{len(foreign)} scores have no prompt ({_some(foreign)})."
        )
    wrong = [f"{k}: {v:.3g}" for k, v in scores.items() if not math.isfinite(v) or not 0 <= v <= 1]
    if wrong:
        raise UserError(f"{file} holds what is no score of 0 to 1 ({_some(wrong)}).")
    return scores


def check_pictures(folder: Path, prompts: Mapping[str, str]) -> list[str]:
    """Whether every prompt has its readable picture; returns what is odd, a sentence each.

    Raises:
        UserError: no such folder, a picture that is missing or unreadable.
    """
    if not folder.is_dir():
        raise UserError(f"No folder {folder}: give the model's, which holds 00000.jpeg, ….")
    absent = [f"{key}.jpeg" for key in prompts if not (folder / f"{key}.jpeg").is_file()]
    if absent:
        raise UserError(
            f"{folder} lacks {len(absent)} of {len(prompts)} pictures ({_some(absent)}); draw them "
            "and run VQAScore's tool again."
        )
    sizes: dict[tuple[int, int], int] = {}
    for key in prompts:
        size = Sample(f"{key}.jpeg", {}, folder / f"{key}.jpeg").open().size
        sizes[size] = sizes.get(size, 0) + 1
    said = []
    others = [p.name for p in sorted(folder.iterdir()) if p.name not in _names(prompts)]
    if others:
        said.append(f"{folder} holds what is no picture of a prompt: {_some(others)}.")
    if len(sizes) > 1:
        named = [f"{n} of {w}x{h}" for (w, h), n in sizes.items()]
        said.append(f"The pictures have {len(sizes)} sizes: {_some(named)}.")
    return said


def _names(prompts: Mapping[str, str]) -> set[str]:
    return {RUN, *(f"{key}.jpeg" for key in prompts)}


def _some(names: Sequence[Any]) -> str:
    return ", ".join(map(str, names[:SHOWN])) + (", …" if len(names) > SHOWN else "")


def score_genai(
    folder: Path, results: Path, settings: Mapping[str, Any], prompts: Path | None = None
) -> dict[str, Any]:
    """Table of a model's VQAScores by skill.

    Args:
        folder: the model's pictures, OUT/MODEL.
        results: what VQAScore's tool wrote of them.
        settings: `params["evaluation"]`.
        prompts: genai_image.json, with genai_skills.json beside it; by default where the official
            tool downloads it to, datasets/GenAI-Image-N.

    Raises:
        UserError: as the readers above.
    """
    file = prompts or _downloaded(results)
    asked = read_prompts(file)
    skills = read_skills(file.with_name("genai_skills.json"), asked)
    missing = check_pictures(folder, asked)
    if len(asked) not in OFFICIAL:
        missing.append(
            f"{file} has {len(asked)} prompts, officially {OFFICIAL[0]} or {OFFICIAL[1]}: these "
            "scores do not compare with published ones."
        )
    scores = read_scores(results, asked)
    table = {}
    for skill in (*BASIC, *ADVANCED, "basic", "advanced", "all"):
        ids = skills[skill]
        (spread,) = spreads(
            [[scores[key] for key in ids]],
            [skill] * len(ids),
            ids,
            int(settings["bootstrap"]),
            int(settings["seed"]),
        )
        table[skill] = {
            "score": round(spread.mean, 4),
            "n": len(ids),
            "stderr": round(spread.stderr, 4),
        }
    return {
        "benchmark": "GenAI-Bench",
        "n": len(asked),
        "scored_by": f"VQAScore, result file {results}",
        "skills": table,
        "problems": missing,
    }


def _downloaded(results: Path) -> Path:
    """Where the official tool keeps the prompts of `MODEL_N_prompts.pt`."""
    places = [Path(f"datasets/GenAI-Image-{n}/genai_image.json") for n in OFFICIAL]
    for n, place in zip(OFFICIAL, places, strict=True):
        if place.is_file() and f"_{n}_prompts" in results.name:
            return place
    raise UserError(
        f"GenAI-Bench's prompts of {results.name} are not at {places[0]} or {places[1].parent}: "
        "give the genai_image.json that its tool downloads with --prompts."
    )
