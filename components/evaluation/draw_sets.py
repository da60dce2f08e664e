"""A benchmark's pictures drawn into a folder, only what is missing: a killed run goes on."""

import hashlib
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from components.errors import UserError
from components.evaluation import genai
from components.evaluation.compbench import IMAGES, read_prompts
from components.evaluation.drawing import Pipeline, draw_pictures, load_pipeline
from components.evaluation.folder import RUN, write_prompt
from components.files import atomic_file, hash_of, read_json, write_json
from components.scenes.tasks import Metadata

SetJob = tuple[str, int, Path]  # prompt, seed, PNG or JPEG file to be
FORMATS = {".png": "PNG", ".jpeg": "JPEG"}
QUALITY = 95  # of JPEG; PNG has none
COMPBENCH_SEED = 42  # of a prompt's first picture, officially
NAME = 230  # bytes of a prompt that is part of a file name, which holds 255


def draw_missing(
    model: Path,
    jobs: Sequence[SetJob],
    size: tuple[int, int],
    settings: Mapping[str, Any],
    what: str,
    load: Callable[[Path], Pipeline] = load_pipeline,
) -> int:
    """Draw the pictures whose file is not there yet; each appears whole or not at all.

    Batches are always the same parts of `jobs`, and one that lacks a picture is drawn again
    whole: in floating point a picture depends a little (1e-6) on the number drawn beside it, so
    only so is a resumed set the undisturbed one to the bit. A kill loses the batches in work.

    Args:
        model: a saved pipeline.
        jobs: prompt, seed and file of each picture; the same list whenever it is gone on with.
        size: width and height in pixels.
        settings: `params["evaluation"]`: batch_size, workers, sampler (what to replace in the
            model's own settings).
        what: named by the progress lines.
        load: how a model folder becomes a pipeline.

    Returns:
        How many pictures were written.

    Raises:
        UserError: as `drawing.draw_pictures`.
    """
    batch = int(settings["batch_size"])
    parts = [jobs[i : i + batch] for i in range(0, len(jobs), batch)]
    todo = [job for part in parts if not all(file.exists() for _, _, file in part) for job in part]
    if not todo:
        return 0
    there, written = sum(file.exists() for _, _, file in jobs), 0
    if there:
        print(f"{what}: {there} of {len(jobs)} pictures are there", flush=True)
    pictures = draw_pictures(
        model,
        [(prompt, seed) for prompt, seed, _ in todo],
        size,
        batch,
        settings["sampler"],
        int(settings["workers"]),
        what,
        load,
    )
    for (_, _, file), picture in zip(todo, pictures, strict=True):
        if not file.exists():
            with atomic_file(file) as temporary:
                picture.save(temporary, FORMATS[file.suffix], quality=QUALITY)
            written += 1
    return written


def draw_geneval(
    model: Path,
    out: Path,
    prompts: Sequence[Metadata],
    images: int,
    size: tuple[int, int] | None,
    settings: Mapping[str, Any],
) -> int:
    """Draw prompts into GenEval's folders, or go on with a run that was stopped.

    The model's own sampler settings hold, with `settings["sampler"]` in their place where it has
    any. Picture i of the set has the seed 1,000,000 · `settings["seed"]` + i.

    Args:
        model: a saved pipeline.
        out: gets 00000/metadata.jsonl, 00000/samples/0000.png, … and run.json.
        prompts: lines of metadata, in order.
        images: pictures of each prompt.
        size: width and height in pixels; None is the model's.
        settings: as for `draw_missing`, and seed.

    Returns:
        How many pictures were drawn; 0 where all were there.

    Raises:
        UserError: no model folder, a folder of something else or of other settings, or as
            `drawing.draw_pictures`.
    """
    seed = int(settings["seed"])
    size = _begin(model, out, list(prompts), images, seed, size, settings)
    first = seed * 1_000_000
    jobs: list[SetJob] = []
    for index, metadata in enumerate(prompts):
        place = write_prompt(out, index, metadata)
        jobs += [
            (metadata["prompt"], first + images * index + i, place / f"{i:04d}.png")
            for i in range(images)
        ]
    return draw_missing(model, jobs, size, settings, f"drawing {out.name}")


def draw_compbench(
    model: Path,
    file: Path,
    out: Path,
    size: tuple[int, int] | None,
    settings: Mapping[str, Any],
) -> int:
    """Draw an official prompt file of T2I-CompBench into `out/samples`, or go on with it.

    Ten pictures a prompt with the official seeds 42 to 51, named {prompt}_{000000}.png. Arguments
    and sampler settings are as of `draw_geneval`; returns how many pictures were drawn.

    Raises:
        UserError: a prompt that no official file name can hold, or as `draw_geneval`.
    """
    prompts = read_prompts(file)
    for prompt in prompts:
        if "_" in prompt or "/" in prompt or "\0" in prompt or len(prompt.encode()) > NAME:
            raise UserError(
                f"{file}: the prompt {prompt!r} cannot be a file's name up to its first '_', "
                "which is how the official tool reads it back; reword it."
            )
    size = _begin(model, out, prompts, IMAGES, COMPBENCH_SEED, size, settings)
    jobs: list[SetJob] = [
        (prompt, COMPBENCH_SEED + i, out / "samples" / f"{prompt}_{IMAGES * place + i:06d}.png")
        for place, prompt in enumerate(prompts)
        for i in range(IMAGES)
    ]
    return draw_missing(model, jobs, size, settings, f"drawing {out.name}")


def draw_genai(
    model: Path,
    file: Path,
    out: Path,
    size: tuple[int, int] | None,
    settings: Mapping[str, Any],
) -> int:
    """Draw GenAI-Bench's genai_image.json into `out`, or go on with it: {id}.jpeg, one a prompt.

    The official layout names the folder by the model: OUT/MODEL. Seeds, arguments, what is
    returned and the errors raised are as of `draw_geneval`.
    """
    prompts = genai.read_prompts(file)
    seed = int(settings["seed"])
    size = _begin(model, out, prompts, 1, seed, size, settings)
    jobs: list[SetJob] = [
        (prompt, seed * 1_000_000 + i, out / f"{key}.jpeg")
        for i, (key, prompt) in enumerate(prompts.items())
    ]
    return draw_missing(model, jobs, size, settings, f"drawing {out.name}")


def _begin(
    model: Path,
    out: Path,
    prompts: Any,
    images: int,
    seed: int,
    size: tuple[int, int] | None,
    settings: Mapping[str, Any],
) -> tuple[int, int]:
    """Claim `out` for these pictures; returns their width and height."""
    sampler = _sampler(model) | dict(settings["sampler"])
    if size is None:
        size = int(sampler["width"]), int(sampler["height"])
    record = {
        "model": model_hash(model),
        "prompts": hash_of(prompts),
        "images": images,
        "size": "{}x{}".format(*size),
        "seed": seed,
        "batch": int(settings["batch_size"]),
        "sampler": {k: v for k, v in sampler.items() if k not in ("width", "height")},
    }
    claim(out, record)
    return size


def claim(out: Path, record: Mapping[str, Any], clear: bool = False) -> None:
    """Make `out` the folder of the run that `record` describes, kept as run.json in it.

    Raises:
        UserError: it is another run's, or holds something else; with `clear` it is emptied then.
    """
    file = out / RUN
    if clear:
        try:
            return claim(out, record)
        except UserError:
            shutil.rmtree(out)
    if file.exists():
        try:
            before = read_json(file)
            differing = sorted(k for k in {*before, *record} if before.get(k) != record.get(k))
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is damaged ({error}); draw into another folder.") from None
        if differing:
            said = "; ".join(f"{k}: {before.get(k)} there, {record.get(k)} now" for k in differing)
            raise UserError(
                f"{out} was begun with other settings ({said}): draw with those, or into another "
                "folder."
            )
        return
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} holds files but no {RUN}: draw into another folder.")
    write_json(file, record)


def model_hash(model: Path) -> str:
    """Sixteen hex digits over the names and bytes of a model's files, its card left out."""
    digests = {}
    for file in sorted(p for p in model.rglob("*") if p.is_file() and p.name != "README.md"):
        with file.open("rb") as stream:
            digests[str(file.relative_to(model))] = hashlib.file_digest(
                stream, "sha256"
            ).hexdigest()
    return hash_of(digests)


def network_parameters(model: Path) -> int | None:
    """How many numbers a model's network has; None in a folder without one in safetensors."""
    from safetensors import safe_open

    counts = []
    for file in sorted((model / "transformer").glob("*.safetensors")):
        with safe_open(file, "numpy") as stored:  # reads the header alone
            names = stored.keys()
            counts += [math.prod(stored.get_slice(name).get_shape()) for name in names]
    return sum(counts) if counts else None


def _sampler(model: Path) -> dict[str, Any]:
    """The settings that a model was saved with."""
    from components.model.sampler import SamplerConfig

    file = model / "sampler" / "config.json"
    if not (model / "model_index.json").is_file():
        raise UserError(f"{model} is not a model folder: it has no model_index.json.")
    try:
        return asdict(SamplerConfig(**read_json(file)))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{file} cannot be read ({error}): train or fetch the model again."
        ) from None
