"""Notions: the entity words and attribute words of a caption (paper, section 3 and supplement 8).

Attribute words come from lists in params, by kind (numeral, quantifier, colour, …), and may be
several words long; the longest match at a place wins. Entity words are what is left: the
caption's content words, neither attribute nor stop word, folded to the singular and frequent
enough. No tagger comes with the packages at hand, so a verb or an adjective that no list
names counts as an entity too; the stop list is where to put it.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*|\d+")
ENTITY = "entity"


def singular(word: str) -> str:
    """Fold an English plural to the singular by its ending: circles, crosses, cherries."""
    if re.search(r"(ss|x|ch|sh|zz)es$", word):
        return word[:-2]
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith("s") and len(word) > 3 and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def tokens(caption: str) -> list[str]:
    """Split into lower-case words, each folded to the singular."""
    return [singular(word) for word in WORD.findall(caption.lower())]


def column(word: str) -> str:
    """Return the manifest column of a notion: `notion_` and letters, digits, underscores."""
    return "notion_" + re.sub(r"\W+", "_", word.lower()).strip("_")


@dataclass(frozen=True)
class Notion:
    """A word or phrase, as it is written in params or found, and its kind."""

    word: str
    kind: str


class NotionFinder:
    """Finds notions in captions by longest match.

    notions: the params of that name: `attributes` {kind: [word or phrase]}, `stop_words`.
    """

    def __init__(self, notions: Mapping[str, Any]) -> None:
        self.phrases: dict[tuple[str, ...], Notion] = {}
        for kind, words in notions["attributes"].items():
            for word in words:
                self.phrases.setdefault(tuple(tokens(word)), Notion(word, kind))
        self.longest = max((len(p) for p in self.phrases), default=1)
        self.stop = {w for words in notions["stop_words"] for w in tokens(words)}

    def find(self, caption: str) -> list[Notion]:
        """Return the caption's notions in order, each once; entities are content words."""
        words, at = tokens(caption), 0
        found: dict[Notion, None] = {}
        while at < len(words):
            for length in range(min(self.longest, len(words) - at), 0, -1):
                notion = self.phrases.get(tuple(words[at : at + length]))
                if notion is not None:
                    break
            else:
                length, word = 1, words[at]
                known = word not in self.stop and len(word) > 1 and not word.isdigit()
                notion = Notion(word, ENTITY) if known else None
            if notion is not None:
                found[notion] = None
            at += length
        return list(found)


def choose(counts: Mapping[Notion, int], least: int, entities: int) -> list[Notion]:
    """Return the notions that get a column: seen in at least `least` captions.

    At most `entities` entity words, the most frequent ones; order: kind of the lists first,
    then falling frequency, then the alphabet. Notions whose columns would have the same name
    share one: the first stays.
    """
    often = [n for n, count in counts.items() if count >= least]
    often.sort(key=lambda n: (n.kind == ENTITY, n.kind, -counts[n], n.word))
    taken: dict[str, Notion] = {}
    room = entities
    for notion in often:
        if notion.kind == ENTITY:
            if room <= 0:
                continue
            room -= 1
        taken.setdefault(column(notion.word), notion)
    return list(taken.values())


class NotionTables:
    """Counts over captions: how often a notion, how often two together, sizes by source."""

    def __init__(self, notions: Sequence[Notion]) -> None:
        self.notions = list(notions)
        self.total = 0
        self.together = np.zeros((len(notions), len(notions)), np.int64)
        self.sizes: Counter[tuple[str, int, int]] = Counter()

    def add(self, present: np.ndarray, sizes: Iterable[tuple[str, int, int]]) -> None:
        """Add captions: present bool (n, notions); sizes (source, width, height) in px."""
        self.total += len(present)
        whole = present.astype(np.int64)
        self.together += whole.T @ whole
        self.sizes.update(sizes)

    def frequencies(self) -> pd.DataFrame:
        """Columns notion, column, kind, count (captions), share (of all captions)."""
        counts = self.together.diagonal()
        return pd.DataFrame(
            {
                "notion": [n.word for n in self.notions],
                "column": [column(n.word) for n in self.notions],
                "kind": [n.kind for n in self.notions],
                "count": counts,
                "share": counts / max(self.total, 1),
            }
        )

    def cooccurrence(self) -> pd.DataFrame:
        """Columns notion_a, notion_b, count: the pairs that occur together, each once."""
        a, b = np.nonzero(np.triu(self.together, 1))
        words = np.array([n.word for n in self.notions], object)
        return pd.DataFrame(
            {"notion_a": words[a], "notion_b": words[b], "count": self.together[a, b]}
        )

    def distributions(self, side_bin: int, aspect_bin: float) -> pd.DataFrame:
        """Columns source, quantity (shorter_side in px, aspect = width/height), low, count."""
        bins: Counter[tuple[str, str, float]] = Counter()
        for (source, width, height), count in self.sizes.items():
            bins[source, "shorter_side", float(min(width, height) // side_bin * side_bin)] += count
            low = round(np.floor(width / height / aspect_bin + 1e-9) * aspect_bin, 6)
            bins[source, "aspect", float(low)] += count
        rows = [(*place, bins[place]) for place in sorted(bins)]
        return pd.DataFrame(rows, columns=["source", "quantity", "low", "count"])
