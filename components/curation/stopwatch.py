"""CPU seconds of the parts of a pass."""

import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

OTHER = "other"


class Stopwatch:
    """CPU seconds by name: `with watch("decode"): …`; other programs do not make them more."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.name, self.started = OTHER, 0.0
        self.began = time.process_time()

    def __call__(self, name: str) -> "Stopwatch":
        """Choose the name that the next `with` block's seconds go to."""
        self.name = name
        return self

    def __enter__(self) -> None:
        self.started = time.process_time()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._add(self.name, self.started)

    def _add(self, name: str, started: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - started

    def over(self, name: str, items: Iterator[Any]) -> Iterator[Any]:
        """Pass items on and time how long they take to come."""
        while True:
            started = time.process_time()
            item = next(items, None)
            self._add(name, started)
            if item is None:
                return
            yield item

    def stop(self, rest: str = OTHER) -> dict[str, float]:
        """The seconds by name; what no name accounts for goes to `rest`."""
        whole = time.process_time() - self.began
        return self.seconds | {rest: max(0.0, whole - sum(self.seconds.values()))}
