"""How pleasing a picture is said to be: LAION's aesthetic predictor V1 on CLIP embeddings."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from components.curation.filters import Filter, Picture
from components.errors import UserError
from components.tokens.weights import FrozenWeights

if TYPE_CHECKING:
    from torch import Tensor

NONE = "none"
WAY_OUT = (
    "set curation.aesthetic.head to the file sa_0_4_vit_l_14_linear.pth of "
    "github.com/LAION-AI/aesthetic-predictor, or choose curation.aesthetic.model=none."
)
MODELS = ("clip", "clip_vision_model")  # model_type of a whole CLIP and of its vision part alone


class Aesthetic(Filter):
    """Aesthetic score, about 1 to 10: a linear head on L2-normalised CLIP image embeddings.

    The head is LAION-Aesthetics V1 (github.com/LAION-AI/aesthetic-predictor), the model is
    transformers' CLIPVisionModelWithProjection with its own picture processor. Without a model
    there is no such filter, and contrast, noise and sharpness are all that is said of quality:
    they measure distortion, not beauty.
    """

    name = "aesthetic"
    keep_high = True
    dear = True
    reason = "aesthetic score {score:.2f}, at least {threshold:g} wanted"

    def __init__(self, aesthetic: Mapping[str, Any]) -> None:
        super().__init__(aesthetic["threshold"])
        self.batch = int(aesthetic["batch"])
        self.head = Path(aesthetic["head"]).expanduser()
        self.weights = FrozenWeights(
            str(aesthetic["model"]),
            str(aesthetic["revision"]),
            ("",),
            "curation.aesthetic.model",
            "curation.aesthetic.model=none",
        )

    @classmethod
    def from_params(cls, aesthetic: Mapping[str, Any]) -> "Aesthetic | None":
        """The filter of `params.curation.aesthetic`; None where its model is none.

        Raises UserError for a model without a head.
        """
        if aesthetic["model"] == NONE:
            return None
        if aesthetic["head"] == NONE:
            raise UserError(f"curation.aesthetic.head is none, but a model is chosen: {WAY_OUT}")
        return cls(aesthetic)

    def setup(self) -> None:
        """Read head, model and processor, onto a GPU if there is one.

        Raises UserError when one of them is missing, damaged or of another kind.
        """
        import torch
        from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection
        from transformers.utils import logging

        weight, bias = read_head(self.head)  # the cheapest question first
        folder = self.weights.folder()
        found = self.weights.config(folder).get("model_type")
        if found not in MODELS:
            raise self.weights.refusal("cannot be loaded", f"it is a {found} model, not CLIP")
        model = self.weights.load(
            CLIPVisionModelWithProjection, logging, folder, dtype=torch.float32
        )
        if weight.shape[1] != model.config.projection_dim:
            raise UserError(
                f"{self.head} is a head for {weight.shape[1]} numbers a picture, the model "
                f"{self.weights} gives {model.config.projection_dim}: set curation.aesthetic.head "
                "and curation.aesthetic.model to a pair that belongs together."
            )
        try:
            self.processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
        # A missing file and a damaged one raise different errors and mean the same.
        except (OSError, ValueError, TypeError) as error:
            reason = "preprocessor_config.json is missing or damaged"
            raise self.weights.refusal("cannot be loaded", reason) from error
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model: Any = model.to(self.device)
        self.weight, self.bias = weight.to(self.device), bias.to(self.device)

    def score(self, batch: Sequence[Picture]) -> np.ndarray:
        """Score the pictures, `params.curation.aesthetic.batch` of them at a time."""
        import torch

        scores: list[float] = []
        with torch.inference_mode():
            for first in range(0, len(batch), self.batch):
                pixels = [p.pixels for p in batch[first : first + self.batch]]
                values = self.processor(
                    pixels, return_tensors="pt", input_data_format="channels_last"
                )["pixel_values"]
                embeddings = self.model(pixel_values=values.to(self.device)).image_embeds
                scores += predict(embeddings, self.weight, self.bias).tolist()
        return np.array(scores, np.float64)


def predict(embeddings: "Tensor", weight: "Tensor", bias: "Tensor") -> "Tensor":
    """Scores (B,) of CLIP image embeddings (B, D); weight (1, D), bias (1,)."""
    from torch.nn.functional import linear, normalize

    return linear(normalize(embeddings.float(), dim=-1), weight, bias)[:, 0]


def read_head(path: Path) -> tuple["Tensor", "Tensor"]:
    """Weight (1, D) and bias (1,), float32, of a saved linear layer with one output.

    Raises UserError when the file is missing, holds anything but tensors, or other ones.
    """
    import torch

    if not path.is_file():
        raise UserError(f"The aesthetic head {path} is not there: {WAY_OUT}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    # A file of another format is refused with errors of a dozen kinds.
    except Exception as error:
        raise UserError(f"The aesthetic head {path} cannot be read: {WAY_OUT}") from error
    shapes = (
        {name: tuple(getattr(value, "shape", ())) for name, value in state.items()}
        if isinstance(state, Mapping)
        else {}
    )
    width = shapes.get("weight", (0,))[-1:]
    if shapes != {"weight": (1, *width), "bias": (1,)}:
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items()) or "no tensors"
        raise UserError(
            f"The aesthetic head {path} holds {found[:200]} instead of weight (1, D) and bias "
            f"(1,): {WAY_OUT}"
        )
    return state["weight"].float(), state["bias"].float()
