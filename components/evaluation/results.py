"""GenEval's result lines, the official tool's or ours, read and summed up."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.errors import UserError
from components.evaluation.checks import check_samples
from components.evaluation.folder import NAME, Sample, check_metadata, refuse
from components.evaluation.geneval import score_image
from components.evaluation.statistics import spreads, task_means
from components.scenes.tasks import TASKS


@dataclass(frozen=True)
class Line:
    """One result line; `details`: class → boxes that counted, None where the line has none."""

    sample: Sample
    correct: bool
    details: dict[str, list[list[float]]] | None


def read_results(file: Path) -> list[Line]:
    """The lines of a result file, in the order of their pictures.

    The official tool writes a picture's path as it was given, so only its last three parts
    (00000/samples/0000.png) name it. Its lines come in the order in which the disk lists folders.

    Raises:
        UserError: no such file, damaged lines, two lines for one picture, or metadata that
            disagrees with its tag or prompt; all of them by number or name.
    """
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Result lines {file} cannot be read as text: {error}.") from None
    read, damaged = [], []
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                read.append(_line(json.loads(line)))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            damaged.append(f"{file}, line {number} is no result line ({error!r})")
    refuse(damaged, "GenEval's has filename, tag, prompt, correct and metadata.")
    if not read:
        raise UserError(f"{file} holds no result line; give GenEval's results.jsonl.")
    counts = Counter(one.sample.filename for one in read)
    refuse(
        [f"{file} has {n} lines for {name}" for name, n in counts.items() if n > 1],
        "leave one of each; the results of several runs are several files.",
    )
    check_samples([one.sample for one in read])
    return sorted(read, key=lambda one: one.sample.filename)


def _line(record: Mapping[str, Any]) -> Line:
    """One record; ValueError, KeyError or TypeError where it is none."""
    metadata = record["metadata"]
    metadata = json.loads(metadata) if isinstance(metadata, str) else metadata
    check_metadata(metadata)
    for name in ("tag", "prompt"):
        if record[name] != metadata[name]:
            raise ValueError(f"{name} is {record[name]!r}, in its metadata {metadata[name]!r}")
    if not isinstance(record["correct"], bool):
        raise TypeError("correct is true or false")
    path = Path(record["filename"])
    if not NAME.fullmatch("/".join(path.parts[-3:])):
        raise ValueError(f"filename {record['filename']} does not end as 00000/samples/0000.png")
    details = record.get("details")
    return Line(
        Sample("/".join(path.parts[-3:]), metadata, path),
        record["correct"],
        json.loads(details) if isinstance(details, str) else details,
    )


def summary(lines: Sequence[Line], file: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Overall and by task, with its standard error, as a score from boxes has them.

    There is no chance floor: that takes the boxes of all classes with their colours, which the
    lines have not. `correct_prompts` is the official summary's share of prompts of which any
    picture is right. `problems` names pictures whose boxes say otherwise by the official rules.

    Args:
        lines: from `read_results`.
        file: named under `scored_by`.
        settings: `params["evaluation"]`.
    """
    tasks = [one.sample.metadata["tag"] for one in lines]
    prompts = [one.sample.metadata["prompt"] for one in lines]
    right = [float(one.correct) for one in lines]
    (score,) = spreads([right], tasks, prompts, int(settings["bootstrap"]), int(settings["seed"]))
    means = task_means(right, tasks)
    any_right: dict[str, bool] = {}
    for prompt, one in zip(prompts, lines, strict=True):
        any_right[prompt] = any_right.get(prompt, False) or one.correct
    return {
        "overall": round(score.mean, 4),
        "tasks": {task: round(means[task], 4) for task in TASKS if task in means},
        "n": len(lines),
        "prompts": len(any_right),
        "stderr": round(score.stderr, 4),
        "correct_images": round(sum(right) / len(right), 4),
        "correct_prompts": round(sum(any_right.values()) / len(any_right), 4),
        "scored_by": {"results": str(file)},
        "problems": _contradicted(lines),
    }


def _contradicted(lines: Sequence[Line]) -> list[str]:
    """Pictures whose boxes give another answer; where a colour is asked for, boxes cannot tell."""
    wrong = [
        one.sample.filename
        for one in lines
        if one.details is not None
        and not any("color" in clause for clause in one.sample.metadata["include"])
        and score_image(one.sample.metadata, one.details)[0] != one.correct
    ]
    if not wrong:
        return []
    some = ", ".join(wrong[:5]) + (", …" if len(wrong) > 5 else "")
    return [
        f"{len(wrong)} lines say of a picture what its boxes do not by the official rules ({some}):"
        " other thresholds, or other rules."
    ]


def sentence(name: str, result: Mapping[str, Any]) -> str:
    """A summary in one line."""
    return (
        f"{name}: GenEval overall {result['overall']:.3f} ± {result['stderr']:.3f}, "
        f"{result['prompts']} prompts, {result['n']} pictures; no chance floor without boxes"
    )
