"""A training phase: batches from the statistical sampler, both losses, averages, snapshots."""

import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from components.errors import UserError
from components.feedback.ledger import Ledger
from components.feedback.sampler import StatisticalSampler
from components.feedback.scores import read_scores
from components.files import write_json
from components.model.sampler import SamplerConfig
from components.progress import Progress
from components.tokens.encoded import EncodedSet
from components.tracking import Tracker
from components.training.batch import Batch, grouped
from components.training.checkpoint import (
    Snapshots,
    Training,
    load_state,
    pipeline,
    save_model_folder,
    save_state,
)
from components.training.draw import draw_for
from components.training.grid import save_grid
from components.training.losses import losses
from components.training.optim import Muon, rate_at, set_rates
from components.training.parallel import FlatGradients, Team, team


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
    weights. critic: a critic's folder whose scores drop samples, or None. resume_dir: snapshots of
    this very stage; a run that finds one goes on from it and ends with the same weights as a
    run without a break. Raises UserError for inputs that do not fit or a loss that is no number.
    """
    snapshot = Snapshots(resume_dir).newest()
    inputs = (phase, Path(encoded), init, critic, snapshot, params)
    processes = 1 if torch.cuda.is_available() else int(params["training"]["workers"])
    with team(processes, _train_beside, *inputs) as place:
        trained = Phase(place, *inputs)
        trained.train(Snapshots(resume_dir), tracker)
    trained.write(model_out, state_out, metrics_out, tracker)
    Snapshots(resume_dir).clear()


def _train_beside(place: Team, *inputs: Any) -> None:
    """What the other processes do."""
    Phase(place, *inputs).train(None, Tracker())


class Phase:
    """One phase of training in one process of a team; all of them hold the same weights."""

    def __init__(
        self,
        place: Team,
        phase: str,
        encoded: Path,
        init: Path | None,
        critic: Path | None,
        snapshot: Path | None,
        params: dict[str, Any],
    ) -> None:
        self.place, self.phase, self.params = place, phase, params
        self.settings = params["training"]
        self.budget = int(self.settings[phase]["images"])
        self.encoded = EncodedSet.open(encoded)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.training = Training.fresh(params, self.encoded, self.device)
        for optimizer in self.training.optimizers:
            if isinstance(optimizer, Muon):
                optimizer.team = place
        self.seed = _seed(params, phase)
        self.sampler = StatisticalSampler(
            self.encoded,
            params,
            phase,
            self.seed,
            read_scores(critic, self.encoded.index["key"]),
        )
        self.ledger = Ledger.of(self.encoded.index["shard"].astype(str).tolist())
        if init is not None:
            load_state(Path(init), self.training)
            self.ledger = Ledger.load(Path(init) / "ledger")
        self.first_image = self.training.images  # of this phase
        self.seconds = 0.0
        self.history: list[dict[str, float]] = []
        self.training.extra = {}
        if snapshot is not None:
            self._restore(snapshot)

    def _restore(self, snapshot: Path) -> None:
        load_state(snapshot, self.training)
        extra = self.training.extra
        self.sampler.load_state_dict(extra["sampler"])
        self.ledger.drawn[:] = np.frombuffer(bytes.fromhex(extra["ledger"]), np.uint8)
        self.first_image, self.seconds = extra["first_image"], extra["seconds"]
        self.history = extra["history"]
        if self.place.rank == 0:
            print(f"{self.phase}: goes on from image {self.done}", flush=True)

    def _keep(self) -> None:
        """Put everything besides the tensors into the state's JSON."""
        self.training.extra = {
            "phase": self.phase,
            "sampler": self.sampler.state_dict(),
            "ledger": self.ledger.drawn.tobytes().hex(),
            "first_image": self.first_image,
            "seconds": self.seconds,
            "history": self.history,
        }

    @property
    def done(self) -> int:
        """Images seen in this phase."""
        return self.training.images - self.first_image

    def write(self, model_out: Path, state_out: Path, metrics_out: Path, tracker: Tracker) -> None:
        """Write what a trained phase leaves behind."""
        save_model_folder(model_out, self.training.ema, self.encoded, self.params)
        report = self.sampler.report()
        self.training.extra = {
            "phase": self.phase,
            "sampler": self.sampler.state_dict(),
        }
        save_state(state_out, self.training)
        self.ledger.save(Path(state_out) / "ledger")
        last = self.history[-1] if self.history else {}
        metrics = {
            "phase": self.phase,
            "images": self.done,
            "images_total": self.training.images,
            "steps_total": self.training.step,
            "parameters": sum(p.numel() for p in self.training.model.parameters()),
            "seconds": round(self.seconds, 2),
            "images_per_second": round(self.done / max(self.seconds, 1e-9), 2),
            "final": {name: last[name] for name in ("loss", "flow", "jepa") if name in last},
            "dropped_by_critic": report["dropped_by_critic"],
            "sampling": report,
            "coverage": self.ledger.report(),
            "history": self.history,
        }
        write_json(metrics_out, metrics)
        tracker.log_metrics(
            {
                f"{self.phase}/images_per_second": metrics["images_per_second"],
                f"{self.phase}/dropped_by_critic": report["dropped_by_critic"],
                f"{self.phase}/never_drawn": metrics["coverage"]["never"],
            }
        )

    def train(self, snapshots: Snapshots | None, tracker: Tracker) -> None:
        """Train to the budget; rank 0 is given where snapshots go, and shows how it goes."""
        parameters = list(self.training.model.parameters())
        gradients = FlatGradients(parameters, extra=2)
        leads = self.place.rank == 0
        progress = Progress(self.phase, self.budget, "images") if leads else None
        started = saved = time.monotonic()
        before = self.seconds
        sums, batches = np.zeros(3), 0  # flow, jepa, gradient norm since the last line
        lines, grids = int(self.settings["lines"]), int(self.settings["grids"])
        while self.done < self.budget:
            share = self.done / self.budget
            rate = rate_at(
                share, self.settings["schedule"]["warmup"], self.settings["schedule"]["decay"]
            )
            set_rates(self.training.optimizers, rate)
            said, count = self._step(gradients)
            sums += said
            batches += 1
            self.training.images += count
            self.training.step += 1
            self.training.average(self.settings["ema"], self.settings["target_ema"])
            if progress is None or snapshots is None:
                continue
            self.seconds = before + time.monotonic() - started
            progress.at(min(self.done, self.budget), f"loss {said[0] + said[1]:.3f}")
            if self._passed(share, lines):
                self._line(sums / batches, rate, tracker)
                sums, batches = np.zeros(3), 0
            if self._passed(share, grids):
                self._grid(tracker)
            if time.monotonic() - saved > self.settings["snapshot_seconds"]:
                self._keep()
                snapshots.save(self.training)
                saved = time.monotonic()

    def _step(self, gradients: FlatGradients) -> tuple[Any, int]:
        """One step of the whole team; gives (flow, jepa, gradient norm) and the images."""
        rung, ids = self.sampler.next_batch()
        training, size = self.training, self.place.size
        # Every process draws the whole batch and takes its part, weighed by its share of it: the
        # result does not depend on how many there are, and one mask ratio keeps them in step.
        mine = np.array_split(np.arange(len(ids)), size)[self.place.rank]
        gradients.values.zero_()
        if len(mine):
            batch = self._part(rung, ids, mine)
            beta = float(self.settings["jepa_beta"])
            flow, jepa = losses(training.model, training.target, batch, beta)
            part = len(mine) / len(ids)
            ((flow + float(self.settings["jepa_weight"]) * jepa) * part).backward()
            gradients.extra.copy_(torch.stack([flow, jepa]).detach() * part)
        self.place.sum(gradients.values)
        flow_value, jepa_value = gradients.extra.tolist()
        norm = float(gradients.gradients.norm())
        if not all(map(math.isfinite, (flow_value, jepa_value, norm))):
            raise UserError(
                f"{self.phase} diverged at step {training.step}: the loss is no number; lower "
                "training.optimizer.muon_rate and adam_rate in params/training."
            )
        if norm > self.settings["clip"]:
            gradients.gradients.mul_(self.settings["clip"] / norm)
        for optimizer in training.optimizers:
            optimizer.step()
        self.ledger.add(ids)
        return np.array([flow_value, jepa_value, norm]), len(ids)

    def _part(self, rung: str, ids: np.ndarray, mine: np.ndarray) -> Batch:
        latents = self.encoded.latents(rung, ids)
        tokens = latents.flatten(2).transpose(1, 2).contiguous()
        # From seed and step alone: going on from a snapshot needs no more.
        entropy = np.random.SeedSequence([self.seed, self.training.step])
        generator = torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0]))
        draw = draw_for(tokens, self.settings, generator).of(mine)
        states, mask = self.encoded.text(ids[mine])
        size, device = (latents.shape[3], latents.shape[2]), self.device
        return grouped(
            self.training.model,
            tokens[mine].to(device),
            states.to(device),
            mask.to(device),
            size,
            draw.to(device),
        )

    def _passed(self, before: float, times: int) -> bool:
        """Whether the last step passed one of `times` even marks of the budget."""
        return times > 0 and math.floor(min(self.done / self.budget, 1) * times) > math.floor(
            before * times
        )

    def _line(self, means: np.ndarray, rate: float, tracker: Tracker) -> None:
        flow, jepa, norm = (float(value) for value in means)
        line = {
            "loss": flow + float(self.settings["jepa_weight"]) * jepa,
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

    def _grid(self, tracker: Tracker) -> None:
        """Draw fixed training prompts with the averaged weights; the tracker takes the grid."""
        captions = sorted(set(self.encoded.index["caption"]))
        rng = np.random.default_rng(_seed(self.params, "grid"))
        chosen = [captions[i] for i in rng.permutation(len(captions))[:12]]
        sampler = SamplerConfig.from_params(self.params)
        width, height = self.encoded.rungs[self.settings[self.phase]["rungs"][0]]
        draw = pipeline(self.training.ema, self.encoded, sampler)
        generators = [torch.Generator().manual_seed(i) for i in range(len(chosen))]
        images = draw(chosen, height, width, generator=generators).images
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{self.phase}-step-{self.training.step:06d}.png"
            save_grid(path, images, chosen, columns=6)
            tracker.log_artifact(path, "samples")


def _seed(params: dict[str, Any], purpose: str) -> int:
    """A seed of its own for each purpose, from params.seed."""
    salt = {"phase1": 1, "phase2": 2, "grid": 3}[purpose]
    return int(params["seed"]) * 1000 + salt
