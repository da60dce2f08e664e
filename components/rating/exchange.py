"""Ratings out of and into the store as JSON lines or CSV: verdicts, or every answer."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from components.errors import UserError
from components.files import atomic_file
from components.rating.jobs import KINDS, clean_name, facts_of, verdict
from components.rating.store import Answer, Store, moment

COLUMNS = [field.name for field in fields(Answer)]
SHOWN = 5  # bad lines that are named


def choose_job(store: Store, job: str | None) -> str:
    """The job that was asked for, or the only one. UserError where there is no such choice."""
    names = list(store.jobs())
    if job in names:
        return str(job)
    if job is None and len(names) == 1:
        return names[0]
    there = f"it has {', '.join(names)}" if names else "it has none yet"
    raise UserError(f"{store.path}: name one of its jobs with --job; {there}.")


def labels(store: Store, job: str) -> list[dict[str, Any]]:
    """A row a picture that anybody finished: file, label, item; what `labels/NAME.jsonl` holds.

    A picture is good when both logic and realism are, to more than half of those who rated it:
    of a tie the critic learns "not yet", and such samples stay in training.
    """
    rows = []
    for item, facts, raters in store.standing(job):
        said = [v[0] for given in raters.values() if (v := verdict("labels", given))]
        if said:
            good = 2 * said.count("good") > len(said)
            rows.append({"file": facts["file"], "label": good, "item": item})
    return rows


def pairs(store: Store, job: str) -> list[dict[str, Any]]:
    """A row a pair and rater: the pair's facts, rater, winner (A, B, same), question (decided)."""
    return [
        facts | {"rater": rater, "winner": found[0], "question": found[1]}
        for _, facts, raters in store.standing(job)
        for rater, given in raters.items()
        if (found := verdict("pairs", given))
    ]


def win_rate(rows: Iterable[Mapping[str, Any]]) -> str:
    """B's win rate against A as a sentence: (better + same / 2) / all (paper, human evaluation)."""
    rows = list(rows)
    if not rows:
        return "no pair is finished"
    better, same = (sum(row["winner"] == word for row in rows) for word in ("B", "same"))
    rate = (better + 0.5 * same) / len(rows)
    return (
        f"{rows[0]['b']} against {rows[0]['a']}: win rate {100 * rate:.1f} % "
        f"(better {better}, same {same}, worse {len(rows) - better - same})"
    )


def export(store: Store, out: Path, job: str | None, every_answer: bool) -> str:
    """Write a job's verdicts, or every answer, to X.jsonl or X.csv; returns a sentence on them.

    Raises:
        UserError: another ending, no such job, or nothing to write yet.
    """
    name = choose_job(store, job)
    kind, note = store.jobs()[name], ""
    if every_answer:
        rows = [asdict(answer) for answer in store.answers(name)]
    elif kind == "labels":
        rows = labels(store, name)
        note = f", {sum(row['label'] for row in rows)} of them good"
    else:
        rows = pairs(store, name)
        note = f"; {win_rate(rows)}"
    if not rows:
        raise UserError(f"{store.path}: nobody has finished an item of {name} yet; rate some.")
    if out.suffix not in (".jsonl", ".csv"):
        raise UserError(f"{out}: end the name in .jsonl or .csv.")
    buffer = io.StringIO(newline="")
    if out.suffix == ".jsonl":
        buffer.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        writer = csv.DictWriter(buffer, list(rows[0]))
        writer.writeheader()
        for row in rows:
            facts = {"facts": json.dumps(row["facts"])} if "facts" in row else {}
            writer.writerow(row | facts)
    with atomic_file(out) as temporary:
        temporary.write_text(buffer.getvalue(), encoding="utf-8", newline="")
    return f"{out}: {len(rows)} lines of {name}{note}"


def bring_in(store: Store, file: Path) -> str:
    """Add the answers that `export` wrote with every answer; returns a sentence on them.

    Raises:
        UserError: the file cannot be read, or lines are no answers: those are named, and all
            others are in the store.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from None
    good, bad = [], []
    for number, line in _lines(content, file.suffix):
        try:
            good.append(_answer(line))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            bad.append(f"line {number}: {error!r}")
    new = store.add(sorted(good, key=lambda answer: answer.at))
    sentence = f"{new} new answers, {len(good) - new} were here already"
    if bad:
        more = ", …" if len(bad) > SHOWN else ""
        raise UserError(
            f"{file}: {len(bad)} lines are no answers ({'; '.join(bad[:SHOWN])}{more}); the others "
            f"are imported ({sentence}); correct these, or export with --answers, and import again."
        )
    return f"{file}: {sentence}"


def _lines(content: bytes, suffix: str) -> Iterator[tuple[int, Any]]:
    """Line number and what stands there: text of JSON, or a CSV's row as a dictionary."""
    if suffix == ".csv":
        reader = csv.DictReader(io.StringIO(content.decode("utf-8", "replace"), newline=""))
        while True:
            try:
                row = next(reader, None)
            except csv.Error:
                row = {}  # no line of CSV: lacks everything
            if row is None:
                return
            # An empty field of CSV is None; only `withdrawn` may be empty.
            yield reader.line_num, {k: row.get(k) or None for k in COLUMNS}
    else:
        for number, line in enumerate(content.split(b"\n"), 1):
            if line.strip():
                yield number, line


def _answer(line: Any) -> Answer:
    """An answer out of JSON or a CSV's row; ValueError, KeyError or TypeError where it is none."""
    row = line if isinstance(line, dict) else json.loads(line)
    kind, question, value = (str(row[name]) for name in ("kind", "question", "value"))
    if kind not in KINDS:
        raise ValueError(f"no kind {kind!r}")
    if question not in KINDS[kind].questions or value not in KINDS[kind].values:
        raise ValueError(f"{kind} have no answer {value!r} to {question!r}")
    for name in ("job", "item"):
        if not isinstance(row[name], str) or not row[name].isprintable():
            raise ValueError(f"{name} {row[name]!r}")
    if not row["job"].startswith(f"{kind}/"):
        raise ValueError(f"{row['job']} is of another kind than {kind}")
    place = int(row["place"])
    if not 0 <= place < 2**31:
        raise ValueError(f"place {place}")
    if row["withdrawn"] is not None:
        row["withdrawn"] = _time(row["withdrawn"])
    return Answer(
        row["job"],
        kind,
        row["item"],
        place,
        facts_of(kind, row["facts"]),
        clean_name(row["rater"]),
        question,
        value,
        _time(row["at"]),
        row["withdrawn"],
    )


def _time(text: str) -> str:
    at = datetime.fromisoformat(text)
    if at.tzinfo is None:
        raise ValueError(f"{text} lacks its time zone")
    return moment(at)
