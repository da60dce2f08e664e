"""A prompt set for human preference: GenEval, T2I-CompBench, PickScore's and PartiPrompts.

The paper compares models on 532 prompts from these four (section 8) and does not say which. So
this draws a set of that kind: as many from each source, and in a source from each category (of
PartiPrompts from each challenge in it). The prompts themselves are users' own copies.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from components.errors import UserError
from components.evaluation.compbench import CATEGORIES, read_prompts
from components.evaluation.prompts import geneval_prompts

COUNT = 532  # prompts of the paper's protocol
SOURCES = ("geneval", "compbench", "pickscore", "parti")


@dataclass(frozen=True)
class Prompt:
    """A prompt with where it comes from; `kind` is PartiPrompts' challenge, else ""."""

    source: str
    category: str
    kind: str
    prompt: str

    def line(self) -> dict[str, Any]:
        """As a JSON line. With `tag` and `include` it is also a metadata line of GenEval's layout:
        `djepa draw geneval --prompts` draws it, and its pictures are rated and judged as others."""
        return {
            "tag": self.source if self.category == "" else f"{self.source}/{self.category}",
            "include": [],
            "prompt": self.prompt,
            "source": self.source,
            "category": self.category,
        } | ({"challenge": self.kind} if self.kind else {})


def preference_set(
    compbench: Path | None,
    pickscore: Path | None,
    parti: Path | None,
    count: int = COUNT,
    seed: int = 0,
) -> tuple[list[Prompt], list[str]]:
    """The prompts, by source and category, and what is missing, a sentence each.

    Args:
        compbench: folder of official files, color_val.txt, ….
        pickscore: Pick-a-Pic's prompts, a parquet file with `caption` or text, one a line.
        parti: PartiPrompts.tsv. GenEval's prompts are drawn as officially, from no file.
        count: prompts in all.
        seed: of the choice among a category's prompts; the same gives the same set.

    Raises:
        UserError: a source that is no such file, or fewer than `count` prompts in all.
    """
    missing = []
    pools = {"geneval": _geneval()}
    for name, file, read in (
        ("compbench", compbench, _compbench),
        ("pickscore", pickscore, _pickscore),
        ("parti", parti, _parti),
    ):
        if file is None:
            missing.append(f"The source {name} is missing: give it with --{name}.")
        else:
            pools[name] = read(file)
    if compbench is not None:
        there = {prompt.category for prompt in pools["compbench"]}
        absent = [name for name in CATEGORIES if name not in there]
        if absent:
            missing.append(f"{compbench} lacks {', '.join(f'{n}_val.txt' for n in absent)}.")
    unique, seen = [], set()
    for name in SOURCES:
        for prompt in pools.get(name, []):
            key = " ".join(prompt.prompt.casefold().split())
            if key not in seen:
                seen.add(key)
                unique.append(prompt)
    if len(unique) < count:
        raise UserError(
            f"The sources hold {len(unique)} different prompts, and the set is of {count}; "
            f"give more sources or a smaller --count. {' '.join(missing)}".rstrip()
        )
    rng = np.random.default_rng(seed)
    chosen = _drawn(unique, ("source", "category", "kind"), count, rng)
    got = {name: sum(p.source == name for p in chosen) for name in pools}
    share = count // len(pools)
    missing += [
        f"The source {name} has only {n} prompts of the {share} that are its share; the others "
        "give more."
        for name, n in got.items()
        if n < share
    ]
    return chosen, missing


def _drawn(
    pool: Sequence[Prompt], levels: Sequence[str], count: int, rng: np.random.Generator
) -> list[Prompt]:
    """`count` of the pool, as evenly as it goes over the first level's values, then the next's."""
    if not levels:
        return [pool[int(i)] for i in sorted(rng.permutation(len(pool))[:count])]
    groups: dict[str, list[Prompt]] = {}
    for prompt in pool:
        groups.setdefault(getattr(prompt, levels[0]), []).append(prompt)
    shares = even_shares({name: len(group) for name, group in groups.items()}, count)
    return [p for n, group in groups.items() for p in _drawn(group, levels[1:], shares[n], rng)]


def even_shares(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """How many of each group, `count` in all: equal, unless a group is too small for it.

    The earlier groups get one more where it does not divide.
    """
    shares = dict.fromkeys(sizes, 0)
    left = min(count, sum(sizes.values()))
    while left:
        open_groups = [name for name in sizes if shares[name] < sizes[name]]
        # Those that are open have as many as each other; a rest goes to the first of them.
        each = left // len(open_groups)
        for name in open_groups if each else open_groups[:left]:
            given = min(max(each, 1), sizes[name] - shares[name])
            shares[name] += given
            left -= given
    return shares


def _geneval() -> list[Prompt]:
    return [Prompt("geneval", str(m["tag"]), "", m["prompt"]) for m in geneval_prompts()]


def _compbench(folder: Path) -> list[Prompt]:
    if not folder.is_dir():
        raise UserError(f"No folder {folder} of T2I-CompBench's prompts, color_val.txt, ….")
    files = [(name, folder / f"{name}_val.txt") for name in CATEGORIES]
    prompts = [
        Prompt("compbench", name, "", text.strip())
        for name, file in files
        if file.is_file()
        for text in read_prompts(file)
    ]
    if not prompts:
        raise UserError(f"{folder} holds none of T2I-CompBench's files, such as color_val.txt.")
    return prompts


def _pickscore(file: Path) -> list[Prompt]:
    if file.suffix != ".parquet":
        return [Prompt("pickscore", "", "", text.strip()) for text in read_prompts(file)]
    import pyarrow.parquet as pq

    try:
        captions = pq.read_table(file, columns=["caption"])["caption"].to_pylist()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{file} cannot be read for its column caption ({error}).") from None
    found = [str(c).strip() for c in dict.fromkeys(captions) if c and str(c).strip()]
    return [Prompt("pickscore", "", "", " ".join(text.split())) for text in found]


def _parti(file: Path) -> list[Prompt]:
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            # Its prompts hold quotation marks that open no field.
            rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
        found = [
            Prompt("parti", row["Category"], row["Challenge"], row["Prompt"].strip())
            for row in rows
        ]
        if not found or any(None in (p.category, p.kind) or not p.prompt for p in found):
            raise ValueError("a row lacks prompt, category or challenge")
    except (OSError, ValueError, KeyError, AttributeError, csv.Error) as error:
        raise UserError(
            f"{file} cannot be read as PartiPrompts.tsv ({error!r}); it has the columns Prompt, "
            "Category and Challenge."
        ) from None
    return found
