"""Notions: the entity words and attribute words of a caption (paper, section 3 and supplement 8).

Attribute words come from lists in params, by kind (numeral, quantifier, colour, …), and may be
several words long; the longest match at a place wins. Entity words are the nouns among the
words that are left, in the singular. Part of speech and singular come from TextBlob, whose
lexicon lies in its package: nothing is downloaded, and a word has the same tag everywhere, its
most frequent one. Where that is not what captions mean (bear, VB), params say so (`tags`,
`singular`).
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from components.errors import UserError

# Not TextBlob's tokeniser: it takes quadratic time on a run of brackets.
TOKEN = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*|[^\w\s]")
ENTITY = "entity"
# The third person of a verb is spelt like a plural, and in captions is often one: crosses.
PLURALS = ("NNS", "NNPS", "VBZ")
DISTINCT = 65536  # words whose tags are remembered; a caption is not trusted to have few


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

    notions: the params of that name. `attributes` {kind: [word or phrase]} and `stop_words`,
    words or phrases that are no notion, must be there; the others may be left out:
    `compounds`, phrases that are one entity; `same` {word or phrase: the notion it counts as};
    `tags` {word: Penn Treebank tag}, `singular` {word: its singular} and `not_plural`, endings
    of words that are none, where TextBlob errs.
    Raises UserError for an entry that is not text: YAML reads a bare on, off or 2 as something
    else.
    """

    def __init__(self, notions: Mapping[str, Any]) -> None:
        # Imported here: TextBlob brings NLTK along and takes seconds.
        from textblob import Word
        from textblob.taggers import PatternTagger

        self._tagger, self._word = PatternTagger(), Word
        self._tags = dict(_texts("tags", notions.get("tags", {})))
        self._singular = dict(_texts("singular", notions.get("singular", {})))
        self._not_plural = tuple(w for w, _ in _texts("not_plural", notions.get("not_plural", ())))
        self._fold = lru_cache(DISTINCT)(self._read_word)
        self._phrases = self._read_phrases(notions)
        self._longest = max(map(len, self._phrases), default=1)

    def _read_phrases(self, notions: Mapping[str, Any]) -> dict[tuple[str, ...], Notion | None]:
        """Return what every phrase of the lists stands for; None: for nothing."""
        phrases: dict[tuple[str, ...], Notion | None] = {}
        for kind, words in notions["attributes"].items():
            for word, _ in _texts(f"attributes.{kind}", words):
                phrases.setdefault(self._key(word), Notion(word, kind))
        for word, _ in _texts("compounds", notions.get("compounds", ())):
            phrases.setdefault(self._key(word), Notion(word, ENTITY))
        for word, meant in _texts("same", notions.get("same", {})):
            phrases[self._key(word)] = phrases.get(self._key(meant)) or Notion(meant, ENTITY)
        for word, _ in _texts("stop_words", notions["stop_words"]):
            phrases.setdefault(self._key(word), None)
        return phrases

    def find(self, caption: str) -> list[Notion]:
        """Return the caption's notions in order, each once."""
        return list(dict.fromkeys(notion for _, _, notion in self.matches(caption)))

    def find_all(self, captions: Sequence[str]) -> list[list[Notion]]:
        """Return the notions of each caption, as `find` does."""
        return [self.find(caption) for caption in captions]

    def matches(self, caption: str) -> Iterator[tuple[int, int, Notion]]:
        """Yield first token, number of tokens and notion of each match, left to right.

        Punctuation marks are tokens of their own, so no phrase reaches across one.
        """
        words = [self._fold(token) for token in TOKEN.findall(caption.lower())]
        keys = [key for key, _ in words]
        at = 0
        while at < len(words):
            for length in range(min(self._longest, len(words) - at), 0, -1):
                phrase = tuple(keys[at : at + length])
                if phrase in self._phrases:
                    notion = self._phrases[phrase]
                    break
            else:
                length, (word, noun) = 1, words[at]
                notion = Notion(word, ENTITY) if noun else None
            if notion is not None:
                yield at, length, notion
            at += length

    def _key(self, phrase: str) -> tuple[str, ...]:
        return tuple(self._fold(token)[0] for token in TOKEN.findall(phrase.lower()))

    def _read_word(self, token: str) -> tuple[str, bool]:
        """Return a token in the singular, and whether it is a noun. Remembered (`_fold`)."""
        word = re.sub("['’]s$", "", token)
        if not any(letter.isalpha() for letter in word):
            return word, False
        tag = self._tags.get(word) or self._tagger.tag(word, tokenize=False)[0][1]
        one = self._singular.get(word, word)
        plural = tag in PLURALS and not word.endswith(self._not_plural)
        if plural and word not in self._singular:
            one = str(self._word(word).singularize())
        noun = tag.startswith("NN") or self._tags.get(one, "").startswith("NN")
        return one, noun and len(one) > 1


def _texts(name: str, entries: Iterable[Any] | Mapping[Any, Any]) -> Iterator[tuple[str, str]]:
    """Yield the entries of a list or mapping of the params as pairs, after a look at each."""
    pairs = entries.items() if isinstance(entries, Mapping) else ((e, e) for e in entries)
    for word, meant in pairs:
        for text in (word, meant):
            if not isinstance(text, str):
                raise UserError(
                    f"curation.notions.{name} holds {text!r}: put it in quotes in params/curation."
                )
        yield word, meant


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
    """Counts over captions: how often a notion, how often two together, sizes by source.

    Tables of parts of a set, merged in any order, are those of the whole. Sizes are counted in
    bins, side_bin px wide and aspect_bin of width / height, so memory goes with the number of
    notions, sources and bins, not of captions.
    """

    def __init__(self, notions: Sequence[Notion], side_bin: int, aspect_bin: float) -> None:
        self.notions = list(notions)
        self.widths = {"shorter_side": float(side_bin), "aspect": float(aspect_bin)}
        self.total = 0
        self.together = np.zeros((len(notions), len(notions)), np.int64)
        self.bins: Counter[tuple[str, str, int]] = Counter()  # source, quantity, number of bin

    def add(self, present: np.ndarray, rows: Iterable[tuple[str, int, int]]) -> None:
        """Add captions: present bool (n, notions); rows n of (source, width, height) in px."""
        self.total += len(present)
        whole = sparse.csr_array(present, dtype=np.int64)
        self.together += (whole.T @ whole).toarray()
        side, aspect = self.widths["shorter_side"], self.widths["aspect"]
        for source, width, height in rows:
            self.bins[source, "shorter_side", math.floor(min(width, height) / side)] += 1
            self.bins[source, "aspect", math.floor(width / height / aspect + 1e-9)] += 1

    def state(self) -> dict[str, Any]:
        """Return the counts as JSON holds them, without the zeros; `merge` takes them."""
        a, b = np.nonzero(np.triu(self.together))
        return {
            "notions": [[n.word, n.kind] for n in self.notions],
            "widths": self.widths,
            "total": self.total,
            "together": [a.tolist(), b.tolist(), self.together[a, b].tolist()],
            "bins": [[*place, count] for place, count in sorted(self.bins.items())],
        }

    def merge(self, state: Mapping[str, Any]) -> None:
        """Add the counts of `state()`; ValueError when its notions or bins are others."""
        notions = [Notion(word, kind) for word, kind in state["notions"]]
        if notions != self.notions or state["widths"] != self.widths:
            raise ValueError("only tables of the same notions and bins can be merged")
        self.total += state["total"]
        a, b, counts = (np.array(part, np.int64) for part in state["together"])
        apart = a != b
        self.together[a, b] += counts
        self.together[b[apart], a[apart]] += counts[apart]
        for source, quantity, number, count in state["bins"]:
            self.bins[source, quantity, number] += count

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

    def distributions(self) -> pd.DataFrame:
        """Columns source, quantity (shorter_side in px, aspect = width/height), low, count.

        low is the lower edge of a bin; bins without a picture are left out.
        """
        rows = [
            (source, quantity, round(number * self.widths[quantity], 6), count)
            for (source, quantity, number), count in sorted(self.bins.items())
        ]
        return pd.DataFrame(rows, columns=["source", "quantity", "low", "count"])

    def sources(self) -> dict[str, int]:
        """Pictures by source, in the order of the alphabet."""
        counts: Counter[str] = Counter()
        for (source, quantity, _), count in sorted(self.bins.items()):
            if quantity == "aspect":
                counts[source] += count
        return dict(counts)
