"""Whether a folder is what a GenEval score takes it for: what forbids a score, what goes beside."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from components.errors import UserError
from components.evaluation.folder import Sample, refuse
from components.evaluation.prompts import COCO, geneval_prompts
from components.scenes import tasks
from components.scenes.tasks import Metadata

OFFICIAL_IMAGES = 4  # pictures of each prompt in the official protocol


def in_template(metadata: Mapping[str, Any]) -> Metadata:
    """The prompt of the tag's template that asks for the same things.

    Raises:
        KeyError, ValueError, IndexError: the clauses are none of that tag's, or the tag is none.
    """
    clauses = metadata["include"]
    names = [clause["class"] for clause in clauses]
    match metadata["tag"]:
        case "single_object":
            (a,) = names
            return tasks.single_object(a)
        case "two_object":
            a, b = names
            return tasks.two_object(a, b)
        case "counting":
            (a,) = names
            return tasks.counting(a, clauses[0]["count"])
        case "colors":
            (a,) = names
            return tasks.colors(a, clauses[0]["color"])
        case "position":
            b, a = names
            return tasks.position(a, clauses[1]["position"][0], b)
        case "color_attr":
            a, b = names
            return tasks.color_attr(a, clauses[0]["color"], b, clauses[1]["color"])
    raise KeyError(metadata["tag"])


def disagreement(metadata: Mapping[str, Any]) -> str:
    """What is wrong between tag, clauses and prompt of one line of metadata; "" if nothing is.

    A prompt in words of one's own (rewritten prompts) cannot be read, so only one that begins as
    the templates do is held against its clauses.
    """
    tag, prompt = metadata["tag"], metadata["prompt"]
    if tag not in tasks.TASKS:
        return f"has the unknown tag {tag!r} (GenEval's: {', '.join(tasks.TASKS)})"
    try:
        template = in_template(metadata)
    except (KeyError, ValueError, IndexError):
        return f"has clauses that are none of the task {tag}"
    for name in ("include", "exclude"):
        if (metadata.get(name) or []) != template.get(name, []):
            return f"has clauses under {name} that are none of the task {tag}"
    if prompt.startswith("a photo of") and not prompt.startswith(template["prompt"]):
        return f"has the prompt {prompt!r}, but tag and clauses ask for {template['prompt']!r}"
    return ""


def check_samples(samples: Sequence[Sample]) -> None:
    """Refuse what would be scored wrongly without a word.

    Raises:
        UserError: metadata that disagrees with itself, or pictures that the official evaluator
            would pass over because their names are no numbers; all of them by name.
    """
    prompts = {s.filename.split("/")[0]: s for s in samples}
    found = {place: disagreement(s.metadata) for place, s in prompts.items()}
    refuse(
        [
            f"{prompts[place].path.parent.parent / 'metadata.jsonl'} {what}"
            for place, what in found.items()
            if what
        ],
        "write the metadata that the picture was drawn for (`djepa prompts geneval`).",
    )
    refuse(
        [f"{s.path} has a name that is no number" for s in samples if not s.path.stem.isdigit()],
        "a prompt's pictures are samples/0000.png, 0001.png, …; move others away.",
    )


def check_pictures(samples: Sequence[Sample]) -> None:
    """Read every picture before the first is scored; refuse those that cannot be, all by name."""
    damaged = []
    for sample in samples:
        try:
            sample.open()
        except UserError as error:
            damaged.append(str(error).removesuffix("; draw it again or remove it."))
    refuse(damaged, "draw these again or remove them.")


def notes(samples: Sequence[Sample], detections: Sequence[Mapping[str, Any]] = ()) -> list[str]:
    """What a user must know beside a score, a sentence each; [] for a whole run.

    Missing folders, prompts and tasks, other numbers of pictures, other sizes, prompts in other
    words, boxes of classes that GenEval has not.
    """
    return [
        *gaps(samples),
        *_partial(samples),
        *_wording(samples),
        *_sizes(samples),
        *_foreign(samples, detections),
    ]


def gaps(samples: Sequence[Sample]) -> list[str]:
    """What a whole run would not lack, a sentence each: folders between others, pictures."""
    counts = Counter(int(sample.filename.split("/")[0]) for sample in samples)
    said = []
    absent = sorted(set(range(max(counts))) - set(counts))
    if absent:
        said.append(
            f"{len(absent)} folders are missing ({_some([f'{i:05d}' for i in absent])}); the "
            "score is without."
        )
    most = max(counts.values())
    fewer = [f"{index:05d}" for index, count in sorted(counts.items()) if count < most]
    if fewer:
        said.append(
            f"{len(fewer)} prompts have fewer than {most} pictures ({_some(fewer)}): a task's "
            "score is the mean of its pictures, so these prompts count less."
        )
    return said


def _partial(samples: Sequence[Sample]) -> list[str]:
    """Tasks without a prompt; for a folder of official prompts also which of them it lacks."""
    said = []
    tags = {s.metadata["tag"] for s in samples}
    absent = [task for task in tasks.TASKS if task not in tags]
    if absent:
        said.append(
            f"no prompt of {', '.join(absent)}: overall is the mean of the other "
            f"{len(tags)} tasks, not of GenEval's six."
        )
    asked = {in_template(s.metadata)["prompt"] for s in samples}
    official = [metadata["prompt"] for metadata in geneval_prompts()]
    if not asked <= set(official):
        return said
    lacking = [prompt for prompt in official if prompt not in asked]
    if lacking:
        said.append(
            f"{len(lacking)} of GenEval's {len(official)} prompts are missing "
            f"({_some(lacking)}): the score is of {len(asked)} prompts, {len(samples)} pictures."
        )
    most = max(Counter(s.filename.split("/")[0] for s in samples).values())
    if most != OFFICIAL_IMAGES:
        said.append(f"prompts have {most} pictures, GenEval draws {OFFICIAL_IMAGES} of each.")
    return said


def _wording(samples: Sequence[Sample]) -> list[str]:
    own = {
        s.filename.split("/")[0]
        for s in samples
        if not s.metadata["prompt"].startswith("a photo of")
    }
    if not own:
        return []
    return [
        f"{len(own)} prompts are not in GenEval's words ({_some(sorted(own))}): whether they ask "
        "for what their metadata says was not checked."
    ]


def _sizes(samples: Sequence[Sample]) -> list[str]:
    """Pictures of another size than most; where boxes are given, those that are there."""
    sizes: dict[tuple[int, int], list[str]] = {}
    for sample in samples:
        if sample.path.is_file():
            with Image.open(sample.path) as image:
                sizes.setdefault(image.size, []).append(sample.filename)
    if len(sizes) < 2:
        return []
    usual, *others = sorted(sizes, key=lambda size: -len(sizes[size]))
    odd = [f"{name} {w}x{h}" for w, h in others for name in sizes[w, h]]
    return [f"{len(odd)} pictures are not {usual[0]}x{usual[1]} as most are ({_some(odd)})."]


def _foreign(samples: Sequence[Sample], detections: Sequence[Mapping[str, Any]]) -> list[str]:
    """Classes of the boxes that are none of GenEval's, for prompts that ask for GenEval's."""
    asked = {clause["class"] for s in samples for clause in s.metadata["include"]}
    others = sorted({name for boxes in detections for name in boxes} - set(COCO))
    if not others or not asked <= set(COCO):
        return []
    return [f"{len(others)} classes of the boxes are not GenEval's ({_some(others)})."]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
