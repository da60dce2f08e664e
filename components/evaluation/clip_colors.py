"""GenEval's colours: CLIP asked about the thing alone, on grey (djghosh13/geneval)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import normalize

from components.errors import UserError
from components.scenes.tasks import OFFICIAL_COLORS
from components.tokens.weights import FrozenWeights

# The official evaluator's: part of the metric, not settings.
GREY = "#999"
SIDE, LEAST = 128, 8  # of the self-test: px of its discs, how many must be right
TEMPLATES = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")


class ClipColors:
    """Names colours of things by zero-shot classification with CLIP.

    settings: `evaluation.colors`: `model`, `revision`, `batch`. On the GPU if there is one.
    UserError for weights that are not there, damaged, or of another kind.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        from transformers import CLIPModel, CLIPProcessor
        from transformers.utils import logging

        self.weights = FrozenWeights(
            str(settings["model"]),
            str(settings["revision"]),
            ("",),
            "evaluation.colors.model",
            "--detections FILE, boxes and colours found elsewhere",
        )
        self.batch = int(settings["batch"])
        folder = self.weights.folder()
        kind = self.weights.config(folder).get("model_type")
        if kind != "clip":
            raise self.weights.refusal("cannot be loaded", f"it is a {kind} model, not CLIP")
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        model = self.weights.load(CLIPModel, logging, folder, dtype=torch.float32)
        self.model: Any = model.to(self.device)
        try:
            self.processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        # A missing file and a damaged one raise different errors and mean the same.
        except (OSError, ValueError, TypeError) as error:
            reason = "tokeniser or preprocessor_config.json are missing or damaged"
            raise self.weights.refusal("cannot be loaded", reason) from error
        self._classifiers: dict[str, Tensor] = {}

    def about(self) -> str:
        """What named the colours, for a result file."""
        return f"CLIP {self.weights}, three templates, cropped on {GREY}"

    def self_test(self) -> None:
        """Name ten discs, one of each colour. UserError where fewer than eight are right."""
        mask = Image.new("1", (SIDE, SIDE))
        ImageDraw.Draw(mask).ellipse((0, 0, SIDE - 1, SIDE - 1), fill=1)
        whole = [((0, 0, SIDE, SIDE), np.array(mask))]
        wrong = {}
        for color in OFFICIAL_COLORS:
            named = self.name(Image.new("RGB", (SIDE, SIDE), color), "frisbee", whole)
            if named != [color]:
                wrong[color] = named[0]
        if len(wrong) > len(OFFICIAL_COLORS) - LEAST:
            pairs = ", ".join(f"{color} as {seen}" for color, seen in wrong.items())
            raise UserError(
                f"The colours of {self.weights} failed their self-test: of ten discs it named "
                f"{pairs}; no score is reported. Set evaluation.colors.model to CLIP's own weights."
            )

    @torch.inference_mode()
    def name(
        self,
        image: Image.Image,
        thing: str,
        found: Sequence[tuple[Sequence[float], np.ndarray]],
    ) -> list[str]:
        """The colour of each thing of a class, one of GenEval's ten.

        found: box (x1, y1, x2, y2 in px) and mask (H, W) bool of each.
        """
        image = image.convert("RGB")
        blank = Image.new("RGB", image.size, GREY)
        alone = [
            Image.composite(image, blank, Image.fromarray(mask)).crop((x1, y1, x2, y2))
            for (x1, y1, x2, y2), mask in found
        ]
        names: list[str] = []
        for first in range(0, len(alone), self.batch):
            pixels = self.processor(images=alone[first : first + self.batch], return_tensors="pt")
            answer = self.model.get_image_features(pixels["pixel_values"].to(self.device))
            seen = answer.pooler_output
            best = (normalize(seen, dim=-1) @ self._classifier(thing)).argmax(-1)
            names += [OFFICIAL_COLORS[i] for i in best.tolist()]
        return names

    def _classifier(self, thing: str) -> Tensor:
        """(D, 10): for each colour the mean of its templates' embeddings, of length one."""
        if thing not in self._classifiers:
            texts = [form.format(color, thing) for color in OFFICIAL_COLORS for form in TEMPLATES]
            tokens = self.processor(text=texts, return_tensors="pt", padding=True, truncation=True)
            said = self.model.get_text_features(**tokens.to(self.device)).pooler_output
            each = normalize(said, dim=-1).unflatten(0, (len(OFFICIAL_COLORS), len(TEMPLATES)))
            self._classifiers[thing] = normalize(each.mean(1), dim=-1).T
        return self._classifiers[thing]
