"""A training phase: batches from the statistical sampler, both losses, averages, snapshots."""

import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from components.errors import UserError
from components.feedback.ledger import Ledger
from components.feedback.sampler import StatisticalSampler
from components.feedback.scores import read_scores
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
from components.training.engine import Engine, Said
from components.training.optim import rate_at, set_rates
from components.training.record import Record
from components.training.validation import Split, Validation


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
        self.seed = _seed(params, phase, self.training.images)
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
        validation = Validation(self.encoded, split, self.sampler.names, self.settings)
        if place.leads and self.settings["validation"]["pictures"] and not validation.pictures:
            print(
                f"{phase}: no validation: training.validation.most of so few samples is none",
                flush=True,
            )
        self.batches = Batches(
            self.encoded, self.sampler, self.training.model, self.settings, self.seed, place
        )
        self.record = Record(phase, self.training, self.encoded, validation, params, place)
        # What the last step said, its samples and its number, until it is read.
        self.unheard: tuple[Said, list[tuple[str, np.ndarray]], int] | None = None
        self.training.extra = {}
        if snapshot is not None:
            self._restore(snapshot)
        self.ledger = self._ledger()
        self.engine = Engine(self.training.losses, self.training.optimizers, self.settings, place)

    def _restore(self, snapshot: Path) -> None:
        load_state(snapshot, self.training)
        extra = self.training.extra
        self.sampler.load_state_dict(extra["sampler"])
        self.record.load_state(extra)
        if self.place.leads:
            print(f"{self.phase}: goes on from image {self.record.done}", flush=True)

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
            **self.record.state(),
        }

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
        self.record.write(metrics_out, averaged, self.sampler, self.ledger, tracker)

    def train(self, snapshots: Snapshots, tracker: Tracker) -> None:
        """Train to the budget; rank 0 shows how it goes."""
        record, schedule = self.record, self.settings["schedule"]
        progress = Progress(self.phase, self.budget, "images")
        started = saved = time.monotonic()
        before = record.seconds
        lines, grids = int(self.settings["lines"]), int(self.settings["grids"])
        points = int(self.settings["validation"]["points"]) if record.validation.pictures else 0
        while record.done < self.budget:
            share = record.done / self.budget
            rate = rate_at(share, **schedule)
            set_rates(self.training.optimizers, rate)
            due = self._step(time.monotonic() - saved > self.settings["snapshot_seconds"])
            line, point, grid = (self._passed(share, times) for times in (lines, points, grids))
            if due or line or point or grid or record.done >= self.budget:
                due = self._hear() or due  # no weights leave before their step said a number
            record.seconds = before + time.monotonic() - started
            if self.place.leads and record.last_loss is not None:
                progress.at(min(record.done, self.budget), f"loss {record.last_loss:.3f}")
            if line:
                record.line(rate, tracker)
            if point:
                record.validate(tracker)
            if grid:
                record.grid(tracker)
            if due:
                self._keep()
                snapshots.save(self.training)
                saved = time.monotonic()

    def _step(self, due: bool) -> bool:
        """One step of the whole team; whether rank 0 found a snapshot `due` before the last one.

        What a step says is heard after the next one was handed to the GPU, which so has something
        to do while batches are prepared.
        """
        training = self.training
        batch = self.batches.next(training.step)
        said = self.engine.step(batch.parts, due)
        was_due = self._hear()
        self.unheard = said, batch.samples, training.step
        training.images += len(batch.ids)
        training.step += 1
        training.average(self.settings["ema"], self.settings["target_ema"])
        if self.ledger is not None:
            self.ledger.add(batch.ids)
        return was_due

    def _hear(self) -> bool:
        """Read what the last step said, once; whether rank 0 found a snapshot due before it.

        Raises UserError for a loss that is no number; every process does.
        """
        if self.unheard is None:
            return False
        (said, samples, step), self.unheard = self.unheard, None
        flow, jepa, norm, due = said.read()
        if not all(map(math.isfinite, (flow, jepa, norm))):
            raise UserError(self._why_no_number(samples, step))
        self.record.add(flow, jepa, norm)
        return due

    def _why_no_number(self, samples: list[tuple[str, np.ndarray]], step: int) -> str:
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
            f"{self.phase} diverged at step {step}: the loss is no number; lower "
            "training.optimizer.muon_rate and adam_rate in params/training."
        )

    def _passed(self, before: float, times: int) -> bool:
        """Whether the last step passed one of `times` even marks of the budget."""
        return times > 0 and math.floor(
            min(self.record.done / self.budget, 1) * times
        ) > math.floor(before * times)


def _seed(params: dict[str, Any], phase: str, before: int) -> int:
    """A seed of its own for each phase and round, from params.seed and the images seen before it.

    With one for all rounds, each would be handed the same samples in the same order.
    """
    entropy = [int(params["seed"]), {"phase1": 1, "phase2": 2}[phase], before]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
