"""The most memory that steps take against what `djepa plan` says, of networks b, l and h at 256².

Blocks are not compiled: what a compiler keeps is its own choice. The share of hidden tokens is
the mean, as the plan has it, and all captions have as many words.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch

from benchmarks.gpu.record import Clock, Results
from benchmarks.gpu.training import GIB, Steps, free
from benchmarks.gpu.world import parameters
from components.plan import activation_bytes, fixed_bytes, hidden_share, peak_bytes

STEPS = 3
CASES = [
    ("h", "none", [2, 16]),
    ("h", "blocks", [16, 64]),
    ("b", "none", [8, 64]),
    ("b", "blocks", [64, 256]),
    ("l", "none", [8, 32]),
    ("l", "blocks", [32, 128]),
]


def run(results: Results, clock: Clock, device: str, tiny: bool, peak: float) -> Iterator[str]:
    """Measure all cases that are not there yet; yields what it left for want of time."""
    for model, checkpointing, batches in CASES:
        left = [n for n in batches if not results.has(case(model, checkpointing, n))]
        if not left:
            continue
        if clock.left() < (5 if tiny else 40):
            yield f"memory {model} {checkpointing}"
            continue
        params = settings(model, checkpointing, tiny)
        steps = Steps(params, ["256x256"], device)
        even(steps, int(params["plan"]["caption_tokens"]))
        for images in left:
            try:
                found = {"tiny": tiny, "measured_gib": most(steps, images, device)}
                results.add(case(model, checkpointing, images), found)
            except Exception as error:
                results.add_failure(case(model, checkpointing, images), error)
        del steps
        free()


def case(model: str, checkpointing: str, images: int) -> dict[str, Any]:
    return {"kind": "memory", "model": model, "checkpointing": checkpointing, "images": images}


def settings(model: str, checkpointing: str, tiny: bool) -> dict[str, Any]:
    """The tree of what is measured."""
    law = parameters(model, ["256x256"], 1, tiny)["training"]["mask"]
    mask = {"mean": hidden_share(law), "std": 0.0, "low": 0.0, "high": 1.0}
    changed: dict[str, Any] = {"checkpointing": checkpointing, "compile": False, "mask": mask}
    return parameters(model, ["256x256"], 1, tiny, **changed)


@cache
def planned(model: str, checkpointing: str, tiny: bool) -> tuple[dict[str, int], int]:
    """What is fixed and what a picture adds, bytes; half a minute that no GPU need wait for."""
    params = settings(model, checkpointing, tiny)
    return fixed_bytes(params, 1), activation_bytes(params, params["training"]["phase1"])


def planned_gib(line: Mapping[str, Any]) -> float:
    """What `djepa plan` says of a case that was measured."""
    case = line["case"]
    fixed, each = planned(case["model"], case["checkpointing"], line["tiny"])
    return peak_bytes(fixed, case["images"] * each, gradients_stay=False) / GIB


def even(steps: Steps, words: int) -> None:
    """Give every caption as many words."""
    count = len(steps.encoded._states) // words
    steps.encoded._offsets = torch.arange(count + 1) * words
    steps.encoded._length = min(count, len(steps.encoded))


def most(steps: Steps, images: int, device: str) -> float:
    steps.batch(["256x256"], images)
    steps.step()
    if device == "cpu":
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(STEPS):
        steps.step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / GIB
