"""Direct preference optimisation on the model's own pictures (paper, section 4; Diffusion-DPO).

The paper gives neither pairs nor settings. Here a pair is two pictures of one training
prompt that GenEval tells apart, and the error is the flow head's over the hidden tokens,
with the same mask, order, t and noise for winner, loser, model and reference. It stops, and
goes back, before the winners themselves are drawn worse.
"""

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from components.errors import UserError
from components.feedback.pairs import PairSet, draw_or_read
from components.files import atomic_folder, read_json, write_json
from components.model import DJEPAPipeline
from components.model.network import Network
from components.progress import Progress
from components.tracking import Tracker


def dpo_loss(
    winner: Tensor, loser: Tensor, reference_winner: Tensor, reference_loser: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """Loss, scalar, and the inside of its sigmoid (B,), from the flow errors (B,) of each.

    L = −E log σ(−(β/2)·[(e_θ^w − e_θ^l) − (e_ref^w − e_ref^l)]) (Diffusion-DPO, eq. 14, with
    the velocity error). Positive inside: the model prefers the winner more than the
    reference does.
    """
    inside = -(beta / 2) * ((winner - loser) - (reference_winner - reference_loser))
    return -F.logsigmoid(inside).mean(), inside


def dpo(
    state_from: Path,
    model_from: Path,
    encoded: Path,
    model_out: Path,
    state_out: Path,
    metrics_out: Path,
    resume_dir: Path,
    params: dict[str, Any],
    tracker: Tracker,
) -> dict[str, Any]:
    """Tune the model in `model_from` on preference pairs that it draws itself.

    Writes the tuned pipeline to `model_out`, the state to `state_out` (that of `state_from`
    with the tuned weights, pairs.parquet and pairs.png) and the figures to `metrics_out`;
    returns them. Snapshots in `resume_dir` let a
    killed run go on to the same weights; they are removed at the end. With
    fewer than `dpo.least_pairs` pairs the model is copied unchanged and the figures say so.
    """
    settings = params["dpo"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = DJEPAPipeline.from_pretrained(model_from).to(device)
    pairs, summary = draw_or_read(
        Path(resume_dir) / "pairs", Path(model_from), pipe, Path(encoded), params
    )
    reference = pipe.transformer.eval().requires_grad_(False)
    kept = None
    if len(pairs.held_out) < int(settings["least_pairs"]):
        why = (
            f"{len(pairs.held_out)} pairs, fewer than dpo.least_pairs "
            f"{settings['least_pairs']}: the model is copied unchanged."
        )
        print(f"dpo: {why}", flush=True)
        figures: dict[str, Any] = summary | {"changed": False, "kept_step": 0, "stopped": why}
    else:
        run = Tuning(reference, pairs, params, Path(resume_dir) / "snapshot", tracker)
        figures = summary | run.run()
        kept = run.kept
    if kept is not None:
        reference.load_state_dict(kept)
    facts = {
        "trained by": "preference optimisation (DPO)",
        "going on from": Path(model_from).name,
        "steps kept": figures["kept_step"],
        "pairs": figures["pairs"],
        "seed": params["seed"],
    }
    pipe.save_pretrained(Path(model_out), facts)
    with atomic_folder(Path(state_out)) as folder:
        shutil.copytree(state_from, folder, dirs_exist_ok=True)
        for name in ("pairs.parquet", "pairs.png"):
            shutil.copy(Path(resume_dir) / "pairs" / name, folder / name)
        if kept is not None:
            for name in ("model", "ema"):
                save_file(kept, folder / f"{name}.safetensors")
        state = read_json(folder / "state.json")
        write_json(folder / "state.json", state | {"dpo_steps": figures["kept_step"]})
    tracker.log_artifact(Path(state_out) / "pairs.png")
    write_json(Path(metrics_out), figures)
    shutil.rmtree(resume_dir, ignore_errors=True)
    return figures


class Tuning:
    """The optimisation itself: steps, checks on held-out pairs, snapshots.

    Every random number follows from the seed and the step, so a run that goes on from a
    snapshot ends with the same weights.
    """

    def __init__(
        self,
        reference: Network,
        pairs: PairSet,
        params: dict[str, Any],
        snapshot: Path,
        tracker: Tracker,
    ) -> None:
        self.reference, self.pairs, self.tracker, self.snapshot = (
            reference,
            pairs,
            tracker,
            snapshot,
        )
        self.settings, self.training = params["dpo"], params["training"]
        self.seed = int(params["seed"])
        self.model = copy.deepcopy(reference).train().requires_grad_(True)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=float(self.settings["lr"]), weight_decay=0.0
        )
        self.train_rows = np.flatnonzero(~pairs.held_out)
        self.check_rows = np.flatnonzero(pairs.held_out)
        self.step, self.kept_step = 0, 0
        self.kept = self._weights()
        self.history: list[dict[str, float]] = []
        self.fixed: list[tuple[Tensor, Tensor]] = []  # the reference's errors in the checks
        self.stopped = ""

    def _weights(self) -> dict[str, Tensor]:
        return {
            k: v.detach().cpu().clone().contiguous() for k, v in self.model.state_dict().items()
        }

    def run(self) -> dict[str, Any]:
        """Train until the steps are done or a check stops it; leaves the best weights in `kept`."""
        if self.snapshot.exists():
            self._load()
        steps, every = int(self.settings["steps"]), int(self.settings["check_every"])
        progress = Progress("dpo", steps, "steps")
        if not self.history:
            self._check()
        while self.step < steps and not self.stopped:
            loss = self._train_step()
            self.step += 1
            progress.at(self.step, f"loss {loss:.3f}")
            if self.step % every == 0 or self.step == steps:
                self._check()
                self._save()
        first, last = self.history[0], self.history[-1]
        kept = next(h for h in self.history if h["step"] == self.kept_step)
        return {
            "changed": self.kept_step > 0,
            "steps": self.step,
            "kept_step": self.kept_step,
            "stopped": self.stopped or "all steps done",
            "loss": kept["loss"],
            "accuracy": kept["accuracy"],
            "margin": kept["margin"],
            "winner_flow": {
                "before": first["winner"],
                "kept": kept["winner"],
                "last": last["winner"],
            },
            "history": self.history,
        }

    def _train_step(self) -> float:
        settings, batch = self.settings, min(int(self.settings["batch"]), len(self.train_rows))
        per_epoch = len(self.train_rows) // batch
        epoch, place = divmod(self.step, per_epoch)
        order = np.random.default_rng([self.seed, 1, epoch]).permutation(self.train_rows)
        rows = order[place * batch : (place + 1) * batch]
        rate = float(settings["lr"]) * min(1.0, (self.step + 1) / int(settings["warmup"]))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        draw = self.pairs.draw(rows, self.training, self.seed, 2, self.step)
        with torch.no_grad():
            reference = self.pairs.errors(self.reference, rows, draw)
        errors = self.pairs.errors(self.model, rows, draw)
        loss, _ = dpo_loss(*errors, *reference, float(settings["beta"]))
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()

    @torch.no_grad()
    def _check(self) -> None:
        """Measure on the held-out pairs, always on the same draws; keep the weights or stop."""
        inside, winners = [], []
        for repeat in range(int(self.settings["check_draws"])):
            draw = self.pairs.draw(self.check_rows, self.training, self.seed, 3, repeat)
            mine = self.pairs.errors(self.model, self.check_rows, draw)
            if len(self.fixed) <= repeat:
                self.fixed.append(self.pairs.errors(self.reference, self.check_rows, draw))
            reference = self.fixed[repeat]
            inside.append(dpo_loss(*mine, *reference, float(self.settings["beta"]))[1])
            winners.append(mine[0])
        # A pair's preference is that over all draws, as an expectation over t and noise.
        mean = torch.stack(inside).mean(dim=0)
        entry = {
            "step": self.step,
            "loss": float(-F.logsigmoid(mean).mean()),
            "accuracy": float((mean > 0).float().mean()),
            "margin": float(mean.mean()),
            "winner": float(torch.stack(winners).mean()),
        }
        self.history.append(entry)
        self.tracker.log_metrics(
            {f"dpo/{k}": v for k, v in entry.items() if k != "step"}, step=self.step
        )
        rise = entry["winner"] / self.history[0]["winner"] - 1
        if not np.isfinite(entry["loss"]) or rise > float(self.settings["winner_rise"]):
            self.stopped = f"winners' flow loss rose by {100 * rise:.1f} % at step {self.step}"
            return
        best = next(h["loss"] for h in self.history if h["step"] == self.kept_step)
        if self.step and entry["loss"] < best:
            self.kept, self.kept_step = self._weights(), self.step
        if self.step and entry["accuracy"] >= float(self.settings["enough"]):
            self.stopped = f"accuracy on held-out pairs reached {entry['accuracy']:.2f}"

    def _save(self) -> None:
        tensors = {f"model.{k}": v for k, v in self._weights().items()}
        tensors |= {f"kept.{k}": v for k, v in self.kept.items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{k}": v.cpu().contiguous() for k, v in state.items()}
        with atomic_folder(self.snapshot) as folder:
            save_file(tensors, folder / "tensors.safetensors")
            progress = {
                key: getattr(self, key) for key in ("step", "kept_step", "history", "stopped")
            }
            write_json(folder / "progress.json", progress)

    def _load(self) -> None:
        tensors = load_file(self.snapshot / "tensors.safetensors")
        try:
            self.model.load_state_dict(_under("model.", tensors))
        except RuntimeError as problem:
            raise UserError(
                f"{self.snapshot} is of another model; delete it to start the tuning again."
            ) from problem
        self.kept = _under("kept.", tensors)
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in _under("adam.", tensors).items():
            number, _, key = name.partition(".")
            state.setdefault(int(number), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        for key, value in read_json(self.snapshot / "progress.json").items():
            setattr(self, key, value)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
