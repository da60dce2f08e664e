"""People's labels of a round that are still being given: how many, and what is made of them."""

import json
from pathlib import Path

from components.files import atomic_file
from components.rating.exchange import export, labels
from components.rating.jobs import label_job
from components.rating.store import Store


class Labelling:
    """The labels of one reference set, as raters give them."""

    def __init__(self, references: Path, out: Path, least: int) -> None:
        """`references`: a folder such as references/r2; `out`: the file that the critic reads.

        At least `least` pictures are wanted, or all where there are fewer. Raters may begin
        before or after this is made. Raises UserError when there are no reference pictures.
        """
        job = label_job(references)
        self.references, self.out, self.name = references, out, job.name
        self.store = Store(references.parent / "ratings.sqlite", create=True)
        # Labels of pictures that were drawn before these are not counted.
        self.store.register(job)
        self.least = min(least, len(job.items))

    def done(self) -> int:
        """How many pictures somebody has finished."""
        return len(labels(self.store, self.name))

    def take(self) -> str:
        """Write what people said so far; returns a sentence on it. UserError if it is nothing."""
        return export(self.store, self.out, self.name, False)

    def give_up(self, why: str) -> str:
        """Have the critic take the automatic labels and say why; returns a sentence on it."""
        with atomic_file(self.out) as temporary:
            temporary.write_text(json.dumps({"fallback": "auto", "why": why}) + "\n")
        return f"{self.out}: automatic labels are used ({why}); remove the file to ask people again"

    def how(self) -> str:
        """The command that opens the page, for people to read."""
        return f"djepa rate labels {self.references}"
