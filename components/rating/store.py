"""Raters' answers in one SQLite file: every answer is kept, an undone one marked as withdrawn."""

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from components.errors import UserError
from components.rating.jobs import Item, Job, pending

SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (name TEXT PRIMARY KEY, kind TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS items (
    job TEXT NOT NULL, id TEXT NOT NULL, place INTEGER NOT NULL, facts TEXT NOT NULL,
    current INTEGER NOT NULL, PRIMARY KEY (job, id)
);
CREATE TABLE IF NOT EXISTS answers (
    number INTEGER PRIMARY KEY, job TEXT NOT NULL, item TEXT NOT NULL, rater TEXT NOT NULL,
    question TEXT NOT NULL, value TEXT NOT NULL, at TEXT NOT NULL, withdrawn TEXT
);
-- A double click, or a page open twice, is one answer.
CREATE UNIQUE INDEX IF NOT EXISTS one_answer ON answers (job, rater, item, question)
    WHERE withdrawn IS NULL;
-- The same line imported twice is one answer too.
CREATE UNIQUE INDEX IF NOT EXISTS one_moment ON answers (job, rater, item, question, at);
"""


@dataclass(frozen=True)
class Answer:
    """One answer as it is exported; `at` and `withdrawn` (or None) are UTC, ISO 8601."""

    job: str
    kind: str
    item: str
    place: int
    facts: dict[str, Any]
    rater: str
    question: str
    value: str
    at: str
    withdrawn: str | None


Given = dict[str, str]  # question → value, of one item and rater


def moment(at: datetime | None = None) -> str:
    """A time, by default now, as text that sorts like time."""
    return (at or datetime.now(UTC)).astimezone(UTC).isoformat(timespec="microseconds")


class Store:
    """The answers of any number of jobs. Threads and processes may share the file.

    Raises:
        UserError: the file is missing (unless `create`) or is no such store.
    """

    def __init__(self, path: Path, create: bool = False) -> None:
        self.path = Path(path)
        if create:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        elif not self.path.is_file():
            raise UserError(
                f"No ratings in {path}: `djepa rate labels` and `djepa rate pairs` make the file, "
                "by default ratings.sqlite beside the folder that is rated."
            )
        try:
            with self._open() as connection:
                connection.execute("PRAGMA journal_mode=WAL")
                connection.executescript(SCHEMA)
        except sqlite3.DatabaseError as error:
            if "full" in str(error):
                raise
            raise UserError(
                f"{path} cannot be used for ratings ({error}); name another file with --store."
            ) from None

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection of this request alone; what is written is kept when the block ends well."""
        with closing(sqlite3.connect(self.path, timeout=30)) as connection, connection:
            yield connection

    def register(self, job: Job) -> None:
        """Make the job's items the current ones; answers on other items of that job stay."""
        rows = [(job.name, x.id, i, json.dumps(x.facts), 1) for i, x in enumerate(job.items)]
        with self._open() as connection:
            connection.execute("INSERT OR IGNORE INTO jobs VALUES (?, ?)", (job.name, job.kind))
            connection.execute("UPDATE items SET current = 0 WHERE job = ?", (job.name,))
            connection.executemany("INSERT OR REPLACE INTO items VALUES (?, ?, ?, ?, ?)", rows)

    def given(self, job: str, rater: str) -> dict[str, Given]:
        """The rater's standing answers: item → question → value."""
        with self._open() as connection:
            return _given(
                connection.execute(
                    "SELECT item, question, value FROM answers "
                    "WHERE job = ? AND rater = ? AND withdrawn IS NULL",
                    (job, rater),
                )
            )

    def answer(self, job: Job, item: Item, rater: str, question: str, value: str) -> bool:
        """Keep an answer to the question that is next for the item; False when it is not."""
        with self._open() as connection:
            # Locked from the start: nothing may be undone between looking and writing.
            connection.execute("BEGIN IMMEDIATE")
            before = _given(
                connection.execute(
                    "SELECT item, question, value FROM answers "
                    "WHERE job = ? AND rater = ? AND item = ? AND withdrawn IS NULL",
                    (job.name, rater, item.id),
                )
            )
            if pending(job.kind, before.get(item.id, {})) != question:
                return False
            connection.execute(
                "INSERT INTO answers (job, item, rater, question, value, at) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (job.name, item.id, rater, question, value, moment()),
            )
            return True

    def undo(self, job: Job, rater: str) -> bool:
        """Withdraw the rater's last standing answer on a current item; False when none is left."""
        with self._open() as connection:
            changed = connection.execute(
                "UPDATE answers SET withdrawn = ? WHERE number = ("
                "SELECT number FROM answers JOIN items ON items.job = answers.job "
                "AND items.id = answers.item AND items.current "
                "WHERE answers.job = ? AND rater = ? AND withdrawn IS NULL "
                "ORDER BY at DESC, number DESC LIMIT 1)",
                (moment(), job.name, rater),
            ).rowcount
        return changed > 0

    def jobs(self) -> dict[str, str]:
        """Every job's kind by its name."""
        with self._open() as connection:
            return dict(connection.execute("SELECT name, kind FROM jobs ORDER BY name").fetchall())

    def answers(self, job: str) -> list[Answer]:
        """Every answer of a job, withdrawn ones and those on earlier pictures too, oldest first."""
        with self._open() as connection:
            rows = connection.execute(
                "SELECT answers.job, kind, item, place, facts, rater, question, value, at, "
                "withdrawn FROM answers JOIN jobs ON jobs.name = answers.job "
                "JOIN items ON items.job = answers.job AND items.id = answers.item "
                "WHERE answers.job = ? ORDER BY at, number",
                (job,),
            ).fetchall()
        names = [field.name for field in fields(Answer)]  # the columns, in their order
        named = [dict(zip(names, row, strict=True)) for row in rows]
        return [Answer(**row | {"facts": json.loads(row["facts"])}) for row in named]

    def standing(self, job: str) -> list[tuple[str, dict[str, Any], dict[str, Given]]]:
        """The current items in the job's order: id, facts, and rater → question → value."""
        with self._open() as connection:
            items = connection.execute(
                "SELECT id, facts FROM items WHERE job = ? AND current ORDER BY place", (job,)
            ).fetchall()
            rows = connection.execute(
                "SELECT item, rater, question, value FROM answers "
                "WHERE job = ? AND withdrawn IS NULL ORDER BY rater",
                (job,),
            ).fetchall()
        found: dict[str, dict[str, Given]] = {}
        for item, rater, question, value in rows:
            found.setdefault(item, {}).setdefault(rater, {})[question] = value
        return [(item, json.loads(facts), found.get(item, {})) for item, facts in items]

    def add(self, answers: Sequence[Answer]) -> int:
        """Add answers from elsewhere, and their jobs and items; what is here already stays.

        Returns how many were new. An item of a job that is here is not made a current one.
        """
        new = 0
        with self._open() as connection:
            known = {name for (name,) in connection.execute("SELECT name FROM jobs")}
            for a in answers:
                connection.execute("INSERT OR IGNORE INTO jobs VALUES (?, ?)", (a.job, a.kind))
                connection.execute(
                    "INSERT OR IGNORE INTO items VALUES (?, ?, ?, ?, ?)",
                    (a.job, a.item, a.place, json.dumps(a.facts), int(a.job not in known)),
                )
                new += connection.execute(
                    "INSERT OR IGNORE INTO answers "
                    "(job, item, rater, question, value, at, withdrawn) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (a.job, a.item, a.rater, a.question, a.value, a.at, a.withdrawn),
                ).rowcount
        return new


def _given(rows: sqlite3.Cursor) -> dict[str, Given]:
    found: dict[str, Given] = {}
    for item, question, value in rows:
        found.setdefault(item, {})[question] = value
    return found
