"""GenEval's detector: Mask2Former for COCO's objects, post-processed as officially.

The official tool runs Mask2Former Swin-S of mmdetection 2.x; these are transformers' weights of
the same network. Its own post-processor would give other boxes and scores: it drops queries and
resizes masks in another order. So this works on the raw logits.
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from components.errors import UserError
from components.evaluation.clip_colors import ClipColors
from components.evaluation.detector import Detections
from components.evaluation.geneval import SCORE_THRESHOLD, found
from components.evaluation.prompts import COCO
from components.tokens.weights import FrozenWeights

# The official test pipeline: part of the metric, not settings.
SHORTER, LONGER, DIVISOR = 800, 1333, 32  # px
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
PAD = 128.0  # grey, before normalising
MOST = 100  # detections a picture
# What models call COCO's classes, where GenEval calls them otherwise.
RENAMED = {
    "mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard",
    "motorbike": "motorcycle", "aeroplane": "airplane", "sofa": "couch",
    "pottedplant": "potted plant", "diningtable": "dining table", "tvmonitor": "tv",
    "hair dryer": "hair drier", "doughnut": "donut",
}  # fmt: skip


class Mask2FormerDetector:
    """Finds COCO's 80 objects, under GenEval's names; `colors` names those that are asked for.

    settings: `evaluation.mask2former`: `model`, `revision`. On the GPU if there is one.
    UserError for weights that are not there, damaged, or of other classes.
    """

    def __init__(self, settings: Mapping[str, Any], colors: ClipColors | None) -> None:
        from transformers import Mask2FormerForUniversalSegmentation
        from transformers.utils import logging

        self.weights = FrozenWeights(
            str(settings["model"]),
            str(settings["revision"]),
            ("",),
            "evaluation.mask2former.model",
            "--detections FILE, boxes found elsewhere",
        )
        self.colors, self._tested = colors, False
        folder = self.weights.folder()
        kind = self.weights.config(folder).get("model_type")
        if kind != "mask2former":
            raise self.weights.refusal("cannot be loaded", f"it is a {kind} model")
        model = self.weights.load(Mask2FormerForUniversalSegmentation, logging, folder)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model: Any = model.to(self.device)
        said = [str(name) for _, name in sorted(model.config.id2label.items())]
        self.names = [RENAMED.get(name, name) for name in said]
        if sorted(self.names) != sorted(COCO):
            others = sorted(set(self.names) - set(COCO))[:3]
            raise self.weights.refusal(
                "cannot be used", f"its classes are not COCO's 80: {', '.join(others) or 'fewer'}"
            )

    def about(self) -> dict[str, Any]:
        """What made the boxes, for a result file."""
        import transformers

        return {
            "detector": "mask2former",
            "weights": str(self.weights),
            "post_processing": "softmax without the null class, top 100 of query and class, mask "
            "where its logit is over 0, score times the mean probability in the mask, box of "
            "the mask (mmdetection 2.x)",
            "colors": None if self.colors is None else self.colors.about(),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }

    def self_test(self, width: int, height: int) -> None:
        """See `Detector`: a portrait that matplotlib brings, and discs of GenEval's colours, once.

        Every picture comes to the network at about one size.
        """
        if self._tested:
            return
        from matplotlib.cbook import get_sample_data

        with Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)) as file:
            seen = found({"tag": "counting"}, self.detect(file.convert("RGB")))
        people = len(seen.get("person", []))
        if people != 1:
            raise UserError(
                f"The detector {self.weights} failed its self-test: in a portrait of one person "
                f"it saw {people}; no score is reported. Set evaluation.mask2former.model to "
                "trained weights of COCO instance segmentation."
            )
        if self.colors is not None:
            self.colors.self_test()
        self._tested = True

    @torch.inference_mode()
    def detect(self, image: Image.Image, colored: Collection[str] = ()) -> Detections:
        """See `Detector.detect`."""
        pixels, (height, width) = prepared(image)
        output = self.model(pixel_values=pixels.to(self.device))
        logits = output.masks_queries_logits.float()
        whole = resized(logits, (pixels.shape[2], pixels.shape[3]))[:, :, :height, :width]
        masks = resized(whole, (image.height, image.width))[0]
        labels, scores, boxes, inside = instances(output.class_queries_logits[0].float(), masks)
        detections: Detections = {}
        kept: dict[str, list[np.ndarray]] = {}
        for i in scores.argsort(descending=True, stable=True).tolist():
            name = self.names[int(labels[i])]
            box = [*boxes[i].tolist(), float(scores[i]), ""]
            detections.setdefault(name, []).append(box)
            kept.setdefault(name, []).append(inside[i].cpu().numpy())
        for name in set(colored) & set(detections):
            self._color(image, name, detections[name], kept[name])
        return detections

    def _color(
        self, image: Image.Image, name: str, items: list[list[Any]], masks: list[np.ndarray]
    ) -> None:
        """Name the colours of a class's things that a prompt can count."""
        if self.colors is None:
            return
        counted = [i for i, item in enumerate(items) if item[4] > SCORE_THRESHOLD]
        named = self.colors.name(image, name, [(items[i][:4], masks[i]) for i in counted])
        for i, color in zip(counted, named, strict=True):
            items[i][5] = color


def prepared(image: Image.Image) -> tuple[Tensor, tuple[int, int]]:
    """The network's input (1, 3, H, W), sides padded to 32, and the height and width of its part.

    The shorter side becomes 800 px, unless the longer one would pass 1,333.
    """
    scale = min(SHORTER / min(image.size), LONGER / max(image.size))
    height, width = int(image.height * scale + 0.5), int(image.width * scale + 0.5)
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float()
    pixels = resized(pixels, (height, width))
    pixels = F.pad(pixels, (0, -width % DIVISOR, 0, -height % DIVISOR), value=PAD)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (pixels - mean) / std, (height, width)


def resized(values: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, h, w) to (B, C, height, width) as OpenCV's bilinear does: no smoothing before."""
    return F.interpolate(values, size=size, mode="bilinear", align_corners=False)


def instances(classes: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Things of one picture from raw logits, by the official post-processing.

    classes (Q, K + 1), the last one the null class; masks (Q, H, W), at the picture's size.
    Returns classes (n,), scores (n,), boxes (n, 4) in px and masks (n, H, W) bool, n at most 100.
    """
    chances = classes.softmax(-1)[:, :-1]
    top, place = chances.flatten().topk(min(MOST, chances.numel()))
    query, label = place // chances.shape[1], place % chances.shape[1]
    logits = masks[query]
    inside = logits > 0
    area = inside.flatten(1).sum(1)
    sure = (logits.sigmoid() * inside).flatten(1).sum(1) / (area + 1e-6)
    return label, top * sure, _boxes(inside), inside


def _boxes(masks: Tensor) -> Tensor:
    """Boxes (n, 4) of masks (n, H, W) bool: x1, y1, x2, y2, the last two exclusive; else 0."""
    boxes = torch.zeros(len(masks), 4, device=masks.device)
    for axis, (first, last) in ((1, (0, 2)), (2, (1, 3))):
        hit = masks.any(dim=axis)  # (n, W) and (n, H)
        length = hit.shape[1]
        places = torch.arange(length, device=masks.device)
        boxes[:, first] = torch.where(hit, places, length).amin(1)
        boxes[:, last] = torch.where(hit, places + 1, 0).amax(1)
    boxes[~masks.flatten(1).any(1)] = 0
    return boxes
