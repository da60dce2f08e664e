"""PickScore: which of two pictures of a prompt people would prefer (Kirstain et al. 2023).

The preference is the softmax over two pictures of exp(scale) · cosine of picture and prompt, by a
CLIP ViT-H/14 that was trained on Pick-a-Pic's choices.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from components.errors import UserError
from components.evaluation.clip_score import Clip
from components.evaluation.folder import Sample, read_folder
from components.evaluation.win_rates import win_rate
from components.progress import Progress
from components.tokens.weights import FrozenWeights

INSTEAD = "raters (`djepa rate pairs`)"


class PickScore:
    """Scores pictures of prompts, and prefers one of two.

    settings: `evaluation.pick_score`: `model`, `revision`, `processor`, `processor_revision` (the
    public weights lack tokeniser and preparation; they are those of the CLIP they began as),
    `batch`.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        weights, prepared = (
            FrozenWeights(
                str(settings[name]),
                str(settings[revision]),
                ("",),
                f"evaluation.pick_score.{name}",
                INSTEAD,
            )
            for name, revision in (("model", "revision"), ("processor", "processor_revision"))
        )
        self.clip, self.batch = Clip(weights, prepared), int(settings["batch"])

    def about(self) -> str:
        """What judged, for a result file."""
        return f"PickScore {self.clip.weights}, float32"

    def self_test(self) -> None:
        """See `Clip.self_test`."""
        self.clip.self_test("evaluation.pick_score.model")

    @torch.inference_mode()
    def scores(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """exp(scale) · cosine of each picture and its prompt, which is cut to CLIP's length."""
        seen, said = self.clip.pictures(images), self.clip.texts(prompts, cut=True)
        return (self.clip.model.logit_scale.exp() * (seen * said).sum(-1)).tolist()

    def preferences(
        self, a: Sequence[Image.Image], b: Sequence[Image.Image], prompts: Sequence[str]
    ) -> list[float]:
        """The probability, 0 to 1, that picture A of each prompt is preferred to B."""
        of_a, of_b = self.scores(a, prompts), self.scores(b, prompts)
        pairs = torch.tensor([of_a, of_b], dtype=torch.float64)
        return pairs.softmax(0)[0].tolist()


def judge_folders(
    model: Path, baseline: Path, judge: PickScore, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Win rate of one evaluation folder over another of the same prompts, by PickScore.

    A picture is better when its probability is above one half; only equal scores are the same.

    Returns what `win_rate` does and judge, model, baseline, preference (the mean probability).

    Raises:
        UserError: the folders hold other prompts or pictures, or an unreadable one.
    """
    ours, theirs = read_folder(model), read_folder(baseline)
    _check_same(model, baseline, ours, theirs)
    progress = Progress(f"judging {model.name} against {baseline.name}", len(ours), "pairs")
    chances: list[float] = []
    for first in range(0, len(ours), judge.batch):
        part = slice(first, first + judge.batch)
        prompts = [sample.metadata["prompt"] for sample in ours[part]]
        a, b = ([sample.open() for sample in side[part]] for side in (ours, theirs))
        chances += judge.preferences(a, b, prompts)
        progress.at(len(chances))
    verdicts = [(chance > 0.5) - (chance < 0.5) for chance in chances]
    prompts, tags = ([s.metadata[key] for s in ours] for key in ("prompt", "tag"))
    return win_rate(verdicts, prompts, tags, settings) | {
        "judge": judge.about(),
        "model": model.name,
        "baseline": baseline.name,
        "preference": round(sum(chances) / len(chances), 4),
    }


def _check_same(model: Path, baseline: Path, ours: list[Sample], theirs: list[Sample]) -> None:
    """Refuse folders of other prompts or pictures, by the first name that differs."""
    sides = [{s.filename.rpartition(".")[0]: s for s in side} for side in (ours, theirs)]
    only = sorted(set(sides[0]) ^ set(sides[1]))
    if only:
        lacking = baseline if only[0] in sides[0] else model
        raise UserError(
            f"{len(only)} pictures are in one of the folders only ({lacking} lacks {only[0]}); "
            "draw them, so that every prompt counts alike."
        )
    for name, sample in sides[0].items():
        other = sides[1][name].metadata["prompt"]
        if sample.metadata["prompt"] != other:
            raise UserError(
                f"{name} asks for {sample.metadata['prompt']!r} in {model} and for {other!r} in "
                f"{baseline}; compare models that drew the same prompts."
            )
