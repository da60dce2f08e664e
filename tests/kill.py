"""A training run that dies between two steps, as from a signal."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from components.training import phases


class Kill(BaseException):
    """Stands for a signal: nothing in the program catches it."""


@contextmanager
def killed_after(saves: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, training dies once it has written so many snapshots."""
    save, seen = phases.Snapshots.save, []

    def save_and_die(self, training):
        save(self, training)
        seen.append(training.step)
        if len(seen) == saves:
            raise Kill

    with monkeypatch.context() as patch:
        patch.setattr(phases.Snapshots, "save", save_and_die)
        with pytest.raises(Kill):
            yield
