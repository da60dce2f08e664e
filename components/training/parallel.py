"""A batch over several threads of one process.

Small operations scale badly over a thread pool inside each of them; whole forward and backward
passes on parts of a batch scale well, because PyTorch lets go of the interpreter's lock. Sums
are taken in a fixed order, so the result does not depend on which part ends first.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from typing import TypeVar

import torch
from torch import Tensor

Part = TypeVar("Part")
Result = TypeVar("Result")


class Workers:
    """`count` threads, each with one thread of its own inside PyTorch's operations."""

    def __init__(self, count: int) -> None:
        self.count = max(1, count)
        self.before = torch.get_num_threads()
        self.pool = ThreadPoolExecutor(self.count, initializer=torch.set_num_threads, initargs=(1,))

    def __enter__(self) -> "Workers":
        torch.set_num_threads(1)
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown()
        torch.set_num_threads(self.before)

    def map(self, function: Callable[[Part], Result], parts: Sequence[Part]) -> list[Result]:
        """`function` of each part, in the parts' order."""
        if self.count == 1:
            return [function(part) for part in parts]
        return list(self.pool.map(function, parts))

    def gradients(
        self,
        loss: Callable[[Part], tuple[Tensor, Result]],
        parts: Sequence[Part],
        parameters: list[torch.nn.Parameter],
    ) -> list[Result]:
        """Put the mean gradient over the parts into `.grad`; gives what `loss` says besides.

        `loss` maps a part to (scalar, anything); parts weigh the same.
        """

        def one(part: Part) -> tuple[tuple[Tensor | None, ...], Result]:
            value, said = loss(part)
            return torch.autograd.grad(value / len(parts), parameters, allow_unused=True), said

        results = self.map(one, parts)
        for index, parameter in enumerate(parameters):
            found = [g for g in (gradients[index] for gradients, _ in results) if g is not None]
            parameter.grad = reduce(torch.add, found) if found else None
        return [said for _, said in results]
