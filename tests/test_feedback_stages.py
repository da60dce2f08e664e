"""The stages references, critic and dpo on a tiny set and a model that knows nothing."""

import io
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from safetensors.numpy import load_file
from safetensors.torch import save_file

from components.curation.shards import write_shard
from components.errors import UserError
from components.evaluation.drawing import draw_pictures
from components.feedback import pairs
from components.feedback.critic import critic
from components.feedback.references import references
from components.feedback.scores import read_scores
from components.files import read_json, write_json
from components.model import DJEPAPipeline
from components.model.djepa import DJEPA
from components.model.sampler import SamplerConfig
from components.scenes.draw import draw_scene
from components.scenes.world import World
from components.tokens.encode import encode
from components.tokens.encoded import EncodedSet
from components.tracking import Tracker
from components.training import preference
from tests.tiny_curated import tiny_config

ROOT = Path(__file__).parents[1]
N = 60


@pytest.fixture(scope="module")
def params():
    size, aspect = ({"mean": m, "std": 0, "low": m, "high": m} for m in (16, 0))
    phase = {"rungs": ["16x16"], "size": size, "aspect": aspect, "batch": 8}
    return {
        "seed": 0,
        "data": yaml.safe_load((ROOT / "params/data/scenes.yaml").read_text()),
        "evaluation": {
            **yaml.safe_load((ROOT / "params/evaluation/default.yaml").read_text()),
            "workers": 1,
        },
        "curation": {"limits": {"picture_bytes": 10**7, "text_bytes": 10**5, "pixels": 10**7}},
        "init": {"model": "none"},
        "model": {
            "tokenizer": {"kind": "patches", "patch": 4, "channels": 8},
            "text": {"kind": "words", "length": 16, "width": 32},
            "encode": {
                "most_cropped": 0.2,
                "batch_pixels": 65536,
                "captions": 128,
                "decoded": 100,
            },
        },
        "training": {
            "phase1": phase,
            "phase2": phase,
            "mask": {"mean": 0.9, "std": 0.2, "low": 0.5, "high": 1.0},
            "most_tokens": 4096,
            "flow_samples": 1,
            "time": {"distribution": "logit_normal", "mean": 0.0, "std": 1.0},
            "text_drop": 0.1,
        },
        "feedback": {
            "critic": "resnet18",
            "references": {
                "prompts": 6,
                "images": 2,
                "size": "16x16",
                "retrieved": 8,
                "index": "Flat",
                "among": 1000,
                "sampler": {},
            },
            "similarity": {"auto": -1.0, "human": 0.5},
            "simulated_rater": {"realism": 0.8, "noise": 0.1},
            "rounds": {"r1": {"model": "phase1", "critic": "none", "labels": "auto"}},
            "workers": 1,
            "critic_training": {
                "size": 16,
                "epochs": 1,
                "batch": 8,
                "lr": 0.003,
                "weight_decay": 0.0,
                "crop": 0.6,
                "folds": 2,
                "least": 8,
                "shown": 4,
            },
        },
        "dpo": {
            "pairs": {"source": "judge", "path": "pairs/judge", "most": 100},
            "adapter": "none",
            "lora": {"rank": 4, "alpha": 4},
            "realism_margin": 0.02,
            "each": 1,
            "bootstrap": 100,
            "patience": 100,
            "prompts": 6,
            "images": 2,
            "size": "16x16",
            "sampler": {},
            "held_out": 0.25,
            "least_pairs": 8,
            "beta": 100.0,
            "lr": 0.0003,
            "warmup": 1,
            "steps": 6,
            "batch": 4,
            "check_every": 3,
            "check_draws": 2,
            "enough": 2.0,
            "winner_rise": 1.0,
        },
    }


@pytest.fixture(scope="module")
def made(params, tmp_path_factory):
    """A folder with curated, encoded, models/phase1 and states/phase1."""
    root = tmp_path_factory.mktemp("made")
    world, rng = World.from_params(params["data"]), np.random.default_rng(0)
    (root / "curated").mkdir()
    samples, rows = [], []
    for i in range(N):
        scene, key, stream = world.sample_scene(rng), f"00000{i:04d}", io.BytesIO()
        Image.fromarray(draw_scene(scene, 32, 32, rng)).save(stream, "PNG")
        caption = scene.caption
        members = {"png": stream.getvalue(), "txt": caption.encode(), "json": b"{}"}
        samples.append((key, members))
        words = [word for word in ("red", "blue", "circle", "square") if word in caption]
        notions = {"notion_words": words, "source": "studio"}
        size = {"width": 32, "height": 32}
        rows.append({"key": key, "shard": "00000", "caption": caption} | size | notions)
    write_shard(root / "curated" / "00000.tar", samples)
    pd.DataFrame(rows).to_parquet(root / "curated" / "manifest.parquet")
    notions = {
        "notion": ["red", "blue", "circle", "square"],
        "kind": ["colour"] * 2 + ["shape"] * 2,
    }
    pd.DataFrame(notions).to_parquet(root / "curated" / "notions.parquet")
    encode(root / "curated", root / "encoded", root / "metrics.json", params, Tracker())
    encoded = EncodedSet.open(root / "encoded")
    torch.manual_seed(0)
    model = DJEPA(tiny_config(8, 32))
    sampler = SamplerConfig(2, 2, 1.0, 1.0, 1.0, 16, 16)
    pipe = DJEPAPipeline(model, encoded.tokenizer(), encoded.text_encoder(), sampler)
    pipe.save_pretrained(root / "models" / "phase1")
    state = root / "states" / "phase1"
    state.mkdir(parents=True)
    for name in ("model", "ema"):
        save_file(model.state_dict(), state / f"{name}.safetensors")
    write_json(state / "state.json", {"images": 5})
    return root


def make_references(made, out, params):
    metrics = out.with_suffix(".json")
    return references(
        made / "models/phase1", made / "encoded", out, metrics, "r1", params, Tracker()
    )


def test_references_are_a_geneval_folder_of_seen_prompts(made, params, tmp_path):
    figures = make_references(made, tmp_path / "r1", params)
    assert figures["pictures"] == 12 and figures["prompts"] == 6
    assert read_json(tmp_path / "r1.json") == figures
    table = pd.read_parquet(tmp_path / "r1" / "references.parquet")
    world = World.from_params(params["data"])
    assert len(table) == 12 and table["seed"].is_unique and (table["split"] == "seen").all()
    assert table["realism"].between(0, 1).all()
    for row in table.itertuples():
        picture = tmp_path / "r1" / row.file
        assert Image.open(picture).size == (16, 16)
        line = json.loads((picture.parents[1] / "metadata.jsonl").read_text())
        assert line == json.loads(row.metadata) and line["prompt"] == row.prompt
        assert not world.is_held_out(line)
    assert set(table["tag"]) == {
        "single_object", "two_object", "counting", "colors", "position", "color_attr"
    }  # fmt: skip
    assert (tmp_path / "r1" / "grid.png").is_file()
    # The same seed draws the same picture again.
    row = table.iloc[3]
    pipe = DJEPAPipeline.from_pretrained(made / "models/phase1")
    generator = torch.Generator().manual_seed(int(row["seed"]))
    again = pipe(row["prompt"], generator=generator).images[0]
    assert (np.asarray(again) == np.asarray(Image.open(tmp_path / "r1" / row["file"]))).all()


def test_retrieved_captions_are_near_their_prompts_and_have_features(made, params, tmp_path):
    make_references(made, tmp_path / "r1", params)
    table = pd.read_parquet(tmp_path / "r1" / "references.parquet")
    retrieved = pd.read_parquet(tmp_path / "r1" / "retrieved.parquet")
    vectors = load_file(tmp_path / "r1" / "features.safetensors")
    assert (retrieved.groupby("prompt_index").size() == 8).all()
    assert len(vectors["references"]) == len(table)
    assert len(vectors["retrieved"]) == retrieved["key"].nunique() == retrieved["row"].max() + 1
    captions = pd.read_parquet(made / "curated/manifest.parquet").set_index("key")["caption"]
    prompts = table.drop_duplicates("prompt_index").set_index("prompt_index")["prompt"]

    def shared(row):
        a, b = set(prompts[row["prompt_index"]].split()), set(captions[row["key"]].split())
        return len(a & b) / len(a)

    near = retrieved.apply(shared, axis=1).mean()
    far = np.mean(
        [shared({"prompt_index": p, "key": k}) for p in prompts.index for k in captions.index]
    )
    assert near > far + 0.1


def test_critic_after_references_that_are_all_wrong_drops_nothing(made, params, tmp_path):
    make_references(made, tmp_path / "r1", params)
    # Whatever the detector sees in the noise that this model draws.
    table = pd.read_parquet(tmp_path / "r1" / "references.parquet").assign(label=False)
    table.to_parquet(tmp_path / "r1" / "references.parquet")
    out, metrics = tmp_path / "critic", tmp_path / "critic.json"
    report = critic(
        tmp_path / "r1", made / "curated", None, tmp_path / "no", out, metrics, "r1", params,
        Tracker(),
    )  # fmt: skip
    assert report["references_positive"] == 0 and not report["drops"]
    assert read_scores(out, EncodedSet.open(made / "encoded")) is None


def test_pictures_do_not_depend_on_the_number_of_processes(made):
    jobs = [(f"a photo of {n} red circles", 7 + i) for i, n in enumerate(["two", "three"] * 5)]

    def drawn(workers):
        model = made / "models/phase1"
        pictures = draw_pictures(
            model, jobs, (16, 16), 4, {"autoregressive_steps": 3}, workers, "test"
        )
        return [np.asarray(picture) for picture in pictures]

    one, two = drawn(1), drawn(2)
    assert len(one) == len(jobs) and not (one[0] == one[2]).all()  # the seed matters
    assert all((a == b).all() for a, b in zip(one, two, strict=True))
    with pytest.raises(UserError, match=r"evaluation\.workers is 0"):
        drawn(0)


def test_what_a_drawing_process_refuses_is_said_in_words(made, tmp_path):
    jobs = [("a photo of a red circle", i) for i in range(4)]
    with pytest.raises(UserError, match="not a saved model"):
        list(draw_pictures(tmp_path / "no", jobs, (16, 16), 2, {}, 2, "test"))


def test_unknown_round_is_refused(made, params, tmp_path):
    with pytest.raises(UserError, match="r7"):
        references(
            made / "models/phase1", made / "encoded", tmp_path / "r7", tmp_path / "m.json", "r7",
            params, Tracker(),
        )  # fmt: skip


def test_without_a_critic_both_stages_take_no_time_and_no_torch(tmp_path):
    code = """
import sys
from pathlib import Path
from components.feedback.critic import critic
from components.feedback.references import references
from components.tracking import Tracker
params = {"feedback": {"critic": "none"}}
here, none = Path(sys.argv[1]), Path("absent")
references(none, none, here / "references", here / "a.json", "r1", params, Tracker())
critic(none, none, None, none, here / "critic", here / "b.json", "r1", params, Tracker())
assert not {"torch", "faiss", "sklearn"} & set(sys.modules)
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=ROOT,
                   env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # CPU seconds, which other work on the machine does not change; two on an idle core.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10
    assert pd.read_parquet(tmp_path / "references" / "references.parquet").empty
    assert not read_json(tmp_path / "critic" / "config.json")["drops"]


def run_dpo(made, out, params, resume):
    return preference.dpo(
        made / "states/phase1", made / "models/phase1", made / "encoded", out / "model",
        out / "state", out / "dpo.json", resume, params, Tracker(),
    )  # fmt: skip


def weights(folder):
    return load_file(folder / "model/transformer/diffusion_pytorch_model.safetensors")


def test_too_few_pairs_leave_the_model_as_it_is(made, params, tmp_path):
    figures = run_dpo(made, tmp_path, params, tmp_path / "resume")
    assert not figures["changed"] and "copied unchanged" in figures["stopped"]
    before = load_file(made / "models/phase1/transformer/diffusion_pytorch_model.safetensors")
    assert all((before[k] == v).all() for k, v in weights(tmp_path).items())
    assert read_json(tmp_path / "dpo.json")["pictures"] == 12


@pytest.fixture
def with_pairs(params, monkeypatch):
    """Pictures of the right kind win, noise loses."""

    world = World.from_params(params["data"])
    prompts = world.training_prompts()[:12]

    def drawn(*_):
        rng = np.random.default_rng(0)
        for metadata in prompts:
            for k in range(2):
                scene = world.scene_for(metadata, rng)
                noise = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
                yield Image.fromarray(draw_scene(scene, 16, 16, rng) if k == 0 else noise)

    monkeypatch.setattr(pairs, "_prompts", lambda *_: prompts)
    monkeypatch.setattr(pairs, "draw_pictures", drawn)


def test_dpo_writes_a_model_that_draws_a_state_and_its_pairs(made, params, tmp_path, with_pairs):
    # Long enough that a handful of held-out pairs is not left to chance.
    longer = params | {"dpo": params["dpo"] | {"steps": 60, "check_every": 20, "lr": 0.001}}
    figures = run_dpo(made, tmp_path, longer, tmp_path / "resume")
    assert figures["pairs"] == 12 and figures["changed"]
    assert figures["loss"] < np.log(2) and figures["accuracy"] > 0.5
    pipe = DJEPAPipeline.from_pretrained(tmp_path / "model")
    assert pipe(["a photo of a red circle"], width=16, height=16).images[0].size == (16, 16)
    before = load_file(made / "models/phase1/transformer/diffusion_pytorch_model.safetensors")
    after, state = weights(tmp_path), load_file(tmp_path / "state/model.safetensors")
    assert any((before[k] != v).any() for k, v in after.items())
    assert all((state[k] == v).all() for k, v in after.items())
    table = pd.read_parquet(tmp_path / "state/pairs.parquet")
    assert table["winner_correct"].all() and not table["loser_correct"].any()
    assert (tmp_path / "state/pairs.png").is_file()
    assert read_json(tmp_path / "state/state.json")["images"] == 5


def test_dpo_goes_on_without_drawing_its_pairs_again(
    made, params, tmp_path, with_pairs, monkeypatch
):
    run_dpo(made, tmp_path / "whole", params, tmp_path / "resume-whole")
    step = preference.Tuning._train_step

    def killed(self):
        if self.step == 4:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(preference.Tuning, "_train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        run_dpo(made, tmp_path / "cut", params, tmp_path / "resume")
    monkeypatch.setattr(preference.Tuning, "_train_step", step)
    monkeypatch.setattr(pairs, "draw_pictures", None)
    run_dpo(made, tmp_path / "cut", params, tmp_path / "resume")
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all((cut[k] == v).all() for k, v in whole.items())
