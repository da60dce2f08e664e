"""What each number of params.yaml may be, so that a wrong one is refused before a stage starts.

What only a stage can judge (a rung that no picture reaches, say) is refused by that stage.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import inf, isfinite
from typing import Any

from components.errors import UserError
from components.feedback.targets import check_targets
from components.tokens.attributes import KINDS


@dataclass(frozen=True)
class Limit:
    """Numbers from `least` to `most`; `above`: `least` itself is none of them; `whole`: 1, 2, 3."""

    words: str
    least: float
    most: float = inf
    whole: bool = False
    above: bool = False

    def allows(self, value: Any) -> bool:
        """Whether `value` is such a number."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
            return False
        if self.whole and value != int(value):
            return False
        return self.least <= value <= self.most and not (self.above and value == self.least)


COUNT = Limit("a whole number from 1 on", 1, whole=True)
NATURAL = Limit("a whole number from 0 on", 0, whole=True)
SHARE = Limit("a number from 0 to 1", 0, 1)
POSITIVE = Limit("a number above 0", 0, above=True)
PART = Limit("a number above 0, at most 1", 0, 1, above=True)

PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # a file's name without its ending
TAKEN = ("phase1", "dpo", "beside", "none")  # parts of stages' names and of choices

# Names as in params.yaml, `*` for any part of one.
LIMITS: dict[str, Limit] = {
    "seed": NATURAL,
    "data.seed": NATURAL,
    "data.own_colors": SHARE,
    "data.mirrored": SHARE,
    "data.held_out.official": SHARE,
    "curation.seed": NATURAL,
    "curation.workers": COUNT,
    "curation.limits.picture_bytes": COUNT,
    "curation.limits.text_bytes": COUNT,
    "curation.limits.pixels": COUNT,
    "curation.limits.batch": COUNT,
    "curation.limits.shard": COUNT,
    "curation.caption.letters": NATURAL,
    "curation.resolution.shorter_side": NATURAL,
    "curation.aspect.ratio": Limit("a number from 1 on", 1),
    "curation.contrast.levels": Limit("a number from 0 on", 0),
    "curation.noise.levels": Limit("a number from 0 on", 0),
    "curation.sharpness.ratio": SHARE,
    "curation.duplicates.distance": NATURAL,
    "curation.duplicates.colour": Limit("a number from 0 on", 0),
    "curation.text.area": SHARE,
    "curation.nsfw.probability": SHARE,
    "curation.synthetic.share": SHARE,
    "curation.notions.least": COUNT,
    "curation.notions.entities": NATURAL,
    "curation.notions.side_bin": POSITIVE,
    "curation.notions.aspect_bin": POSITIVE,
    "curation.contract.rows": NATURAL,
    "curation.contract.tail": NATURAL,
    "evaluation.seed": NATURAL,
    "curation.aesthetic.threshold": Limit("a number", -inf),
    "curation.aesthetic.batch": COUNT,
    "curation.captions.max_new_tokens": COUNT,
    "curation.captions.tiles": COUNT,
    "curation.captions.batch": COUNT,
    "model.network.width": COUNT,
    "model.network.heads": COUNT,
    "model.network.*blocks": COUNT,
    "model.network.buffer_tokens": NATURAL,
    "model.network.head_width": COUNT,
    "model.network.mlp_ratio": POSITIVE,
    "model.network.reference_grid": POSITIVE,
    "model.network.rope_base": POSITIVE,
    "model.tokenizer.patch": COUNT,
    "model.tokenizer.channels": COUNT,
    "model.tokenizer.tile": COUNT,
    "model.text.length": COUNT,
    "model.text.width": COUNT,
    "model.encode.most_cropped": SHARE,
    "model.encode.batch_pixels": COUNT,
    "model.encode.captions": COUNT,
    "model.encode.decoded": NATURAL,
    "training.validation.pictures": NATURAL,
    "training.validation.most": SHARE,
    "training.validation.points": COUNT,
    "training.validation.times": COUNT,
    "training.validation.seed": NATURAL,
    "training.phase1.images": NATURAL,
    "training.phase2.images": COUNT,
    "training.phase*.batch": COUNT,
    "training.phase*.aspect.std": Limit("a number from 0 on", 0),
    "training.phase*.size.std": Limit("a number from 0 on", 0),
    "training.phase*.size.low": POSITIVE,
    "training.flow_samples": COUNT,
    "training.most_tokens": COUNT,
    "training.mask.low": SHARE,
    "training.mask.high": SHARE,
    "training.jepa_weight": Limit("a number from 0 on", 0),
    "training.jepa_beta": POSITIVE,
    "training.text_drop": SHARE,
    "training.workers": COUNT,
    "training.accumulate": COUNT,
    "training.clip": POSITIVE,
    "training.optimizer.*_rate": POSITIVE,
    "feedback.discard": SHARE,
    "feedback.most_dropped": SHARE,
    "feedback.tolerance": SHARE,
    "feedback.references.prompts": COUNT,
    "feedback.references.images": COUNT,
    "feedback.references.retrieved": COUNT,
    "feedback.people.least": COUNT,
    "feedback.people.hours": POSITIVE,
    "feedback.people.every": COUNT,
    "feedback.references.among": COUNT,
    "feedback.simulated_rater.*": SHARE,
    "feedback.critic_training.size": COUNT,
    "feedback.critic_training.epochs": COUNT,
    "feedback.critic_training.batch": COUNT,
    "feedback.critic_training.lr": POSITIVE,
    "feedback.workers": COUNT,
    "feedback.critic_training.folds": Limit("a whole number from 2 on", 2, whole=True),
    "dpo.prompts": COUNT,
    "dpo.images": COUNT,
    "dpo.each": COUNT,
    "dpo.held_out": SHARE,
    "dpo.realism_margin": SHARE,
    "dpo.beta": POSITIVE,
    "dpo.lr": POSITIVE,
    "dpo.warmup": COUNT,
    "dpo.least_pairs": NATURAL,
    "dpo.bootstrap": COUNT,
    "dpo.enough": POSITIVE,
    "dpo.patience": COUNT,
    "dpo.winner_rise": POSITIVE,
    "dpo.pairs.most": COUNT,
    "dpo.lora.rank": COUNT,
    "dpo.lora.alpha": POSITIVE,
    "dpo.steps": COUNT,
    "dpo.batch": COUNT,
    "dpo.check_every": COUNT,
    "dpo.check_draws": COUNT,
    "evaluation.pictures": COUNT,
    "evaluation.images": COUNT,
    "evaluation.batch_size": COUNT,
    "evaluation.sampler.*steps": COUNT,
    "evaluation.sampler.temperature": Limit("a number from 0 on", 0),
    "evaluation.sampler.time_shift": POSITIVE,
    "evaluation.sampler.annealing": PART,
    "evaluation.sampler.guided_share": PART,
    "evaluation.other_prompts": NATURAL,
    "evaluation.bootstrap": COUNT,
    "evaluation.grid.*": COUNT,
    "evaluation.detector.*": POSITIVE,
    "evaluation.colors.batch": COUNT,
    "evaluation.blip_vqa.size": COUNT,
    "evaluation.blip_vqa.batch": COUNT,
    "evaluation.clip_score.batch": COUNT,
    "evaluation.pick_score.batch": COUNT,
    "operation.keep_days": Limit("a number from 0 on", 0),
    "operation.quiet_minutes": Limit("a number from 0 on", 0),
}


# Names of what can be chosen; what a stage alone knows the names of is refused by that stage.
CHOICES: dict[str, tuple[Any, ...]] = {
    "training.sharding": ("replicate", "shard"),
    "training.precision": ("float32", "bfloat16"),
    "training.checkpointing": ("none", "blocks"),
    "training.compile": (True, False),
    "training.optimizer.kind": ("muon", "adamw"),
    "training.batches": ("grouped", "packed"),
    "training.time.distribution": ("uniform", "logit_normal"),
    "training.schedule.shape": ("linear", "cosine"),
    "data.encode": ("cached", "online"),
    "data.glyphs": ("shapes", "openmoji"),
    "curation.captions.write": ("never", "missing", "all"),
    "evaluation.sampler.solver": ("euler", "midpoint", "adams"),
    "evaluation.sampler.order": ("random", "spread"),
    "dpo.pairs.source": ("judge", "raters", "quality", "pickapic"),
    "dpo.adapter": ("none", "lora"),
    "model.network.kind": ("djepa", "flow_dit"),
    "model.network.positions": ("vope", "rope", "ntk_rope"),
    "model.tokenizer.kind": ("patches", "sd3"),
    "model.text.kind": ("words", "minilm", "t5"),
    "model.text.precision": ("float32", "bfloat16"),
}


def numbers(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The tree's leaves by dotted name."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= numbers(value, f"{prefix}{name}.")
        else:
            leaves[f"{prefix}{name}"] = value
    return leaves


def check(params: Mapping[str, Any]) -> None:
    """Refuse parameters that cannot be meant.

    Args:
        params: the whole of params.yaml.

    Raises:
        UserError: a number outside its limit, a choice that there is none of, two that exclude each
            other, or a round or model named that there is none of.
    """
    for name, value in numbers(params).items():
        for pattern, limit in LIMITS.items():
            if fnmatchcase(name, pattern) and not limit.allows(value):
                raise UserError(
                    f"{name} is {value!r}: set it to {limit.words}, in params/ or with "
                    f"`djepa compose {name}=VALUE`."
                )
        if name in CHOICES and value not in CHOICES[name]:
            known = " or ".join(str(choice).lower() for choice in CHOICES[name])
            raise UserError(
                f"{name} is {value!r}: set it to {known}, in params/ or with "
                f"`djepa compose {name}=VALUE`."
            )
    training = params["training"]
    if training["sharding"] == "shard" and training["optimizer"]["kind"] == "muon":
        raise UserError(
            "training.sharding is shard and training.optimizer.kind is muon, which needs whole "
            "matrices: set training.optimizer.kind=adamw, or training.sharding=replicate."
        )
    if not training["phase1"]["images"] and params["init"]["model"] == "none":
        raise UserError(
            "training.phase1.images is 0, and with init=none phase 1 has nothing to go on from: "
            "set it to a whole number from 1 on, or `djepa compose init=starter`."
        )
    check_targets(params["feedback"]["targets"], KINDS)
    _check_rounds(params)
    _check_beside(params)


def _check_beside(params: Mapping[str, Any]) -> None:
    trained = {*TAKEN, *params["feedback"]["rounds"]}
    for name, line in params["evaluation"]["beside"].items():
        place = f"evaluation.beside.{name}"
        if not PLAIN.fullmatch(str(name)) or name in trained:
            raise UserError(
                f"{place} has the name of a model that is trained here, or is none: choose another "
                "of letters, digits, - and _, in params/."
            )
        if not isinstance(line, Mapping) or set(line) != {"model"}:
            raise UserError(f"{place} is {line!r}: give it `model`, a folder, in params/.")


def _check_rounds(params: Mapping[str, Any]) -> None:
    models, critics = ["phase1", "dpo"], ["none"]
    choices: list[tuple[str, Any, list[str]]] = []
    for key, line in params["feedback"]["rounds"].items():
        place = f"feedback.rounds.{key}"
        # It is part of names of stages, folders and parameters.
        if not (isinstance(key, str) and PLAIN.fullmatch(key)) or key in TAKEN:
            raise UserError(
                f"{place}: {key!r} is no name of a round: name it in params/ with letters, digits, "
                f"- and _, and none of {', '.join(TAKEN)}, by habit r{len(models) - 1}."
            )
        if not isinstance(line, Mapping) or not {"model", "critic", "labels"} <= set(line):
            raise UserError(f"{place} is {line!r}: give it model, critic and labels in params/.")
        if not (isinstance(line["labels"], str) and PLAIN.fullmatch(line["labels"])):
            raise UserError(
                f"{place}.labels is {line['labels']!r}: set it to auto, simulated, or the name of "
                f"people's labels (letters, digits, - and _), by habit {key} for "
                f"labels/{key}.jsonl, in params/."
            )
        unknown = set(line.get("phase2", {})) - set(params["training"]["phase2"])
        if unknown:
            raise UserError(
                f"{place}.phase2 has {', '.join(sorted(unknown))}, which training.phase2 has not; "
                "correct it in params/."
            )
        choices += [
            (f"{place}.model", line["model"], list(models)),
            (f"{place}.critic", line["critic"], list(critics)),
        ]
        models.append(key)
        critics.append(key)
    choices += [
        ("dpo.from", params["dpo"]["from"], [name for name in models if name != "dpo"]),
        ("evaluation.baseline", params["evaluation"]["baseline"], models),
    ]
    for name, value, known in choices:
        if value not in known:
            raise UserError(
                f"{name} is {value!r}: set it to {' or '.join(known)}, in params/ or with "
                f"`djepa compose {name}=VALUE`."
            )
