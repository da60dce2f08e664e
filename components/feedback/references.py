"""Reference set and retrieval: what the critic is made from (paper, section 3.2, Fig. 5 a, b).

The current model draws pictures of prompts that cover the notions; each is labelled by
whether it meets its prompt. Training pictures with similar captions are looked up, and both
kinds of pictures described by a vector (describe.py).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from components.errors import UserError
from components.files import atomic_file, atomic_folder, write_json
from components.tracking import Tracker

COLUMNS = [
    "prompt_index", "tag", "prompt", "metadata", "seed", "file", "label", "reason", "realism",
    "split",
]  # fmt: skip


def references(
    model_dir: Path,
    encoded: Path,
    out: Path,
    metrics_out: Path,
    round_name: str,
    params: dict[str, Any],
    tracker: Tracker,
) -> dict[str, Any]:
    """Draw, label and describe round `round_name`'s reference set; returns its figures.

    Writes into `out` GenEval folders (00000/metadata.jsonl, samples/0000.png …),
    references.parquet (`COLUMNS` and `row`, the row of its features; `label` by GenEval's rule,
    `realism` as the judge of pairs measures it), retrieved.parquet
    (prompt_index, key, text_similarity, row), features.safetensors (references, retrieved:
    float16 (rows, D)) and grid.png (right above, wrong below); the figures to `metrics_out`.
    With `feedback.critic: none` an empty set.
    """
    with atomic_folder(out) as folder:
        if params["feedback"]["critic"] == "none":
            pd.DataFrame(columns=[*COLUMNS, "row"]).to_parquet(folder / "references.parquet")
            summary: dict[str, Any] = {"pictures": 0, "why": "feedback.critic: none"}
        else:
            summary = _references(Path(model_dir), Path(encoded), folder, round_name, params)
            tracker.log_metrics(
                {
                    "references/pictures": summary["pictures"],
                    "references/positive_share": summary["positive_share"],
                }
            )
            tracker.log_artifact(folder / "grid.png")
    write_json(Path(metrics_out), summary)
    return summary


def _references(
    model_dir: Path, encoded_dir: Path, folder: Path, round_name: str, params: dict[str, Any]
) -> dict[str, Any]:
    # Torch only from here on: an empty set must not pay for its import.
    from safetensors.numpy import save_file

    from components.evaluation.detector import realism
    from components.evaluation.embedded import detector_of
    from components.feedback import describe
    from components.feedback.pictures import cover, draw_and_judge, training_prompts
    from components.feedback.retrieval import retrieve, searched
    from components.model import DJEPAPipeline
    from components.scenes.world import World
    from components.tokens.encoded import EncodedSet, rung_size

    settings = params["feedback"]["references"]
    encoded = EncodedSet.open(encoded_dir)
    world = World.from_params(params["data"])
    if round_name not in params["feedback"]["rounds"]:
        raise UserError(
            f"Round {round_name!r} is not in feedback.rounds; add it in params/feedback."
        )
    prompts = cover(
        training_prompts(world),
        encoded.attribute_names["notion"],
        int(settings["prompts"]),
        int(params["seed"]),
    )
    size = rung_size(settings["size"])
    # Other rounds get other seeds: a refreshed critic is to see new pictures.
    first_seed = 1_000_000 * (1 + list(params["feedback"]["rounds"]).index(round_name))
    rows: list[dict[str, Any]] = []
    images: list[Any] = []
    detector = detector_of(world, params["evaluation"]["detector"])
    for judged in draw_and_judge(
        model_dir,
        detector,
        prompts,
        int(settings["images"]),
        size,
        first_seed,
        f"references {round_name}",
        settings["sampler"],
        int(params["evaluation"]["workers"]),
    ):
        place = folder / f"{judged.prompt_index:05d}"
        if not place.exists():
            (place / "samples").mkdir(parents=True)
            (place / "metadata.jsonl").write_text(json.dumps(judged.metadata) + "\n")
        number = len(list((place / "samples").iterdir()))
        file = f"{place.name}/samples/{number:04d}.png"
        judged.image.save(folder / file)
        rows.append(
            {
                "prompt_index": judged.prompt_index,
                "tag": judged.metadata["tag"],
                "prompt": judged.metadata["prompt"],
                "metadata": json.dumps(judged.metadata),
                "seed": judged.seed,
                "file": file,
                "label": judged.correct,
                "reason": judged.reason,
                "realism": realism(detector.blobs(judged.image)),
                "split": "seen",
                "row": len(rows),
            }
        )
        images.append(judged.image)
    table = pd.DataFrame(rows, columns=[*COLUMNS, "row"])
    table.to_parquet(folder / "references.parquet", index=False)
    _grid(folder / "grid.png", table, images)

    pipe = DJEPAPipeline.from_pretrained(model_dir)
    # Only samples that reach a rung have latents, and are ever trained on.
    seed = int(params["seed"])
    rows_of = [encoded.rows(rung) for rung in encoded.rungs]
    usable = searched(rows_of, len(encoded), int(settings["among"]), seed)
    texts = encoded.columns(["key", "caption"], usable)
    prompt, position, similarity = retrieve(
        describe.texts(pipe, [m["prompt"] for m in prompts]),
        texts["caption"].tolist(),
        lambda places: describe.captions(encoded, usable[places]),
        int(settings["retrieved"]),
        str(settings["index"]),
        seed,
    )
    ids, row = np.unique(usable[position], return_inverse=True)
    pd.DataFrame(
        {
            "prompt_index": prompt,
            "key": texts["key"].astype(str).to_numpy()[position],
            "text_similarity": similarity,
            "row": row,
        }
    ).to_parquet(folder / "retrieved.parquet", index=False)
    save_file(
        {
            "references": describe.pooled(describe.encode_images(pipe, images)).astype(np.float16),
            "retrieved": describe.samples(encoded, ids).astype(np.float16),
        },
        folder / "features.safetensors",
    )
    return {
        "round": round_name,
        "pictures": len(table),
        "prompts": len(prompts),
        "positive_share": float(table["label"].mean()),
        "positive_share_by_task": {
            k: float(v) for k, v in table.groupby("tag")["label"].mean().items()
        },
        "searched": len(usable),
        "captions": int(texts["caption"].nunique()),
        "retrieved": len(ids),
        "features": "mean and standard deviation of the latent channels",
    }


def _grid(out: Path, table: pd.DataFrame, images: list[Any], columns: int = 8) -> None:
    """Draw up to two rows of right and two rows of wrong pictures, prompts under them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(4, columns, figsize=(1.6 * columns, 7.6), dpi=80)
    for axis in axes.ravel():
        axis.axis("off")
    for first, label, word in ((0, True, "right"), (2, False, "wrong")):
        # Spread over the prompts, which are in the order of the rows.
        found = table.index[table["label"] == label].to_numpy()
        picked = found[np.linspace(0, len(found) - 1, min(2 * columns, len(found))).astype(int)]
        for axis, i in zip(axes[first : first + 2].ravel(), picked, strict=False):
            axis.imshow(images[i], interpolation="nearest")
            prompt = str(table["prompt"][i]).removeprefix("a photo of ")
            axis.set_title(f"{word}: {prompt}", fontsize=6, wrap=True)
    figure.tight_layout()
    with atomic_file(out) as temporary:
        figure.savefig(temporary, format="png")
    pyplot.close(figure)
