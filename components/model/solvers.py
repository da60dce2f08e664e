"""Solvers of the flow's ODE dx/dt = v(x, t) from noise at t = 0 to data at t = 1.

What drawing pays for is an evaluation of v, so a solver is told how many it has, not how many
steps to take: at equal numbers solvers cost the same.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Error of what is drawn, in steps of length h: euler h, the others h².
SOLVERS = ("euler", "midpoint", "adams")

# The number of an evaluation, 0, 1, …, and x there; gives v.
Velocity = Callable[[int, Tensor], Tensor]
# The number of a step, the time at its end, x there; gives x to go on with.
AfterSolverStep = Callable[[int, float, Tensor], Tensor]


def shifted_times(steps: int, shift: float) -> Tensor:
    """Times 0 … 1, (steps + 1,), shifted towards the noise: t' = t / (t + s·(1 − t))."""
    t = torch.linspace(0, 1, steps + 1)
    return t / (t + shift * (1 - t))


@dataclass(frozen=True)
class Course:
    """The way of a solver: the ends of its steps, the first 0, and the times it asks for v at.

    Plain numbers, so that two alike are equal and nothing of them waits for a GPU.
    """

    solver: str
    ends: tuple[float, ...]
    asked: tuple[float, ...]

    @classmethod
    def of(cls, solver: str, evaluations: int, shift: float) -> "Course":
        """That of a solver with so many evaluations of v, its steps shifted towards the noise.

        The midpoint method asks twice a step; of an odd number the last step asks once, an Euler
        step.
        """
        if solver != "midpoint":
            ends = shifted_times(evaluations, shift)
            return cls(solver, tuple(ends.tolist()), tuple(ends[:-1].tolist()))
        ends = shifted_times((evaluations + 1) // 2, shift)
        middle = (ends[:-1] + ends[1:]) / 2
        asked = torch.stack([ends[:-1], middle], 1).flatten()[:evaluations]
        return cls(solver, tuple(ends.tolist()), tuple(asked.tolist()))

    @property
    def steps(self) -> int:
        """How many steps it takes."""
        return len(self.ends) - 1

    def lengths(self) -> list[float]:
        """Of its steps, in the precision that x has."""
        return torch.tensor(self.ends).diff().tolist()


def solve(
    course: Course, velocity: Velocity, x: Tensor, after: AfterSolverStep | None = None
) -> Tensor:
    """x at t = 1, from x at t = 0; v is asked for at `course.asked` in turn.

    adams: Adams and Bashforth's method of two steps, v carried on in a line from the step before,
    for steps of any length; it has nothing before the first, an Euler step.
    """
    asked, before = 0, None
    for step, length in enumerate(course.lengths()):
        v = velocity(asked, x)
        asked, slope = asked + 1, v
        if course.solver == "midpoint" and asked < len(course.asked):
            slope = velocity(asked, x + length / 2 * v)
            asked += 1
        elif course.solver == "adams":
            if before is not None:
                last_length, last = before
                slope = v + length / (2 * last_length) * (v - last)
            before = length, v
        x = x + length * slope
        if after is not None:
            x = after(step, course.ends[step + 1], x)
    return x
