"""GenEval's official rules on detections."""

import math

Box = tuple[float, float, float, float]
POSITION_THRESHOLD = 0.1


def relative_position(a: Box, b: Box) -> set[str]:
    """Relations that hold of A to B, by GenEval's rule; two may hold, or none.

    offset = centre A − centre B; revised = sign · max(|offset| − 0.1 · (size A + size B), 0)
    per axis; (dx, dy) = revised / ‖offset‖; left dx < −0.5, right dx > 0.5, above dy < −0.5,
    below dy > 0.5.
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
