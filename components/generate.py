"""`djepa generate`: a prompt to PNG files."""

import re
import sys
from pathlib import Path

from PIL import Image

from components.errors import UserError
from components.files import read_json
from components.scenes.world import World
from components.starter import FOLDER as STARTER
from components.starter import WORLD

MODELS = Path("models")


def last_model() -> Path:
    """The model folder written last below models/; the starter where nothing was trained yet."""
    folders = [index.parent for index in MODELS.glob("*/model_index.json")]
    if not folders:
        return STARTER
    return max(folders, key=lambda folder: (folder / "model_index.json").stat().st_mtime)


def about_starter(prompt: str) -> str:
    """That the starter draws, and which of the prompt's words it never learnt."""
    world = World.from_params(read_json(STARTER / WORLD)["data"])
    known = {word for each in world.training_prompts() for word in _words(each["prompt"])}
    strange = [word for word in dict.fromkeys(_words(prompt)) if word not in known]
    said = f"drawn by the starter ({STARTER / 'README.md'}); train your own with `make demo`"
    if strange:
        said += (
            f"\nit never learnt {', '.join(strange)}: it knows {', '.join(world.shapes)}, in "
            f'{", ".join(world.colors)}, as in "a photo of two blue squares"'
        )
    return said


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def parse_size(size: str) -> tuple[int, int]:
    """`48x32` as (48, 32), width first.

    Raises:
        UserError: not two positive numbers with an x between.
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", size)
    if not match:
        raise UserError(f"--size {size!r} is not WxH in pixels, for example 48x32.")
    return int(match[1]), int(match[2])


def _check_out(out: Path) -> None:
    """Refuse, before anything is drawn, a name that no picture can be written under."""
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: name a file in it, such as {out / 'a.png'}.")
    if Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE:
        raise UserError(
            f"--out {out} does not say which kind of picture: end it in .png, such as "
            f"{out.with_suffix('.png')}."
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(
            f"--out {out} cannot be written: {error.filename} is a file, no folder. Name another."
        ) from error


def generate(
    prompt: str,
    model: Path | None,
    size: str | None,
    images: int,
    seed: int,
    out: Path,
    guidance: float | None = None,
    layout_offset: float | None = None,
    lora: Path | None = None,
    enlarge: int = 1,
) -> list[Path]:
    """Draw `images` pictures of `prompt`; picture i has seed + i.

    Args:
        prompt: what to draw.
        model: a model folder; None is the last one trained here, or else the starter.
        size: WxH in pixels; None is the model's.
        images: how many.
        seed: of the first picture.
        out: PNG file; several pictures get -0, -1, … at the end of their names.
        guidance: scale of classifier-free guidance; None is the model's.
        layout_offset: VoPE's b in tokens; None is centred.
        lora: folder of a LoRA adapter to draw with.
        enlarge: each pixel becomes a square of this side, for looking at small pictures.

    Returns:
        The PNG files written.

    Raises:
        UserError: no such model or adapter, an impossible size, offset, seed or file, an empty
            prompt.
    """
    if not prompt.strip():
        raise UserError("The prompt is empty: say what to draw.")
    _check_out(out)
    if not -(2**63) <= seed < 2**63 - images:
        raise UserError(f"--seed is {seed}: give a whole number of at most 63 bits, such as 0.")
    width, height = parse_size(size) if size else (None, None)
    folder = model or last_model()
    if not (folder / "model_index.json").exists():
        raise UserError(f"{folder} is not a model folder: it has no model_index.json.")
    if folder.resolve() == STARTER.resolve():
        print(about_starter(prompt), file=sys.stderr, flush=True)
    import torch  # what is wrong above is said without waiting for it

    from components.model import DJEPAPipeline

    pipeline = DJEPAPipeline.from_pretrained(folder)
    if torch.cuda.is_available():
        pipeline.to("cuda", torch.bfloat16)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    pictures = pipeline(
        prompt,
        height,
        width,
        num_images_per_prompt=images,
        generator=[torch.Generator().manual_seed(seed + i) for i in range(images)],
        guidance_scale=guidance,
        layout_offset=layout_offset,
    ).images
    paths = []
    for number, picture in enumerate(pictures):
        path = out if images == 1 else out.with_stem(f"{out.stem}-{number}")
        large = (picture.width * enlarge, picture.height * enlarge)
        picture.resize(large, Image.Resampling.NEAREST).save(path)
        paths.append(path)
    return paths
