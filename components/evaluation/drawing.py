"""Pictures of many prompts, drawn by a saved model in a few processes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from components.errors import UserError
from components.processes import one_thread, spread
from components.progress import Progress

Job = tuple[str, int]  # prompt and seed


# A text-to-image pipeline: a list of prompts and settings, to an object whose `images` are PIL
# pictures, one a prompt.
Pipeline = Callable[..., Any]


def load_pipeline(model: Path) -> Pipeline:
    """The pipeline of the folder `models/NAME`, on the GPU if there is one."""
    from components.model import DJEPAPipeline

    pipeline = DJEPAPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)  # `draw_pictures` says how far it is
    if torch.cuda.is_available():
        return pipeline.to("cuda", torch.bfloat16)
    return pipeline.to("cpu")


def draw_pictures(
    model: Path,
    jobs: Sequence[Job],
    size: tuple[int, int],
    batch: int,
    sampler: Mapping[str, Any],
    workers: int,
    what: str,
    load: Callable[[Path], Pipeline] = load_pipeline,
) -> Iterator[Image.Image]:
    """Yield the picture of each (prompt, seed), in the jobs' order, and print the progress.

    The pictures do not depend on the number of processes: each works on one thread and batches
    are the same.

    Args:
        model: a saved pipeline; every process loads it once.
        jobs: prompt and seed of each picture.
        size: width and height in pixels.
        batch: pictures drawn at once by a process.
        sampler: settings of the pipeline's sampler to replace, by the pipeline's argument names.
        workers: processes. With 1, on a GPU, or with a `load` of one's own, this process draws.
        what: named by the progress lines.
        load: how a model folder becomes a pipeline.

    Raises:
        UserError: no worker, an unknown setting, a process died, or the pipeline refused folder,
            size or settings.
    """
    if workers < 1:
        raise UserError(f"evaluation.workers is {workers}: set it to at least 1 in params/.")
    from components.model.sampler import SamplerConfig

    names = sorted(set(SamplerConfig.__dataclass_fields__) - {"width", "height"})
    if not set(sampler) <= set(names):
        raise UserError(
            f"The sampler has no setting {', '.join(sorted(set(sampler) - set(names)))}: it has "
            f"{', '.join(names)}; correct `sampler` in params/."
        )
    if load is not load_pipeline or torch.cuda.is_available():
        workers = 1
    parts = [jobs[i : i + batch] for i in range(0, len(jobs), batch)]
    make = partial(_drawer, model, size, dict(sampler), load)
    died = (
        f"A process drawing pictures of {model} died (out of memory?): set evaluation.workers "
        "to fewer and run the stage again."
    )
    progress, done = Progress(what, len(jobs), "pictures"), 0
    for images in spread(make, parts, workers, died):
        done += len(images)
        progress.at(done)
        yield from images


def _drawer(
    model: Path,
    size: tuple[int, int],
    sampler: dict[str, Any],
    load: Callable[[Path], Pipeline],
) -> Callable[[Sequence[Job]], list[Image.Image]]:
    """A function that draws a batch in this process."""
    pipeline = load(model)

    @one_thread()
    def draw(part: Sequence[Job]) -> list[Image.Image]:
        return pipeline(
            [prompt for prompt, _ in part],
            width=size[0],
            height=size[1],
            generator=[torch.Generator().manual_seed(seed) for _, seed in part],
            **sampler,
        ).images

    return draw
