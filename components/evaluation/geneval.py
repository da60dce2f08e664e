"""GenEval's official rules, on detections (djghosh13/geneval; see also arXiv 2310.11513)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any

Box = tuple[float, float, float, float]
# The official evaluator's constants: part of the metric, not settings.
SCORE_THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
MAX_OBJECTS = 16
POSITION_THRESHOLD = 0.1
_score = itemgetter(4)


def relative_position(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """Relations that hold of A to B, by GenEval's rule; two may hold, or none.

    offset = centre A − centre B; revised = sign · max(|offset| − 0.1 · (size A + size B), 0)
    per axis; (dx, dy) = revised / ‖offset‖; left dx < −0.5, right dx > 0.5, above dy < −0.5,
    below dy > 0.5.

    Args:
        a, b: boxes; x1, y1, x2, y2 come first, further entries are ignored.
    """
    offset = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    revised = []
    for i in (0, 1):
        slack = POSITION_THRESHOLD * (abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i]))
        revised.append(math.copysign(max(abs(offset[i]) - slack, 0.0), offset[i]))
    if all(abs(v) < 1e-3 for v in revised):
        return set()
    norm = math.hypot(*offset)
    dx, dy = revised[0] / norm, revised[1] / norm
    found = set()
    if dx < -0.5:
        found.add("left of")
    if dx > 0.5:
        found.add("right of")
    if dy < -0.5:
        found.add("above")
    if dy > 0.5:
        found.add("below")
    return found


def found(metadata: Mapping[str, Any], detections: Mapping[str, Sequence[Sequence[Any]]]) -> dict:
    """The detections that count: score above the task's threshold, 16 a class, best first.

    Of equal scores the later one comes first, as in the official evaluator.
    """
    counting = metadata.get("tag") == "counting"
    threshold = COUNTING_THRESHOLD if counting else SCORE_THRESHOLD
    kept = {}
    for name, items in detections.items():
        passed = [item for item in items if item[4] > threshold]
        if len(passed) > 1:
            # Reversed first: the sort, though descending, leaves equal scores as they stand.
            passed.reverse()
            passed.sort(key=_score, reverse=True)
            del passed[MAX_OBJECTS:]
        if passed:
            kept[name] = passed
    return kept


def clauses(
    metadata: Mapping[str, Any], detections: Mapping[str, Sequence[Sequence[Any]]]
) -> list[tuple[bool, str]]:
    """Each include and exclude clause of a prompt: met or not, and why not."""
    return list(_judged(metadata, found(metadata, detections)))


def meets(metadata: Mapping[str, Any], objects: Mapping[str, Sequence[Sequence[Any]]]) -> bool:
    """Whether all clauses of a prompt are met by what `found` kept for a prompt of its task."""
    for met, _ in _judged(metadata, objects):  # noqa: SIM110 (`all` takes half as long again)
        if not met:
            return False
    return True


def reasons(metadata: Mapping[str, Any], objects: Mapping[str, Sequence[Sequence[Any]]]) -> str:
    """Why not, one clause a line; "" exactly where `meets` holds."""
    return "\n".join([reason for met, reason in _judged(metadata, objects) if not met])


def _judged(
    metadata: Mapping[str, Any], objects: Mapping[str, Sequence[Sequence[Any]]]
) -> Iterator[tuple[bool, str]]:
    """Each clause in turn, judged when it is asked for.

    An include takes the top `count` of its class, fewer fails; with a colour all of those must
    have it; position is checked only if colour passed; an exclude fails when the number found
    is at least its count.
    """
    groups: list[Sequence[Sequence[Any]] | None] = []
    for clause in metadata.get("include", []):
        name, count = clause["class"], clause["count"]
        group = objects.get(name, [])[:count]
        reason = ""
        if len(group) < count:
            reason = f"expected {name}>={count}, found {len(group)}"
        elif "color" in clause:
            right = sum(item[5] == clause["color"] for item in group)
            if right < count:
                seen = ", ".join(sorted({item[5] or "none" for item in group}))
                reason = f"expected {clause['color']} {name}>={count}, found {right} ({seen})"
        if not reason and "position" in clause:
            relation, index = clause["position"]
            target = groups[index] if index < len(groups) else None
            if target is None:
                reason = f"no target for {name} to be {relation}"
            elif any(relation not in relative_position(a, b) for a in group for b in target):
                held = relative_position(group[0], target[0])
                reason = (
                    f"expected {name} {relation} target, found {' and '.join(held) or 'neither'}"
                )
        groups.append(None if reason else group)
        yield not reason, reason
    for clause in metadata.get("exclude", []):
        name, count = clause["class"], clause["count"]
        number = len(objects.get(name, []))
        reason = f"expected {name}<{count}, found {number}" if number >= count else ""
        yield not reason, reason


def score_image(
    metadata: Mapping[str, Any], detections: Mapping[str, Sequence[Sequence[Any]]]
) -> tuple[bool, str]:
    """Whether a picture is right by GenEval's rules, and the reasons why not, one a line.

    Args:
        metadata: a line of metadata.jsonl.
        detections: class → [[x1, y1, x2, y2, score, colour], …]; boxes in pixels, any order.
    """
    why = reasons(metadata, found(metadata, detections))
    return not why, why
