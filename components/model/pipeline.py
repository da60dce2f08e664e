"""The pipeline that a user loads: prompts in, pictures out."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from components.errors import UserError
from components.files import atomic_folder, read_json, write_json
from components.model.build import load_network
from components.model.card import model_card
from components.model.lora import LoraMixin
from components.model.network import Network
from components.model.precision import as_stored, halved
from components.model.request import (
    OUTPUT_TYPES,
    Request,
    one_generator_a_picture,
    requests,
)
from components.model.sampler import AfterStep, SamplerConfig, chance, sample_tokens, step_count
from components.tokens.text import TextEncoder
from components.tokens.tokenizer import ImageTokenizer

Shape = tuple[tuple[int, int], float | None]  # size (w, h) in tokens, VoPE's b
Generator = torch.Generator | Sequence[torch.Generator] | None
# Pipeline, step, share of the tokens drawn, {"latents": …}; gives the tensors to go on with.
Callback = Callable[["DJEPAPipeline", int, float, dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class PipelineOutput:
    """What a call gives: `images` in the order of the prompts, of the kind asked for."""

    images: list[Image.Image] | Any


class DJEPAPipeline(LoraMixin):
    """Text to pictures, called and saved as a pipeline of diffusers is.

    A folder of it has diffusers' layout: model_index.json and a folder a part. It is not a
    subclass of diffusers' DiffusionPipeline: that one's import takes four seconds in every process
    that draws, and its `from_pretrained` finds no class outside diffusers, so it could not load a
    folder of ours either. Argument and method names are the same, so code written for one
    pipeline calls the other.
    """

    _callback_tensor_inputs = ("latents",)

    def __init__(
        self,
        transformer: Network,
        tokenizer: ImageTokenizer,
        text_encoder: TextEncoder,
        sampler: SamplerConfig,
    ) -> None:
        self.transformer = transformer.eval()
        self.tokenizer = tokenizer.eval()
        self.text_encoder = text_encoder
        self.sampler = sampler
        # None: a bar at a terminal, nothing in a log.
        self._progress_bar: dict[str, Any] = {"disable": None}
        _check_fit(transformer, tokenizer, text_encoder)

    @property
    def components(self) -> dict[str, Any]:
        """The parts by name: `DJEPAPipeline(**pipe.components)` is another pipeline of them."""
        names = ("transformer", "tokenizer", "text_encoder", "sampler")
        return {name: getattr(self, name) for name in names}

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.transformer.parameters()).device

    def to(
        self, device: torch.device | str | torch.dtype, dtype: torch.dtype | None = None
    ) -> "DJEPAPipeline":
        """Move all parts to a device; with dtype bfloat16 the network draws in it from now on.

        Several times as fast on a GPU. Norms and what the frozen parts compute stay as they are.
        A dtype alone, `to(torch.bfloat16)`, leaves all where it is. Raises UserError for any other
        dtype.
        """
        if isinstance(device, torch.dtype):
            return self.to(self.device, device)
        if dtype not in (None, torch.bfloat16):
            raise UserError(
                f"dtype is {dtype}: give torch.bfloat16, or none for the float32 that it loads in."
            )
        self.transformer.to(device)
        if dtype is not None:
            halved(self.transformer)
        self.tokenizer.to(device)
        self.text_encoder.to(device)
        return self

    def set_progress_bar_config(self, **settings: Any) -> None:
        """Settings of tqdm, for example disable=True; by default the bar shows at a terminal."""
        self._progress_bar |= settings

    def progress_bar(self, total: int) -> Any:
        """A bar over the autoregressive steps of a call."""
        from tqdm.auto import tqdm

        return tqdm(total=total, **self._progress_bar)

    def save_pretrained(self, folder: Path | str, facts: Mapping[str, Any] | None = None) -> None:
        """Write the pipeline's folder, with a model card, whole or not at all.

        facts: what the card is to say about the training, by name, such as scale, images seen or
        scores. UserError while a LoRA adapter is loaded, whose weights lie among the network's,
        and for a folder that holds something else than a model, which would be lost.
        """
        self.refuse_adapter("save_pretrained")
        parts = {n: [type(p).__module__, type(p).__name__] for n, p in self.components.items()}
        with atomic_folder(Path(folder), "model_index.json") as target:
            self.transformer.save_pretrained(target / "transformer")
            self.tokenizer.save_pretrained(target / "tokenizer")
            self.text_encoder.save_pretrained(target / "text_encoder")
            write_json(target / "sampler" / "config.json", asdict(self.sampler))
            write_json(target / "model_index.json", {"_class_name": "DJEPAPipeline", **parts})
            (target / "README.md").write_text(model_card(self.components, facts or {}))

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> "DJEPAPipeline":
        """Read a saved pipeline. UserError when the folder is not one, or its parts do not fit."""
        folder = Path(folder)
        index = folder / "model_index.json"
        if not index.is_file():
            raise UserError(
                f"{folder} holds no model_index.json: it is not a saved model; "
                "run the stage that trains it, or give the folder of one under models/."
            )
        settings = folder / "sampler" / "config.json"
        try:
            kind = read_json(index).get("_class_name")
            if kind != "DJEPAPipeline":
                raise UserError(
                    f"{folder} holds a {kind}, not a DJEPAPipeline: load it with the library that "
                    "it is of, or give the folder of a model trained here."
                )
            sampler = SamplerConfig(**read_json(settings))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{folder} cannot be loaded ({error}): model_index.json or sampler/config.json is "
                "missing, damaged or of another version; train the model again."
            ) from error
        return cls(
            load_network(folder / "transformer"),
            ImageTokenizer.from_pretrained(folder / "tokenizer"),
            TextEncoder.from_pretrained(folder / "text_encoder"),
            sampler,
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        height: int | Sequence[int] | None = None,
        width: int | Sequence[int] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: Generator = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        autoregressive_steps: int | None = None,
        time_shift: float | None = None,
        temperature: float | None = None,
        solver: str | None = None,
        annealing: float | None = None,
        guided_share: float | None = None,
        order: str | None = None,
        layout_offset: float | Sequence[float | None] | None = None,
    ) -> Any:
        """Draw pictures. Settings not given are those that the model was saved with.

        A picture depends on its prompt, generator and settings only, not on what is drawn with it.

        Args:
            prompt: a text, or a list of them. Words beyond the text encoder's length are left out,
                with a warning.
            height: pixels, a multiple of the tokeniser's patch; a list has one a prompt.
            width: as height.
            num_inference_steps: evaluations of the flow head, a token: the denoising steps, where
                the solver asks once a step.
            guidance_scale: s of v = v_u + s·(v_c − v_u); with 1 nothing unconditional is computed.
            num_images_per_prompt: pictures of each prompt, beside each other in the result.
            generator: one a picture; or a single one that gives the pictures their noise in turn.
                Without one the noise is PyTorch's.
            output_type: "pil"; "np" (B, H, W, 3) or "pt" (B, 3, H, W), float in [0, 1]; "latent",
                tokens (B, C, h, w) as the tokeniser decodes them. Lists of one picture each
                where the sizes differ.
            return_dict: else a tuple with the pictures.
            callback_on_step_end: called after each autoregressive step as
                callback(pipe, step, timestep, tensors); timestep is the share of the tokens drawn
                so far, 1 in the end; tensors has "latents", zero where nothing is drawn yet. What
                it gives back for them replaces them. Pictures of different sizes or offsets are
                drawn one size after the other, each with its own steps. The baseline transformer
                draws all tokens at once: there a step is one of the solver, timestep its t.
            callback_on_step_end_tensor_inputs: names of the tensors it is given.
            autoregressive_steps: T, steps that each draw more of the tokens; at most one a token.
            time_shift: of the solver's times; above 1 more of them lie near the noise.
            temperature: standard deviation of the initial noise.
            solver: "euler", or of second order "midpoint" (asks twice a step) or "adams".
            annealing: share of num_inference_steps that is left in the last autoregressive step;
                between, they fall in a line.
            guided_share: of the autoregressive steps; only so many, the first, are guided.
            order: "random", or "spread": each token as far from those before it as any can be.
            layout_offset: VoPE's b in tokens, from 0 to |w − h|, moves the layout along the shorter
                side (None: centred); a list has one a prompt.

        Raises:
            UserError: an argument that does not fit, before any work is done.
        """
        given: dict[str, Any] = {
            "autoregressive_steps": autoregressive_steps,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "temperature": temperature,
            "time_shift": time_shift,
            "solver": solver,
            "annealing": annealing,
            "guided_share": guided_share,
            "order": order,
        }
        sampler = replace(self.sampler, **{k: v for k, v in given.items() if v is not None})
        if output_type not in OUTPUT_TYPES:
            raise UserError(
                f"output_type is {output_type!r}: give one of {', '.join(OUTPUT_TYPES)}."
            )
        names = callback_on_step_end_tensor_inputs
        if not set(names) <= set(self._callback_tensor_inputs):
            raise UserError(
                f"callback_on_step_end_tensor_inputs is {names!r}: there is only "
                f"{', '.join(self._callback_tensor_inputs)}."
            )
        wanted = requests(
            prompt,
            sampler.width if width is None else width,
            sampler.height if height is None else height,
            layout_offset,
            num_images_per_prompt,
            self.tokenizer.patch,
        )
        generators = one_generator_a_picture(generator, len(wanted))
        self._refuse_offset_without_field(wanted)
        chances = [
            chance(one.size[0] * one.size[1], self.tokenizer.channels, each)
            for one, each in zip(wanted, generators, strict=True)
        ]
        states, mask = self._encode([one.prompt for one in wanted])
        # What is drawn together is of one shape: a picture of few tokens waits for none of many.
        groups: dict[Shape, list[int]] = {}
        for number, one in enumerate(wanted):
            groups.setdefault((one.size, one.shift), []).append(number)
        images: dict[int, Any] = {}
        with self.progress_bar(
            sum(step_count(self.transformer, sampler, w * h) for (w, h), _ in groups)
        ) as bar:
            for (size, shift), rows in groups.items():
                with as_stored(self.transformer):
                    tokens = sample_tokens(
                        self.transformer,
                        *_trimmed(states[rows], mask[rows]),
                        size,
                        sampler,
                        torch.stack([chances[row][0].to(self.device) for row in rows]),
                        torch.stack([chances[row][1].to(self.device) for row in rows]),
                        shift,
                        self._after_step(bar, size, callback_on_step_end, names),
                    )
                images |= zip(rows, self._decode(_grid(tokens, size), output_type), strict=True)
        result: Any = [images[number] for number in range(len(wanted))]
        if output_type != "pil" and len({one.size for one in wanted}) == 1:
            result = np.stack(result) if output_type == "np" else torch.stack(result)
        return PipelineOutput(result) if return_dict else (result,)

    def _refuse_offset_without_field(self, wanted: Sequence[Request]) -> None:
        positions = self.transformer.config.positions
        if positions != "vope" and any(one.shift is not None for one in wanted):
            raise UserError(
                f"This model's positions are {positions}, which no layout_offset moves: leave it "
                "out, or draw with a model of positions vope."
            )

    def _encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States (B, L, E) and mask (B, L) of the prompts, each different one encoded once."""
        different = list(dict.fromkeys(prompts))
        states, mask = self.text_encoder.encode(different)
        length = self.text_encoder.length
        for text, tokens in zip(different, mask.sum(1).tolist(), strict=True):
            if tokens >= length:
                logging.getLogger(__name__).warning(
                    f"The text encoder reads at most {length} tokens of a prompt; what comes after "
                    f"them in '{text[:40]}…' has no effect."
                )
        rows = [different.index(text) for text in prompts]
        return states[rows].to(self.device), mask[rows].to(self.device)

    def _after_step(
        self, bar: Any, size: tuple[int, int], callback: Callback | None, names: Sequence[str]
    ) -> AfterStep:
        def after(step: int, share: float, tokens: Tensor) -> Tensor:
            bar.update()
            if callback is None:
                return tokens
            tensors = {"latents": _grid(tokens, size)}
            changed = callback(self, step, share, {name: tensors[name] for name in names}) or {}
            return changed.get("latents", tensors["latents"]).flatten(2).transpose(1, 2)

        return after

    def _decode(self, latents: Tensor, output_type: str) -> Sequence[Any]:
        """Latents (B, C, h, w) to B pictures of that type."""
        if output_type == "latent":
            return list(latents)
        if output_type == "pil":
            return self.tokenizer.decode_images(latents)
        pixels = (self.tokenizer.decode(latents).float().clamp(-1, 1) + 1) / 2
        return list(pixels.permute(0, 2, 3, 1).cpu().numpy() if output_type == "np" else pixels)


def _grid(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Tokens (B, N, C) in raster order of a picture of size (w, h) to latents (B, C, h, w)."""
    return tokens.transpose(1, 2).unflatten(2, (size[1], size[0]))


def _trimmed(states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Without the padding that only longer prompts of other pictures need."""
    length = int(mask.sum(1).max())
    return states[:, :length], mask[:, :length]


def _check_fit(transformer: Network, tokenizer: ImageTokenizer, text_encoder: TextEncoder) -> None:
    for what, network, other, part in (
        ("channels a token", transformer.config.channels, tokenizer.channels, "tokeniser"),
        ("numbers a text state", transformer.config.text_width, text_encoder.width, "text encoder"),
    ):
        if network != other:
            raise UserError(
                f"The network takes {network} {what} and the {part} gives {other}: they are of "
                "different models; give the parts of one."
            )
