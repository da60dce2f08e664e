"""What a phase says of itself while it trains: lines of the losses, validation points, grids."""

import copy
import time
from pathlib import Path
from typing import Any

import numpy as np

from components.feedback.ledger import Ledger, coverage
from components.feedback.sampler import StatisticalSampler
from components.files import write_json
from components.model.djepa import DJEPA, Encoder
from components.model.network import Network
from components.tokens.encoded import EncodedSet
from components.tracking import Tracker
from components.training.checkpoint import Training
from components.training.distribution import Team
from components.training.engine import whole
from components.training.grid import draw_grid
from components.training.validation import Validation, figures


class Record:
    """The curves of one phase, in one process of a team; rank 0's tracker takes them."""

    def __init__(
        self,
        phase: str,
        training: Training,
        encoded: EncodedSet,
        validation: Validation,
        params: dict[str, Any],
        place: Team,
    ) -> None:
        self.phase, self.training, self.encoded = phase, training, encoded
        self.validation, self.params, self.place = validation, params, place
        self.first_image = training.images  # of this phase
        self.seconds = 0.0  # trained
        self.history: list[dict[str, float]] = []
        self.validations: list[dict[str, Any]] = []  # the points of the validation curves
        self.validation_seconds = 0.0
        self.sums, self.steps = np.zeros(3), 0  # flow, jepa, gradient norm since the last line
        self.last_loss: float | None = None

    @property
    def done(self) -> int:
        """Images seen in this phase."""
        return self.training.images - self.first_image

    def state(self) -> dict[str, Any]:
        """What a snapshot keeps, as plain JSON values."""
        return {
            "first_image": self.first_image,
            "seconds": self.seconds,
            "history": self.history,
            "validations": self.validations,
            "validation_seconds": self.validation_seconds,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.first_image, self.seconds = state["first_image"], state["seconds"]
        self.history = state["history"]
        self.validations = state["validations"]
        self.validation_seconds = state["validation_seconds"]

    def add(self, flow: float, jepa: float, norm: float) -> None:
        """Count what one step said."""
        self.sums += (flow, jepa, norm)
        self.steps += 1
        self.last_loss = self._loss(flow, jepa)

    def line(self, rate: float, tracker: Tracker) -> None:
        """One line of the history: means since the last one; every process calls it."""
        flow, jepa, norm = (float(value) for value in self.sums / self.steps)
        self.sums, self.steps = np.zeros(3), 0
        if not self.place.leads:
            return
        line = {
            "loss": self._loss(flow, jepa),
            "flow": flow,
            "jepa": jepa,
            "gradient_norm": norm,
            "rate": rate,
            "images_per_second": self.done / max(self.seconds, 1e-9),
        }
        self.history.append({"step": self.training.step, "images": self.training.images, **line})
        tracker.log_metrics(
            {f"train/{name}": value for name, value in line.items()},
            step=self.training.step,
            images=self.training.images,
        )

    def validate(self, tracker: Tracker) -> None:
        """Measure the averaged weights on what is held out: one point of the curves."""
        started = time.monotonic()
        network, target, place = self._averages()
        if network is None:
            return
        point = self.validation.measure(network, target, place)
        point = {"step": self.training.step, "images": self.training.images, **point}
        self.validations.append(point)
        self.validation_seconds += time.monotonic() - started
        tracker.log_metrics(figures(point), step=point["step"], images=point["images"])

    def grid(self, tracker: Tracker) -> None:
        """Draw fixed training prompts with the averaged weights; the tracker takes the grid."""
        averaged = self.training.averaged(self.params, self.encoded, self.place)
        if averaged is None:
            return
        draw_grid(averaged, self.encoded, self.params, self.phase, self.training.step, tracker)

    def write(
        self,
        path: Path,
        averaged: Network,
        sampler: StatisticalSampler,
        ledger: Ledger,
        tracker: Tracker,
    ) -> None:
        """Write the phase's metrics, and say which target frequencies were not met."""
        report = sampler.report()
        last = self.history[-1] if self.history else {}
        metrics = {
            "phase": self.phase,
            "images": self.done,
            "images_total": self.training.images,
            "steps_total": self.training.step,
            "parameters": sum(p.numel() for p in averaged.parameters()),
            "seconds": round(self.seconds, 2),
            "images_per_second": round(self.done / max(self.seconds, 1e-9), 2),
            "final": {name: last[name] for name in ("loss", "flow", "jepa") if name in last},
            "validation": self._validation_report(len(ledger.held_out)),
            "dropped_by_critic": report["dropped_by_critic"],
            "sampling": report,
            "coverage": coverage(ledger, self.encoded),
            "history": self.history,
        }
        write_json(path, metrics)
        if report["unmet_count"]:
            first = report["unmet"][0]
            print(
                f"{self.phase}: {report['unmet_count']} target frequencies are not met after "
                f"{report['trained']} samples; {first['kind']} {first['value']} has "
                f"{first['reached']:.3f}, not {first['target']:.3f} (all: {path})",
                flush=True,
            )
        tracker.log_metrics(
            {
                f"{self.phase}/images_per_second": metrics["images_per_second"],
                f"{self.phase}/dropped_by_critic": report["dropped_by_critic"],
                f"{self.phase}/never_drawn": metrics["coverage"]["never"],
                f"{self.phase}/unmet_targets": report["unmet_count"],
            }
        )

    def _loss(self, flow: float, jepa: float) -> float:
        return flow + float(self.params["training"]["jepa_weight"]) * jepa

    def _averages(self) -> tuple[Network | None, Encoder | None, Team]:
        """The averaged network and the target encoder in one piece, and who measures them.

        Where every process holds them whole, all share the work. In shards rank 0 gathers them,
        as for a grid, and measures alone: the others, which get None, meet it in the next step.
        Every process calls it.
        """
        training, place = self.training, self.place
        if self.params["training"]["sharding"] != "shard" or place.size == 1:
            return training.ema, training.target, place
        network = training.averaged(self.params, self.encoded, place)
        target = None
        if training.target is not None:
            weights = whole(training.target.state_dict(), place)
            if isinstance(network, DJEPA):
                target = copy.deepcopy(network.encoder)
                target.load_state_dict(weights)
        return network, target, Team(device=place.device)

    def _validation_report(self, held_out: int) -> dict[str, Any]:
        """The last point, all of them, and what they took; `held_out`: samples never trained on."""
        if not self.validations:
            return {"held_out": held_out, "pictures": 0}
        last = {k: v for k, v in self.validations[-1].items() if k not in ("step", "images")}
        return {
            "held_out": held_out,
            "pictures": self.validation.pictures,
            **last,
            "seconds": round(self.validation_seconds, 2),
            "history": self.validations,
        }
