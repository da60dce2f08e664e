"""The pipeline that a user loads: prompts in, pictures out."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from components.errors import UserError
from components.files import atomic_folder, read_json, write_json
from components.model.build import load_network
from components.model.network import Network
from components.model.sampler import SamplerConfig, sample_tokens
from components.tokens.text import TextEncoder
from components.tokens.tokenizer import PatchTokenizer


@dataclass(frozen=True)
class PipelineOutput:
    """What a call gives: pictures in the order of the prompts."""

    images: list[Image.Image]


class DJEPAPipeline:
    """A folder in the layout of diffusers: model_index.json and a folder a part.

    Not a subclass of diffusers' DiffusionPipeline, whose import alone takes seconds in every
    stage that draws; that class could not load a part of ours without remote code either.
    """

    def __init__(
        self,
        transformer: Network,
        tokenizer: PatchTokenizer,
        text_encoder: TextEncoder,
        sampler: SamplerConfig,
    ) -> None:
        self.transformer = transformer.eval()
        self.tokenizer = tokenizer.eval()
        self.text_encoder = text_encoder
        self.sampler = sampler

    def save_pretrained(self, folder: Path) -> None:
        """Write the pipeline's folder, whole or not at all."""
        with atomic_folder(Path(folder)) as target:
            self.transformer.save_pretrained(target / "transformer")
            self.tokenizer.save_pretrained(target / "tokenizer")
            self.text_encoder.save_pretrained(target / "text_encoder")
            write_json(target / "sampler" / "config.json", asdict(self.sampler))
            write_json(
                target / "model_index.json",
                {
                    "_class_name": "DJEPAPipeline",
                    "transformer": [
                        type(self.transformer).__module__,
                        type(self.transformer).__name__,
                    ],
                    "tokenizer": ["components.tokens.tokenizer", "PatchTokenizer"],
                    "text_encoder": ["components.tokens.text", type(self.text_encoder).__name__],
                    "sampler": ["components.model.sampler", "SamplerConfig"],
                },
            )

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> "DJEPAPipeline":
        """Read a saved pipeline. UserError when the folder is not one."""
        folder = Path(folder)
        if not (folder / "model_index.json").is_file():
            raise UserError(
                f"{folder} holds no model_index.json: it is not a saved model; "
                "run the stage that trains it, or give the folder of one under models/."
            )
        return cls(
            load_network(folder / "transformer"),
            PatchTokenizer.from_pretrained(folder / "tokenizer"),
            TextEncoder.from_pretrained(folder / "text_encoder"),
            SamplerConfig(**read_json(folder / "sampler" / "config.json")),
        )

    def to(self, device: torch.device | str) -> "DJEPAPipeline":
        """Move the network to a device."""
        self.transformer.to(device)
        self.tokenizer.to(device)
        return self

    @torch.no_grad()
    def __call__(
        self,
        prompts: list[str],
        width: int = 32,
        height: int = 32,
        seeds: list[int] | None = None,
        batch_size: int = 32,
        **settings: float | int,
    ) -> PipelineOutput:
        """Draw one picture a prompt.

        width, height in pixels, multiples of the tokeniser's patch; seeds one a picture (default
        0, 1, …): a picture depends on its prompt, seed and settings only. `settings` replace the
        saved sampler's: steps, flow_steps, guidance_scale, temperature, time_shift.
        Raises UserError for a size or setting that does not fit.
        """
        patch = self.tokenizer.patch
        if width < patch or height < patch or width % patch or height % patch:
            raise UserError(
                f"Size {width}x{height} does not fit: both must be multiples of {patch} pixels."
            )
        unknown = set(settings) - set(asdict(self.sampler))
        if unknown:
            raise UserError(
                f"The sampler has no setting {', '.join(sorted(unknown))}; "
                f"it has {', '.join(asdict(self.sampler))}."
            )
        sampler = replace(self.sampler, **settings)  # type: ignore[arg-type]
        if sampler.steps < 1 or sampler.flow_steps < 1 or sampler.time_shift <= 0:
            raise UserError("steps and flow_steps must be at least 1 and time_shift above 0.")
        if seeds is None:
            seeds = list(range(len(prompts)))
        if len(seeds) != len(prompts):
            raise UserError(f"{len(prompts)} prompts need as many seeds, not {len(seeds)}.")
        device = next(self.transformer.parameters()).device
        size = (width // patch, height // patch)
        images: list[Image.Image] = []
        for start in range(0, len(prompts), batch_size):
            states, mask = self.text_encoder.encode(prompts[start : start + batch_size])
            generators = [
                torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch_size]
            ]
            tokens = sample_tokens(
                self.transformer, states.to(device), mask.to(device), size, sampler, generators
            )
            latents = tokens.transpose(1, 2).unflatten(2, (size[1], size[0]))
            images += self.tokenizer.decode_images(latents)
        return PipelineOutput(images)
