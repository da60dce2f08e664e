"""A training phase: batches from the statistical sampler, both losses, averages, snapshots."""

import copy
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from components.errors import UserError
from components.feedback.ledger import Ledger, coverage
from components.feedback.sampler import StatisticalSampler
from components.feedback.scores import read_scores
from components.files import write_json
from components.model.djepa import DJEPA, Encoder
from components.model.network import Network
from components.model.sampler import SamplerConfig
from components.plan import check_memory
from components.progress import Progress
from components.scenes.atlas import catalogue
from components.starter.begin import packed
from components.tokens.encoded import EncodedSet
from components.tracking import Tracker
from components.training.batches import Batches
from components.training.checkpoint import (
    Snapshots,
    Training,
    load_state,
    pipeline,
    save_state,
)
from components.training.distribution import Team, room, team
from components.training.engine import Engine, whole
from components.training.grid import draw_grid
from components.training.optim import rate_at, set_rates
from components.training.validation import Split, Validation, figures


def train_phase(
    phase: str,
    encoded: Path,
    init: Path | None,
    critic: Path | None,
    model_out: Path,
    state_out: Path,
    metrics_out: Path,
    resume_dir: Path,
    params: dict[str, Any],
    tracker: Tracker,
) -> None:
    """Train `phase1` or `phase2` and write the model, the state and the metrics.

    encoded: an `EncodedSet` folder. init: the state to go on from, or None to start from fresh
    weights, or from those that `params.init` names. critic: a critic's folder whose scores drop
    samples, or None. resume_dir: snapshots of this very stage; a run that finds one goes on from
    it and ends with the same weights as a run without a break. Under torchrun every process calls
    it, and rank 0 writes and reports. Raises UserError for inputs that do not fit or a loss that
    is no number.
    """
    inputs = (
        phase, Path(encoded), init, critic, model_out, state_out, metrics_out, resume_dir, params,
    )  # fmt: skip
    workers = int(params["training"]["workers"])
    check_memory(params, phase, *room(workers))
    with team(workers, _train_beside, *inputs) as place:
        _train(place, tracker, *inputs)


def _train_beside(place: Team, *inputs: Any) -> None:
    """What the processes do that a stage started beside itself."""
    _train(place, Tracker(), *inputs)


def _train(
    place: Team,
    tracker: Tracker,
    phase: str,
    encoded: Path,
    init: Path | None,
    critic: Path | None,
    model_out: Path,
    state_out: Path,
    metrics_out: Path,
    resume_dir: Path,
    params: dict[str, Any],
) -> None:
    snapshots = Snapshots(resume_dir, place)
    trained = Phase(place, phase, encoded, init, critic, snapshots.newest(), resume_dir, params)
    trained.train(snapshots, tracker)
    trained.write(model_out, state_out, metrics_out, tracker)
    if place.leads:
        snapshots.clear()


class Phase:
    """One phase of training in one process of a team; all of them go through the same steps."""

    def __init__(
        self,
        place: Team,
        phase: str,
        encoded: Path,
        init: Path | None,
        critic: Path | None,
        snapshot: Path | None,
        scratch: Path,
        params: dict[str, Any],
    ) -> None:
        self.place, self.phase, self.params = place, phase, params
        self.settings = params["training"]
        self.budget = int(self.settings[phase]["images"])
        self.encoded = EncodedSet.open(encoded)
        fresh = packed(params) if init is None else None
        self.training = Training.fresh(params, self.encoded, place, fresh)
        self.training.scratch = Path(scratch)
        if init is not None:
            load_state(Path(init), self.training)
        self.first_image = self.training.images  # of this phase
        self.seed = _seed(params, phase, self.first_image)
        split = Split.of(self.encoded, self.settings["validation"])
        self.held_out = split.ids
        self.sampler = StatisticalSampler(
            self.encoded,
            params,
            phase,
            self.seed,
            read_scores(critic, self.encoded),
            packs=self.settings["batches"] == "packed",
            most_area=int(self.settings["most_tokens"]) * self.encoded.tokenizer().patch ** 2,
            held_out=self.held_out,
        )
        self.validation = Validation(self.encoded, split, self.sampler.names, self.settings)
        if place.leads and self.settings["validation"]["pictures"] and not self.validation.pictures:
            print(
                f"{phase}: no validation: training.validation.most of so few samples is none",
                flush=True,
            )
        self.batches = Batches(
            self.encoded, self.sampler, self.training.model, self.settings, self.seed, place
        )
        self.seconds = 0.0
        self.history: list[dict[str, float]] = []
        self.validations: list[dict[str, Any]] = []  # the points of the validation curves
        self.validation_seconds = 0.0
        self.training.extra = {}
        if snapshot is not None:
            self._restore(snapshot)
        self.ledger = self._ledger()
        self.engine = Engine(self.training.losses, self.training.optimizers, self.settings, place)

    def _restore(self, snapshot: Path) -> None:
        load_state(snapshot, self.training)
        extra = self.training.extra
        self.sampler.load_state_dict(extra["sampler"])
        self.first_image, self.seconds = extra["first_image"], extra["seconds"]
        self.history = extra["history"]
        self.validations = extra["validations"]
        self.validation_seconds = extra["validation_seconds"]
        if self.place.leads:
            print(f"{self.phase}: goes on from image {self.done}", flush=True)

    def _ledger(self) -> Ledger | None:
        """The ledger of what was trained on before, or a new one; rank 0 alone counts."""
        if self.training.ledger is None:
            self.training.ledger = Ledger(self.encoded.shards, self.training.scratch)
        elif self.training.ledger.shards != self.encoded.shards:
            raise UserError(
                f"{self.phase} goes on from a state that was trained on other samples than the "
                f"encoded set in {self.encoded.folder} has; run the stages before it again."
            )
        ledger = self.training.ledger
        if ledger.drawn[self.held_out].any():
            raise UserError(
                f"{self.phase} goes on from a state that was trained on pictures which are held "
                "out now (training.validation was changed, or the state is older): run phase1 "
                "and the stages after it again, or compose training.validation.pictures=0."
            )
        ledger.held_out = self.held_out
        if not self.place.leads:
            self.training.ledger = None
        return self.training.ledger

    def _keep(self) -> None:
        """Put everything besides the tensors into the state's JSON."""
        self.training.extra = {
            "phase": self.phase,
            "sampler": self.sampler.state_dict(),
            "first_image": self.first_image,
            "seconds": self.seconds,
            "history": self.history,
            "validations": self.validations,
            "validation_seconds": self.validation_seconds,
        }

    @property
    def done(self) -> int:
        """Images seen in this phase."""
        return self.training.images - self.first_image

    def write(self, model_out: Path, state_out: Path, metrics_out: Path, tracker: Tracker) -> None:
        """Write what a trained phase leaves behind."""
        self.training.extra = {"phase": self.phase, "sampler": self.sampler.state_dict()}
        save_state(state_out, self.training, self.place)
        averaged = self.training.averaged(self.params, self.encoded, self.place)
        if averaged is None or self.ledger is None:
            return
        facts = {
            "trained by": self.phase,
            "images seen": self.training.images,
            "steps": self.training.step,
            "seed": self.params["seed"],
        }
        if self.params["data"].get("glyphs") == "openmoji":
            facts["its pictures show"] = catalogue()["attribution"]
        pipeline(averaged, self.encoded, SamplerConfig.from_params(self.params)).save_pretrained(
            model_out, facts
        )
        report = self.sampler.report()
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
            "validation": self._validation_report(),
            "dropped_by_critic": report["dropped_by_critic"],
            "sampling": report,
            "coverage": coverage(self.ledger, self.encoded),
            "history": self.history,
        }
        write_json(metrics_out, metrics)
        if report["unmet_count"]:
            first = report["unmet"][0]
            print(
                f"{self.phase}: {report['unmet_count']} target frequencies are not met after "
                f"{report['trained']} samples; {first['kind']} {first['value']} has "
                f"{first['reached']:.3f}, not {first['target']:.3f} (all: {metrics_out})",
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

    def train(self, snapshots: Snapshots, tracker: Tracker) -> None:
        """Train to the budget; rank 0 shows how it goes."""
        leads, schedule = self.place.leads, self.settings["schedule"]
        progress = Progress(self.phase, self.budget, "images")
        started = saved = time.monotonic()
        before = self.seconds
        sums, batches = np.zeros(3), 0  # flow, jepa, gradient norm since the last line
        lines, grids = int(self.settings["lines"]), int(self.settings["grids"])
        points = int(self.settings["validation"]["points"]) if self.validation.pictures else 0
        while self.done < self.budget:
            share = self.done / self.budget
            rate = rate_at(share, **schedule)
            set_rates(self.training.optimizers, rate)
            due = time.monotonic() - saved > self.settings["snapshot_seconds"]
            said, due = self._step(due)
            sums += said
            batches += 1
            self.seconds = before + time.monotonic() - started
            if leads:
                loss = self._loss(*said[:2])
                progress.at(min(self.done, self.budget), f"loss {loss:.3f}")
            if self._passed(share, lines):
                if leads:
                    self._line(sums / batches, rate, tracker)
                sums, batches = np.zeros(3), 0
            if self._passed(share, points):
                self._validate(tracker)
            if self._passed(share, grids):
                self._grid(tracker)
            if due:
                self._keep()
                snapshots.save(self.training)
                saved = time.monotonic()

    def _step(self, due: bool) -> tuple[np.ndarray, bool]:
        """One step of the whole team; gives (flow, jepa, gradient norm) and rank 0's `due`."""
        training = self.training
        part = self.batches.next(training.step)
        flow, jepa, norm, due = self.engine.gradients(part.batch, part.share, due)
        if not all(map(math.isfinite, (flow, jepa, norm))):
            raise UserError(self._why_no_number(part.samples))
        self.engine.update(norm)
        ids = part.ids
        training.images += len(ids)
        training.step += 1
        training.average(self.settings["ema"], self.settings["target_ema"])
        if self.ledger is not None:
            self.ledger.add(ids)
        return np.array([flow, jepa, norm]), due

    def _why_no_number(self, samples: list[tuple[str, np.ndarray]]) -> str:
        """The sentence for a loss that is no number; every process comes to the same one."""
        for rung, ids in samples:
            latents, states = self.encoded.latents(rung, ids), self.encoded.text(ids)[0]
            fine = latents.flatten(1).isfinite().all(dim=1)
            wrong = ~(fine & states.flatten(1).isfinite().all(dim=1)).numpy()
            if not wrong.any():
                continue
            keys = ", ".join(sorted(set(self.encoded.keys_of(ids[wrong]))))
            return (
                f"{self.phase}: the encoded samples {keys} (rung {rung}) have numbers that are "
                f"none (NaN or infinite) in {self.encoded.folder}: encode again "
                "(`dvc repro --force --single-item encode`), or take these pictures out of data/."
            )
        return (
            f"{self.phase} diverged at step {self.training.step}: the loss is no number; lower "
            "training.optimizer.muon_rate and adam_rate in params/training."
        )

    def _passed(self, before: float, times: int) -> bool:
        """Whether the last step passed one of `times` even marks of the budget."""
        return times > 0 and math.floor(min(self.done / self.budget, 1) * times) > math.floor(
            before * times
        )

    def _loss(self, flow: float, jepa: float) -> float:
        return flow + float(self.settings["jepa_weight"]) * jepa

    def _line(self, means: np.ndarray, rate: float, tracker: Tracker) -> None:
        flow, jepa, norm = (float(value) for value in means)
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

    def _validate(self, tracker: Tracker) -> None:
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

    def _averages(self) -> tuple[Network | None, Encoder | None, Team]:
        """The averaged network and the target encoder in one piece, and who measures them.

        Where every process holds them whole, all share the work. In shards rank 0 gathers them,
        as for a grid, and measures alone: the others, which get None, meet it in the next step.
        Every process calls it.
        """
        training, place = self.training, self.place
        if self.settings["sharding"] != "shard" or place.size == 1:
            return training.ema, training.target, place
        network = training.averaged(self.params, self.encoded, place)
        target = None
        if training.target is not None:
            weights = whole(training.target.state_dict(), place)
            if isinstance(network, DJEPA):
                target = copy.deepcopy(network.encoder)
                target.load_state_dict(weights)
        return network, target, Team(device=place.device)

    def _validation_report(self) -> dict[str, Any]:
        """The last point, all of them, and what they took; `held_out`: samples never trained on."""
        if not self.validations:
            return {"held_out": len(self.held_out), "pictures": 0}
        last = {k: v for k, v in self.validations[-1].items() if k not in ("step", "images")}
        return {
            "held_out": len(self.held_out),
            "pictures": self.validation.pictures,
            **last,
            "seconds": round(self.validation_seconds, 2),
            "history": self.validations,
        }

    def _grid(self, tracker: Tracker) -> None:
        """Draw fixed training prompts with the averaged weights; the tracker takes the grid."""
        averaged = self.training.averaged(self.params, self.encoded, self.place)
        if averaged is None:
            return
        draw_grid(averaged, self.encoded, self.params, self.phase, self.training.step, tracker)


def _seed(params: dict[str, Any], phase: str, before: int) -> int:
    """A seed of its own for each phase and round, from params.seed and the images seen before it.

    With one for all rounds, each would be handed the same samples in the same order.
    """
    entropy = [int(params["seed"]), {"phase1": 1, "phase2": 2}[phase], before]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
