"""The held-out set: combinations that no training scene shows."""

import itertools
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from components.errors import UserError
from components.evaluation.geneval import relative_position
from components.scenes.tasks import OPPOSITE, Metadata

Box = tuple[float, float, float, float]


def _choose(
    items: Sequence[tuple[Hashable, ...]], share: float, rng: np.random.Generator, name: str
) -> frozenset[tuple[Hashable, ...]]:
    """`share` of the items, their parts taken as evenly as can be, so that none runs out."""
    if not 0 <= share < 1:
        raise UserError(f"data.held_out.{name} is {share}: give a share from 0 to below 1.")
    order = [items[int(i)] for i in rng.permutation(len(items))]
    used: Counter[tuple[int, Hashable]] = Counter()
    chosen: set[tuple[Hashable, ...]] = set()
    for _ in range(round(share * len(items))):
        best = min((i for i in order if i not in chosen), key=lambda i: _worst(used, i))
        chosen.add(best)
        used.update(enumerate(best))
    return frozenset(chosen)


def _worst(used: Mapping[tuple[int, Hashable], int], item: Iterable[Hashable]) -> tuple[int, int]:
    counts = [used[part] for part in enumerate(item)]
    return max(counts), sum(counts)


@dataclass(frozen=True)
class HeldOut:
    """Four sets. Pairs are unordered; `(a, b, relation)` has a before b in the alphabet."""

    color_shape: frozenset[Any]
    pair: frozenset[Any]
    pair_relation: frozenset[Any]
    shape_count: frozenset[Any]

    @classmethod
    def choose(
        cls,
        shapes: Sequence[str],
        colors: Sequence[str],
        counts: Sequence[int],
        relations: Sequence[str],
        shares: Mapping[str, Any],
    ) -> "HeldOut":
        """Choose by `shares["seed"]` alone, independent of any other random number.

        `shares["also"]`, if given: other worlds' shapes, colours, counts, relations and held_out.
        What they hold out is held out here too, so that this world's models are scored on
        theirs by combinations that neither was trained on.

        Raises:
            UserError: a share outside 0…1, or an atomic notion that would never be seen.
        """
        rng = np.random.default_rng(int(shares["seed"]))
        color_shape = _choose(
            list(itertools.product(colors, shapes)),
            float(shares["color_shape"]),
            rng,
            "color_shape",
        )
        pairs = [tuple(sorted(pair)) for pair in itertools.combinations(shapes, 2)]
        # Both orders count as uses of a shape, so choose among rotations of the whole list.
        pair = _choose_pairs(pairs, float(shares["pair"]), rng)
        rest = [(a, b, r) for a, b in pairs if (a, b) not in pair for r in relations]
        pair_relation = _choose(rest, float(shares["pair_relation"]), rng, "pair_relation")
        shape_count = _choose(
            list(itertools.product(shapes, counts)),
            float(shares["shape_count"]),
            rng,
            "shape_count",
        )
        held_out = cls(color_shape, pair, pair_relation, shape_count)
        for other in shares.get("also", ()):
            held_out = held_out | cls.choose(
                other["shapes"],
                other["colors"],
                other["counts"],
                other["relations"],
                other["held_out"],
            )
        held_out.check(shapes, colors, counts, relations, pairs)
        return held_out

    def __or__(self, other: "HeldOut") -> "HeldOut":
        return HeldOut(
            self.color_shape | other.color_shape,
            self.pair | other.pair,
            self.pair_relation | other.pair_relation,
            self.shape_count | other.shape_count,
        )

    def check(
        self,
        shapes: Sequence[str],
        colors: Sequence[str],
        counts: Sequence[int],
        relations: Sequence[str],
        pairs: Sequence[tuple[str, ...]],
    ) -> None:
        """Raise UserError where an atomic notion would never be seen."""
        seen_pairs = [p for p in pairs if p not in self.pair]
        starved = [
            *(s for s in shapes if all((c, s) in self.color_shape for c in colors)),
            *(c for c in colors if all((c, s) in self.color_shape for s in shapes)),
            *(s for s in shapes if all((s, n) in self.shape_count for n in counts)),
            *(n for n in counts if all((s, n) in self.shape_count for s in shapes)),
            *(s for s in shapes if len(shapes) > 1 and not any(s in p for p in seen_pairs)),
            *(
                r
                for r in relations
                if seen_pairs and all((*p, r) in self.pair_relation for p in seen_pairs)
            ),
            *(
                p
                for p in seen_pairs
                if relations and all((*p, r) in self.pair_relation for r in relations)
            ),
        ]
        if starved:
            raise UserError(
                f"data.held_out leaves no training scene for: {', '.join(map(str, starved))}; "
                "give smaller shares in params/data."
            )

    def _relation(self, a: str, relation: str, b: str) -> bool:
        if a > b:
            a, b, relation = b, a, OPPOSITE[relation]
        return (a, b, relation) in self.pair_relation

    def prompt(self, metadata: Metadata) -> bool:
        """Whether a prompt asks for a held-out combination."""
        clauses = metadata["include"]
        for clause in clauses:
            if (clause.get("color"), clause["class"]) in self.color_shape:
                return True
            if (clause["class"], clause["count"]) in self.shape_count:
                return True
            if "position" in clause:
                relation, index = clause["position"]
                if self._relation(clause["class"], relation, clauses[index]["class"]):
                    return True
        names = [clause["class"] for clause in clauses]
        return any(tuple(sorted(p)) in self.pair for p in itertools.combinations(names, 2))

    def scene(self, objects: Sequence[tuple[str, str, Box]]) -> bool:
        """Whether objects (shape, colour, box), captioned or not, form a held-out combination."""
        if any((color, shape) in self.color_shape for shape, color, _ in objects):
            return True
        counts = Counter(shape for shape, _, _ in objects)
        if any((shape, n) in self.shape_count for shape, n in counts.items()):
            return True
        for (a, _, box_a), (b, _, box_b) in itertools.combinations(objects, 2):
            if a == b:
                continue
            if tuple(sorted((a, b))) in self.pair:
                return True
            if any(self._relation(a, r, b) for r in relative_position(box_a, box_b)):
                return True
        return False


def _choose_pairs(
    pairs: Sequence[tuple[str, ...]], share: float, rng: np.random.Generator
) -> frozenset[Any]:
    """As `_choose`, but a shape counts as used wherever it stands in the pair."""
    if not 0 <= share < 1:
        raise UserError(f"data.held_out.pair is {share}: give a share from 0 to below 1.")
    order = [pairs[int(i)] for i in rng.permutation(len(pairs))]
    used: Counter[str] = Counter()
    chosen: set[tuple[str, ...]] = set()
    for _ in range(round(share * len(pairs))):
        best = min(
            (p for p in order if p not in chosen),
            key=lambda p: (max(used[s] for s in p), sum(used[s] for s in p)),
        )
        chosen.add(best)
        used.update(best)
    return frozenset(chosen)
