"""Packs a trained model as the starter: bfloat16 weights, its world, a card with curves and scores.

Its training is another checkout's to repeat: the card names the one command, and params.yaml beside
it has every number.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from components.errors import UserError
from components.files import atomic_file, atomic_folder, read_json, read_yaml, write_json
from components.model import DJEPAPipeline
from components.model.sampler import SamplerConfig
from components.scenes.tasks import TASKS
from components.starter import FOLDER, WORLD
from components.starter.begin import weights_hash

AGAIN = "python -m flows.starter"
INIT = Path("params/init/starter.yaml")
INIT_TEXT = """\
# Phase 1 goes on from the model that comes with the package, and so do the rounds and dpo after it;
# with training.phase1.images=0 they go on from that model itself. Written by `djepa pack`.
model: components/starter/model
weights: {weights}
"""
MOST = 16 * 2**20  # bytes of weights that the repository takes


def pack(
    model: Path,
    params: Mapping[str, Any],
    trained: Path,
    data: Path,
    scored: tuple[Path, Path] | None = None,
    folder: Path = FOLDER,
    init: Path = INIT,
) -> None:
    """Write the model folder `model` to `folder`, and its weights' hash to `init`.

    Args:
        model: of the stage phase1.
        params: the whole of params.yaml, which it was trained with.
        trained: the stage's metrics.
        data: data.dvc, which names the pictures it was trained on.
        scored: metrics and samples of evaluating what was packed before, for the card.

    Raises:
        UserError: nothing was trained here, or the weights are larger than the repository takes.
    """
    for file in (model / "model_index.json", trained, *(scored[:1] if scored else ())):
        if not file.is_file():
            raise UserError(
                f"{file} is not there: `{AGAIN}` trains, packs and scores with one command."
            )
    pipeline = DJEPAPipeline.from_pretrained(model)
    metrics = read_json(trained)
    pipeline.sampler = SamplerConfig.from_params(params)
    pipeline.transformer.to(torch.bfloat16)
    size = sum(p.numel() * p.element_size() for p in pipeline.transformer.state_dict().values())
    if size > MOST:
        raise UserError(
            f"The weights of {model} are {size / 2**20:.1f} MiB in bfloat16, of {MOST >> 20} that "
            "the repository takes: pack a smaller network (params/model)."
        )
    with atomic_folder(folder) as target:
        # A folder of a pipeline is written whole, so that what stands beside comes after it.
        pipeline.save_pretrained(target, _facts(params, metrics, data))
        write_json(target / WORLD, _world(params))
        card = target / "card"
        card.mkdir()
        (card / "params.yaml").write_text(yaml.safe_dump(dict(params), sort_keys=False))
        write_json(card / "training.json", metrics)
        _curves(metrics, card)
        text = (target / "README.md").read_text() + _curves_section(metrics)
        if scored is not None:
            scores = read_json(scored[0])
            write_json(card / "scores.json", scores)
            shutil.copy(scored[1] / "grid.png", card)
            text += _scores_section(scores["geneval"])
            text += "\n![Prompts and what it drew](card/grid.png)\n"
        (target / "README.md").write_text(text)
    with atomic_file(init) as temporary:
        temporary.write_text(INIT_TEXT.format(weights=weights_hash(folder)))


def _world(params: Mapping[str, Any]) -> dict[str, Any]:
    data = {name: value for name, value in params["data"].items() if name != "encode"}
    return {"scale": params["scale"], "data": data}


def _facts(params: Mapping[str, Any], metrics: Mapping[str, Any], data: Path) -> dict[str, Any]:
    record = read_yaml(data)["outs"][0]
    settings, world = params["training"], params["data"]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "trained by": f"the stage phase1 at scale `{params['scale']}`, nothing after it",
        "again": f"`{AGAIN}`; every number is in [card/params.yaml](card/params.yaml)",
        "on": device or f"{os.cpu_count()} CPU cores, {settings['workers']} processes",
        "for": f"{metrics['seconds'] / 60:.0f} minutes",
        "images a second": f"{metrics['images_per_second']:.0f}",
        "images seen": f"{metrics['images']:,}",
        "steps": f"{metrics['steps_total']:,}, {settings['phase1']['batch']} images each",
        "seed": params["seed"],
        "raw pictures": f"{world['raw']['pictures']:,}, DVC's hash `{record['md5']}`",
        "shapes": ", ".join(world["shapes"]),
        "colours": ", ".join(world["colors"]),
        "weights": "the running average, rounded to bfloat16",
    }


def _curves(metrics: Mapping[str, Any], card: Path) -> None:
    from components.evaluation.plots import curve_plot, validation_plot

    curve_plot(metrics["history"], "starter", card / "curves.png")
    if metrics["validation"].get("history"):
        validation_plot(metrics["validation"], "starter", card / "validation.png")


def _curves_section(metrics: Mapping[str, Any]) -> str:
    text = "\n## Curves\n\n![Losses in training](card/curves.png)\n"
    if metrics["validation"].get("history"):
        text += "\n![Losses on pictures held out](card/validation.png)\n"
    return text


def _scores_section(scores: Mapping[str, Any]) -> str:
    """GenEval's rules on the embedded world: held-out and seen, with floor and error."""
    seen, gain = scores["seen"], scores["difference"]
    lines = ["| | held-out | seen | chance |", "|---|---|---|---|"]
    for task in TASKS:
        found = [scores["tasks"], seen["tasks"], scores["chance_tasks"]]
        cells = [f"{part[task]:.3f}" if task in part else "–" for part in found]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    overall = (
        f"| **overall** | **{scores['overall']:.3f} ± {scores['stderr']:.3f}** | "
        f"{seen['overall']:.3f} ± {seen['stderr']:.3f} | {scores['chance']:.3f} |"
    )
    return "\n".join(
        [
            "\n## Scores\n",
            "GenEval's tasks and rules on the project's own drawn world, judged by its own "
            "detector: not GenEval itself. Held-out: combinations that no training picture shows. "
            "single_object has no combination to hold out, so that its seen prompts stand in both "
            "columns. Chance: the same pictures under other prompts of the same task. ±: standard "
            f"error, clustered by prompt; one seed. {scores['n']} held-out pictures. Gain over "
            f"chance {gain['mean']:.3f} [{gain['low']:.3f}, {gain['high']:.3f}].\n",
            *lines,
            overall,
            "",
        ]
    )
