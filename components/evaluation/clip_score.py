"""CLIPScore of T2I-CompBench: cosine of picture and prompt by CLIP ViT-B/32, unscaled."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from components.errors import UserError
from components.tokens.weights import HUB_SECONDS, FrozenWeights

# Of the self-test: what is in the portrait, and what is not.
THERE = "a photo of a woman in uniform"
ABSENT = ("a photo of a dog", "a photo of a car", "a photo of a plate of food", "a blank page")


class Clip:
    """A CLIP with its tokeniser and its preparation of pictures, on the GPU if there is one.

    weights: of the model. prepared: where tokeniser and preprocessor_config.json are; beside the
    weights where it is None. UserError for what is not there, damaged, or of another kind.
    """

    def __init__(self, weights: FrozenWeights, prepared: FrozenWeights | None = None) -> None:
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
        from transformers.utils import logging

        self.weights = weights
        folder = weights.folder()
        kind = weights.config(folder).get("model_type")
        if kind != "clip":
            raise weights.refusal("cannot be loaded", f"it is a {kind} model, not CLIP")
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        model = weights.load(CLIPModel, logging, folder, dtype=torch.float32)
        self.model: Any = model.to(self.device)
        beside = prepared or weights
        place = folder if prepared is None else _small_files(prepared)
        try:
            self.tokenizer = CLIPTokenizer.from_pretrained(place, local_files_only=True)
            # As the official scorers: Pillow resizes. Torch's own bicubic gives other pixels.
            self.processor = CLIPImageProcessorPil.from_pretrained(place, local_files_only=True)
        # A missing file and a damaged one raise different errors and mean the same.
        except (OSError, ValueError, TypeError) as error:
            reason = "tokeniser or preprocessor_config.json are missing or damaged"
            raise beside.refusal("cannot be loaded", reason) from error

    @property
    def longest(self) -> int:
        """Tokens of the longest text, start and end included."""
        return int(self.model.config.text_config.max_position_embeddings)

    @torch.inference_mode()
    def pictures(self, images: Sequence[Image.Image]) -> Tensor:
        """(N, D) embeddings of length one."""
        rgb = [image.convert("RGB") for image in images]
        pixels = self.processor(images=rgb, return_tensors="pt")["pixel_values"]
        seen = self.model.get_image_features(pixels.to(self.device)).pooler_output
        return normalize(seen, dim=-1)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str], cut: bool = False) -> Tensor:
        """(N, D) embeddings of length one.

        cut: shorten texts that are too long; else UserError names them, as officially.
        """
        # Folders that lack tokenizer_config.json name no longest text: it is given here.
        tokens = self.tokenizer(
            list(texts),
            return_tensors="pt",
            padding=True,
            truncation=cut,
            max_length=self.longest if cut else None,
        )
        if tokens["input_ids"].shape[1] > self.longest:
            long = max(texts, key=lambda text: len(self.tokenizer(text)["input_ids"]))
            raise UserError(
                f"{self.weights} reads at most {self.longest} tokens, and '{long[:60]}…' has "
                "more; shorten this prompt and draw it again."
            )
        said = self.model.get_text_features(**tokens.to(self.device)).pooler_output
        return normalize(said, dim=-1)

    def self_test(self, setting: str) -> None:
        """A portrait that matplotlib brings is nearest to what it shows, or UserError."""
        near = (self.pictures([portrait()]) @ self.texts([THERE, *ABSENT]).T)[0]
        best = int(near.argmax())
        if best:
            raise UserError(
                f"{self.weights} failed its self-test: it holds the portrait of a woman in "
                f"uniform for {ABSENT[best - 1]!r}; no score is reported. Set {setting} to "
                "trained weights."
            )


def portrait() -> Image.Image:
    """The picture that matplotlib brings: Grace Hopper in uniform."""
    from matplotlib.cbook import get_sample_data

    with Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)) as file:
        return file.convert("RGB")


def _small_files(weights: FrozenWeights) -> Path:
    """A folder of a repository's JSON and text files, without its weights of some gigabytes."""
    if weights.is_local:
        return Path(weights.id).expanduser()
    from huggingface_hub import HfApi, snapshot_download

    def folder(cached: bool) -> Path:
        small = ["*.json", "*.txt"]
        return Path(
            snapshot_download(
                weights.id,
                revision=weights.revision,
                allow_patterns=small,
                local_files_only=cached,
            )
        )

    try:
        return folder(cached=True)
    # The cache's errors share no class; each means that the hub has to be asked.
    except Exception:
        pass
    try:
        # One question with a short limit, because a download tries each file for minutes.
        HfApi().model_info(weights.id, revision=weights.revision, timeout=HUB_SECONDS)
        return folder(cached=False)
    except Exception as error:
        reason = "the hub gives no answer to it"
        raise weights.refusal("are not on this machine", reason) from error


class ClipScore:
    """Scores how well pictures fit their prompts.

    settings: `evaluation.clip_score`: `model`, `revision`, `batch`.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        weights = FrozenWeights(
            str(settings["model"]),
            str(settings["revision"]),
            ("",),
            "evaluation.clip_score.model",
            "--annotations DIR, results of the official tool",
        )
        self.clip, self.batch = Clip(weights), int(settings["batch"])

    def about(self) -> str:
        """What made the scores, for a result file."""
        return f"CLIPScore {self.clip.weights}, cosine, unscaled, float32"

    def self_test(self) -> None:
        """See `Clip.self_test`."""
        self.clip.self_test("evaluation.clip_score.model")

    def scores(self, pictures: Sequence[tuple[Path, str]]) -> list[float]:
        """The cosine of each (picture, prompt), −1 to 1. UserError for an unreadable picture."""
        from components.evaluation.folder import Sample
        from components.progress import Progress

        progress, found = Progress("CLIPScore", len(pictures), "pictures"), []
        for first in range(0, len(pictures), self.batch):
            part = pictures[first : first + self.batch]
            seen = self.clip.pictures([Sample(p.name, {}, p).open() for p, _ in part])
            said = self.clip.texts([prompt for _, prompt in part])
            found += (seen * said).sum(-1).tolist()
            progress.at(len(found))
        return found
