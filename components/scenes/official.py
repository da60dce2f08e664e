"""GenEval's official prompts in a world of GenEval's objects, and a held-out set made of them."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from components.errors import UserError
from components.scenes.heldout import HeldOut
from components.scenes.tasks import Metadata, meaning

Combination = tuple[Any, ...]


def official_prompts(
    objects: Collection[str],
    colors: Collection[str],
    counts: Collection[int],
    relations: Collection[str],
) -> list[Metadata]:
    """Those of the 553 official prompts that name only these, in the official order."""
    from components.evaluation.prompts import geneval_prompts

    def known(clause: Mapping[str, Any]) -> bool:
        return (
            clause["class"] in objects
            and clause.get("color", next(iter(colors))) in colors
            and (clause["count"] == 1 or clause["count"] in counts)
            and clause.get("position", [next(iter(relations))])[0] in relations
        )

    return [m for m in geneval_prompts() if all(known(c) for c in m["include"])]


def combination(metadata: Metadata) -> tuple[str, Combination] | None:
    """What must occur in no training scene for a prompt to be held out, and of which kind.

    Of two objects, with colours or without, the pair; of a position pair and relation; of a
    colour or a number it and its object. None: one object alone is no combination.
    """
    task, *parts = meaning(metadata)
    if task in ("two_object", "color_attr"):
        return "pair", tuple(sorted(part[0] for part in parts))
    if task == "position":
        a, relation, b = parts
        return "pair_relation", (a, b, relation)
    if task == "counting":
        return "shape_count", parts[0][:2]
    if task == "colors":
        return "color_shape", (parts[0][2], parts[0][0])
    return None


def hold_out(
    official: Sequence[Metadata],
    objects: Sequence[str],
    colors: Sequence[str],
    counts: Sequence[int],
    relations: Sequence[str],
    looks: Collection[Combination],
    settings: Mapping[str, Any],
) -> HeldOut:
    """Hold out the combinations that a share of the official prompts of each task ask for.

    Args:
        official: from `official_prompts`.
        objects, colors, counts, relations: of the world.
        looks: (colour, object) that things have of themselves, which cannot be held out.
        settings: `seed`, `official`: the share.

    Raises:
        UserError: a share outside 0…1, or so much held out that some object, colour, number or
            relation would never be seen.
    """
    share = float(settings["official"])
    if not 0 <= share <= 1:
        raise UserError(f"data.held_out.official is {share}: give a share from 0 to 1.")
    rng = np.random.default_rng(int(settings["seed"]))
    kinds: dict[str, set[Combination]] = {
        kind: set() for kind in ("color_shape", "pair", "pair_relation", "shape_count")
    }
    tasks = list(dict.fromkeys(m["tag"] for m in official))
    for task in tasks:
        asked = [combination(m) for m in official if m["tag"] == task]
        wanted = list(dict.fromkeys(c for c in asked if c is not None))
        for i in rng.permutation(len(wanted))[: round(share * len(wanted))]:
            kind, what = wanted[int(i)]
            if what in looks or (kind == "shape_count" and _last(what, counts, kinds[kind])):
                continue
            kinds[kind].add(what)
    held_out = HeldOut(**{kind: frozenset(chosen) for kind, chosen in kinds.items()})
    pairs = sorted(tuple(sorted((a, b))) for a in objects for b in objects if a < b)
    held_out.check(objects, colors, counts, relations, pairs)
    return held_out


def _last(what: Combination, counts: Sequence[int], held: Collection[Combination]) -> bool:
    """Whether an object would be left without any number."""
    return all((what[0], n) in held or n == what[1] for n in counts)
