"""GenEval's official prompts, drawn as its generator draws them (djghosh13/geneval)."""

import json
from pathlib import Path

import numpy as np

from components.errors import UserError
from components.evaluation.folder import check_metadata, refuse
from components.scenes.tasks import (
    OFFICIAL_COLORS,
    RELATIONS,
    Metadata,
    color_attr,
    colors,
    counting,
    position,
    single_object,
    two_object,
)

SEED, A_TASK, MOST = 43, 100, 4  # the official generator's; MOST: things in a counting prompt
# COCO's 80 classes in their order, three of them renamed (mouse, remote, keyboard).
COCO = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog",
    "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella",
    "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange",
    "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant",
    "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote",
    "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator",
    "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip


def read_prompts(file: Path) -> list[Metadata]:
    """Prompts from a file like GenEval's evaluation_metadata.jsonl, in order.

    Raises:
        UserError: no such file, or lines that are no metadata; all by number.
    """
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Prompts {file} cannot be read as text: {error}.") from None
    prompts, damaged = [], []
    for number, line in enumerate(lines, start=1):
        try:
            prompts.append(json.loads(line))
            check_metadata(prompts[-1])
        except (ValueError, KeyError, TypeError) as error:
            damaged.append(f"{file}, line {number} is no line of GenEval's metadata ({error!r})")
    refuse(damaged, "it needs tag, include and prompt, as `djepa prompts geneval`.")
    if not prompts:
        raise UserError(f"{file} holds no prompt.")
    return prompts


def geneval_prompts() -> list[Metadata]:
    """The 553 official prompts with their metadata, in the official order.

    Each task draws its classes, colours and relations in the order in which the official
    generator does, from the same numpy generator; what was drawn before is left out at the end.
    """
    rng = np.random.default_rng(SEED)

    def pick(number: int) -> list[str]:
        return [COCO[int(i)] for i in rng.choice(len(COCO), size=number, replace=False)]

    # A person never gets a colour: the classes after it, counted round.
    thing = len(COCO) - 1
    coloured = [COCO[(1 + i + COCO.index("person")) % len(COCO)] for i in range(thing)]

    def one_counting() -> Metadata:
        name = COCO[int(rng.choice(len(COCO)))]
        return counting(name, int(rng.integers(2, MOST, endpoint=True)))

    def one_colors() -> Metadata:
        name = coloured[int(rng.choice(thing))]
        return colors(name, OFFICIAL_COLORS[int(rng.choice(len(OFFICIAL_COLORS)))])

    def one_position() -> Metadata:
        a, b = pick(2)
        return position(a, RELATIONS[int(rng.choice(len(RELATIONS)))], b)

    def one_color_attr() -> Metadata:
        a, b = (coloured[int(i)] for i in rng.choice(thing, size=2, replace=False))
        drawn = rng.choice(len(OFFICIAL_COLORS), size=2, replace=False)
        color_a, color_b = (OFFICIAL_COLORS[int(i)] for i in drawn)
        return color_attr(a, color_a, b, color_b)

    prompts = [single_object(name) for name in pick(len(COCO))]
    prompts += [two_object(*pick(2)) for _ in range(A_TASK)]
    for draw in (one_counting, one_colors, one_position, one_color_attr):
        prompts += [draw() for _ in range(A_TASK)]
    return list({json.dumps(metadata): metadata for metadata in prompts}.values())
