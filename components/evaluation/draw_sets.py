"""Pictures of a benchmark's prompts, drawn into its official folders, resumable one by one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.evaluation.drawing import draw_pictures
from components.files import atomic_file


def draw_missing(
    model: Path,
    jobs: Sequence[tuple[str, int, Path]],
    size: tuple[int, int],
    settings: Mapping[str, Any],
    what: str,
) -> int:
    """Draw the pictures whose file is not there yet; returns how many.

    jobs: prompt, seed and file of each. size: width and height, px. settings:
    `params["evaluation"]`. what: named by the progress lines. Errors as `draw_pictures`.
    """
    missing = [job for job in jobs if not job[2].exists()]
    images = draw_pictures(
        model,
        [(prompt, seed) for prompt, seed, _ in missing],
        size,
        int(settings["batch_size"]),
        settings["sampler"],
        int(settings["workers"]),
        what,
    )
    for (_, _, file), image in zip(missing, images, strict=True):
        with atomic_file(file) as temporary:
            image.save(temporary, file.suffix.lstrip(".").replace("jpg", "jpeg"))
    return len(missing)
