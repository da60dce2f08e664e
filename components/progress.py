"""Progress as plain lines, readable in a terminal, a Prefect log and a file alike."""

import time


class Progress:
    """Prints `what: done/total unit, %, rate, time left` at most once every `every` seconds."""

    def __init__(self, what: str, total: int, unit: str = "items", every: float = 5.0) -> None:
        self.what, self.total, self.unit, self.every = what, total, unit, every
        self.started = self.printed = time.monotonic()
        self.first: int | None = None

    def at(self, done: int, note: str = "") -> None:
        """Say that `done` of the total are finished; `note` is put at the line's end."""
        if self.first is None:
            self.first = done
        now = time.monotonic()
        if now - self.printed < self.every and done < self.total:
            return
        self.printed = now
        rate = (done - self.first) / max(now - self.started, 1e-9)
        left = (
            f", {(self.total - done) / rate:.0f} s left" if rate > 0 and done < self.total else ""
        )
        share = 100 * done / max(self.total, 1)
        tail = f", {note}" if note else ""
        print(
            f"{self.what}: {done}/{self.total} {self.unit}, {share:.0f} %, "
            f"{rate:.1f} {self.unit}/s{left}{tail}",
            flush=True,
        )
