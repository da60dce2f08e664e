"""GenEval's six tasks: official prompt wording and metadata (GenEval's prompt generator).

A prompt is a dict, one line of an official `metadata.jsonl`:
`{"tag", "include": [{"class", "count"[, "color"][, "position": [relation, index]]}],
["exclude": [{"class", "count"}],] "prompt"}`.
"""

from typing import Any

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NUMBER_WORDS = {2: "two", 3: "three", 4: "four"}
# GenEval's ten colours; a world uses some of them.
OFFICIAL_COLORS = (
    "red orange yellow green blue purple pink brown black white".split()  # noqa: SIM905
)

Metadata = dict[str, Any]


def with_article(noun: str) -> str:
    """`a circle`, `an orange circle`."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    """The official rule: `es` after a final s, else `s`."""
    return noun + ("es" if noun.endswith("s") else "s")


def single_object(a: str) -> Metadata:
    """`a photo of a A`."""
    return {
        "tag": "single_object",
        "include": [{"class": a, "count": 1}],
        "prompt": f"a photo of {with_article(a)}",
    }


def two_object(a: str, b: str) -> Metadata:
    """`a photo of a A and a B`."""
    return {
        "tag": "two_object",
        "include": [{"class": a, "count": 1}, {"class": b, "count": 1}],
        "prompt": f"a photo of {with_article(a)} and {with_article(b)}",
    }


def counting(a: str, count: int) -> Metadata:
    """`a photo of three As`; more than asked for is wrong too."""
    return {
        "tag": "counting",
        "include": [{"class": a, "count": count}],
        "exclude": [{"class": a, "count": count + 1}],
        "prompt": f"a photo of {NUMBER_WORDS[count]} {plural(a)}",
    }


def colors(a: str, color: str) -> Metadata:
    """`a photo of a C A`."""
    return {
        "tag": "colors",
        "include": [{"class": a, "count": 1, "color": color}],
        "prompt": f"a photo of {with_article(f'{color} {a}')}",
    }


def position(a: str, relation: str, b: str) -> Metadata:
    """`a photo of a A RELATION a B`; as officially, include[0] is B and include[1] is A."""
    return {
        "tag": "position",
        "include": [
            {"class": b, "count": 1},
            {"class": a, "count": 1, "position": [relation, 0]},
        ],
        "prompt": f"a photo of {with_article(a)} {relation} {with_article(b)}",
    }


def color_attr(a: str, color_a: str, b: str, color_b: str) -> Metadata:
    """`a photo of a C1 A and a C2 B`, C1 and C2 different."""
    return {
        "tag": "color_attr",
        "include": [
            {"class": a, "count": 1, "color": color_a},
            {"class": b, "count": 1, "color": color_b},
        ],
        "prompt": f"a photo of {with_article(f'{color_a} {a}')} "
        f"and {with_article(f'{color_b} {b}')}",
    }


def meaning(metadata: Metadata) -> tuple[Any, ...]:
    """What is asked for, the same for two wordings of one thing.

    `a circle and a square` = `a square and a circle`; `A left of B` = `B right of A`.
    """
    clauses = metadata["include"]
    placed = next((c for c in clauses if "position" in c), None)
    if placed is not None:
        a, b = placed["class"], clauses[placed["position"][1]]["class"]
        relation = placed["position"][0]
        if a > b:
            a, b, relation = b, a, OPPOSITE.get(relation, relation)
        return (metadata["tag"], a, relation, b)
    parts = sorted((c["class"], c["count"], c.get("color", "")) for c in clauses)
    return (metadata["tag"], *parts)
