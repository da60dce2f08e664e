"""The stage dpo: direct preference optimisation (paper, section 4; Diffusion-DPO).

The paper gives neither pairs nor settings. Here a pair is two pictures of one prompt, by
default the model's own that the judge of win rates tells apart. Training stops, and goes back to
the best step, when held-out pairs are told apart no better or before the winners themselves are
drawn worse.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from components.errors import UserError
from components.feedback.pair_set import PairSet, draw_or_read
from components.files import atomic_folder, hash_of, read_json, remove_folder, write_json
from components.model import DJEPAPipeline
from components.tracking import Tracker
from components.training.policy import Adapter, Policy, WholeModel
from components.training.preference_plot import preference_plot
from components.training.tuning import Tuning

LEFT_OUT = ("ties", "unlabelled", "rejected")  # figures of a source


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
    """Tune the model in `model_from` on preference pairs, by default those that it draws itself.

    Writes the tuned pipeline to `model_out`, the state to `state_out` (that of `state_from`
    with the tuned weights, pairs.parquet, pairs.png, rejects.parquet of what no pair could be made
    of, curves.png and, with `dpo.adapter: lora`, the adapter for `model_from` as peft's files in
    lora/) and the figures to `metrics_out`; returns them. Snapshots in `resume_dir` let a
    killed run go on to the same weights; they are removed at the end. With fewer than
    `dpo.least_pairs` pairs of the judge's, or of one prompt only, the model is copied unchanged and
    the figures say so; of a source that was given that is a UserError.
    """
    settings = params["dpo"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = DJEPAPipeline.from_pretrained(model_from).to(device)
    # Pairs and snapshots of other files than there are now are left alone.
    work = Path(resume_dir) / _stamp(settings["pairs"])
    pairs, figures = draw_or_read(work / "pairs", Path(model_from), pipe, Path(encoded), params)
    figures |= {"source": settings["pairs"]["source"], "adapter": settings["adapter"]}
    tuned = False
    if why := _too_few(pairs, figures, settings):
        print(f"dpo: {why}", flush=True)
        figures |= {"changed": False, "kept_step": 0, "stopped": why}
    else:
        policy = _policy(pipe, settings, int(params["seed"]))
        run = Tuning(policy, pairs, params, work / "snapshot", tracker)
        figures |= run.run()
        policy.finish(run.kept, work / "lora")
        preference_plot(run.history, run.kept_step, work / "curves.png")
        tuned = True
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
        for file in ("pairs/pairs.parquet", "pairs/pairs.png", "pairs/rejects.parquet"):
            if (work / file).exists():
                shutil.copy(work / file, folder)
        if tuned:
            shutil.copy(work / "curves.png", folder)
            weights = {k: v.cpu().contiguous() for k, v in pipe.transformer.state_dict().items()}
            for name in ("model", "ema"):
                save_file(weights, folder / f"{name}.safetensors")
        if (work / "lora").exists():
            shutil.copytree(work / "lora", folder / "lora", dirs_exist_ok=True)
        state = read_json(folder / "state.json")
        write_json(folder / "state.json", state | {"dpo_steps": figures["kept_step"]})
    for name in ("pairs.png", "curves.png"):
        if (Path(state_out) / name).exists():
            tracker.log_artifact(Path(state_out) / name)
    write_json(Path(metrics_out), figures)
    remove_folder(Path(resume_dir))  # half of its pairs would be taken for all of them
    return figures


def _stamp(source: Mapping[str, Any]) -> str:
    """A name that changes when a file of the source does: its size, or its time of change."""
    if source["source"] == "judge":
        return "judge"
    path = Path(source["path"])
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    states = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    return hash_of([dict(source), states])


def _too_few(pairs: PairSet, figures: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Why nothing is trained on these pairs, or "". UserError if they come from given files."""
    count, least = len(pairs.held_out), int(settings["least_pairs"])
    if count >= least and pairs.held_out.any():
        return ""
    why = f"{count} pairs, fewer than dpo.least_pairs {least}"
    if count >= least:
        why = f"{count} pairs, all of one prompt: none can be held out"
    source = settings["pairs"]
    if source["source"] != "judge":
        counts = ", ".join(f"{n} {figures[n]}" for n in LEFT_OUT if n in figures)
        raise UserError(
            f"{source['path']} gives {why} ({counts or 'nothing was left out'}): add pairs, or "
            "lower dpo.least_pairs; docs/dpo.md says what is left out."
        )
    return f"{why}: the model is copied unchanged."


def _policy(pipe: DJEPAPipeline, settings: Mapping[str, Any], seed: int) -> Policy:
    if settings["adapter"] == "lora":
        return Adapter(pipe, int(settings["lora"]["rank"]), float(settings["lora"]["alpha"]), seed)
    return WholeModel(pipe)
