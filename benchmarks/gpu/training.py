"""Training steps of a network of the paper's sizes, with cached latents: images a second.

A step is what components/training/phases.py does in one: the batch's parts, gradients, update,
averages, and what the step before said. Its time has everything in it, the batch's preparation and
the waits too.
"""

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.record import Clock, Results, spread, timed
from benchmarks.gpu.world import Dealer, MadeSet, parameters
from components.model import flops
from components.model.djepa import DJEPA
from components.training.batch import Batch
from components.training.batches import Batches, Part
from components.training.checkpoint import Training
from components.training.distribution import Team
from components.training.engine import Engine, Said

GIB = 2**30
SAMPLES = 128
WARM, WINDOWS, STEPS = 4, 5, 4  # steps before, windows measured, steps in each


class Steps:
    """A network in training and what feeds it."""

    def __init__(self, params: dict[str, Any], rungs: Sequence[str], device: str) -> None:
        self.settings, self.device = params["training"], device
        self.encoded = MadeSet(params, rungs, SAMPLES if device != "cpu" else 16)
        self.place = Team(device=device)
        with torch.device(device):  # fresh weights are drawn there: 2.7 B take a CPU half a minute
            self.training = Training.fresh(params, self.encoded, self.place)
        losses, optimizers = self.training.losses, self.training.optimizers
        self.engine = Engine(losses, optimizers, self.settings, self.place)
        self.batch(rungs, 1)

    def batch(self, rungs: Sequence[str], images: int) -> None:
        """From now on batches of so many images of these rungs."""
        self.dealer = Dealer(self.encoded, rungs, images)
        model = self.training.model
        self.batches = Batches(self.encoded, self.dealer, model, self.settings, 0, self.place)  # type: ignore[arg-type]
        self.seen: list[tuple[int, Tensor, Tensor]] = []
        self.unheard: Said | None = None

    def step(self) -> None:
        """As `Phase._step` has it, without its ledger."""
        batch = self.batches.next(self.training.step)
        said = self.engine.step(self._noted(batch.parts), False)
        if self.unheard is not None:
            self.unheard.read()
        self.unheard = said
        self.training.images += len(batch.ids)
        self.training.step += 1
        self.training.average(self.settings["ema"], self.settings["target_ema"])

    def _noted(self, parts: Iterable[Part]) -> Iterator[Part]:
        for part in parts:
            self.seen.append(self._tokens(part.batch))
            yield part

    def _tokens(self, batch: Batch) -> tuple[int, Tensor, Tensor]:
        """Images, their tokens and the hidden ones; padding is none. Left on the device."""
        length = batch.prompt.states.shape[1]
        everything = (batch.layout.owner[:, length:] >= 0).sum()
        hidden = (batch.layout.owner[:, length + batch.visible :] >= 0).sum()
        return batch.t.shape[0] * batch.t.shape[1], everything, hidden

    def operations(self) -> float:
        """What the pictures seen ask for; padding and recomputation are no operations."""
        words = float(self.encoded._offsets[-1]) / (len(self.encoded._offsets) - 1)
        # A dropped caption is one token; what the target encoder reads of it is left out.
        text = words + float(self.settings["text_drop"]) * (1 - words)
        draws, model, total = int(self.settings["flow_samples"]), self.training.model, 0.0
        for images, tokens, hidden in self.seen:
            each, covered = int(tokens) / images, int(hidden) / images
            total += images * flops.train_image(model, text, each, covered, draws, True)
        return total


def measured(
    steps: Steps, rungs: Sequence[str], images: int, peak: float, clock: Clock
) -> dict[str, Any]:
    """Images a second and utilisation of some windows of steps, memory in GiB.

    Out of memory: with half as many images, and so on; says so.
    """
    failed = []
    while True:
        steps.batch(rungs, images)
        try:
            found = _windows(steps, images, peak, clock)
            return {"images": images, "out_of_memory_at": failed, **found}
        except torch.OutOfMemoryError:
            failed.append(images)
        # Outside the except block, whose traceback holds the step's tensors.
        for optimizer in steps.engine.optimizers:
            optimizer.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()
        if images == 1:
            return {"error": "out of memory", "out_of_memory_at": failed}
        images //= 2


def _windows(steps: Steps, images: int, peak: float, clock: Clock) -> dict[str, Any]:
    device = steps.device
    first = timed(steps.step, device)  # compiles
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    warm = timed(lambda: [steps.step() for _ in range(WARM)], device) / WARM
    rates, shares = [], []
    while len(rates) < WINDOWS and (len(rates) < 2 or clock.left() > 2 * STEPS * warm):
        steps.seen.clear()
        seconds = timed(lambda: [steps.step() for _ in range(STEPS)], device)
        rates.append(STEPS * images / seconds)
        shares.append(steps.operations() / seconds / peak)
    found: dict[str, Any] = {
        "images_per_second": spread(rates),
        "utilisation": spread(shares),
        "tflop_per_image": steps.operations() / STEPS / images / 1e12,
        "seconds_first_step": round(first, 2),
    }
    if device != "cpu":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        found["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
    return found


# Network, activation checkpointing, parts of a batch, sizes with the images of a batch at 78 GiB;
# in order of importance. Where they do not fit, the batch is halved.
CASES: list[tuple[str, str, int, dict[str, int]]] = [
    ("h", "none", 1, {"256x256": 32}),
    ("h", "none", 8, {"256x256": 128}),
    ("h", "blocks", 1, {"256x256": 112, "512x512": 40, "1024x1024": 10}),
    ("b", "none", 1, {"256x256": 256, "512x512": 80, "1024x1024": 22}),
    ("l", "none", 1, {"256x256": 72, "512x512": 24, "1024x1024": 6}),
    ("l", "blocks", 1, {"256x256": 320, "512x512": 96, "1024x1024": 28}),
    ("h", "none", 1, {"512x512": 8, "1024x1024": 2}),
]


def run(results: Results, clock: Clock, device: str, tiny: bool, peak: float) -> Iterator[str]:
    """Measure all cases that are not there yet; yields what it left for want of time."""
    room = 1.0 if device == "cpu" else torch.cuda.mem_get_info()[1] / GIB / 79
    for model, checkpointing, parts, sizes in CASES:
        wanted = {
            rung: images
            for rung, images in sizes.items()
            if not results.has(case(model, rung, checkpointing, parts))
        }
        if not wanted:
            continue
        if clock.left() < (5 if tiny else 75):  # built and compiled
            yield f"training {model} {checkpointing} x{parts}"
            continue
        steps = None
        for rung, images in wanted.items():
            if clock.left() < (2 if tiny else 25):
                yield f"training {model} {rung} {checkpointing} x{parts}"
                continue
            images = 2 if tiny else max(1, int(images * room))
            try:
                if steps is None:
                    changed = {"checkpointing": checkpointing, "accumulate": parts}
                    params = parameters(model, list(wanted), 1, tiny, **changed)
                    steps = Steps(params, list(wanted), device)
                found = measured(steps, [rung], images, peak, clock)
                results.add(case(model, rung, checkpointing, parts), found)
            except Exception as error:
                results.add_failure(case(model, rung, checkpointing, parts), error)
        del steps
        free()


def case(model: str, rung: str, checkpointing: str, parts: int) -> Mapping[str, Any]:
    found = {"kind": "training", "model": model, "size": rung, "checkpointing": checkpointing}
    return found if parts == 1 else found | {"parts": parts}


def free() -> None:
    """Give back what the last network took."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    torch.compiler.reset()


def is_djepa(model: Any) -> DJEPA:
    assert isinstance(model, DJEPA)
    return model
