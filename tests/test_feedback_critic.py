"""Retrieval, inherited labels and the critic on small made-up sets."""

import io
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save_file

from components.curation.shards import write_shard
from components.errors import UserError
from components.feedback.classifier import build
from components.feedback.critic import critic
from components.feedback.quality import no_better_than_chance, quality
from components.feedback.retrieval import folds, inherit, retrieve, searched, unit
from components.feedback.scores import read_scores
from components.files import read_json, write_json
from components.tokens.pictures import keys_hash
from components.tracking import Tracker

N = 96  # curated pictures: even ones red, odd ones blue
REFERENCES = 12  # drawn of each of the two prompts


@dataclass
class Encoded:
    """What the scores are compared with: an encoded set of these keys."""

    of: list[str]

    @property
    def keys(self):
        return keys_hash(self.of)

    def __len__(self):
        return len(self.of)


def params(critic="resnet18", labels="auto", **training):
    return {
        "seed": 0,
        "curation": {"limits": {"picture_bytes": 10**7, "text_bytes": 10**5, "pixels": 10**7}},
        "feedback": {
            "critic": critic,
            "similarity": {"auto": 0.3, "human": 0.5},
            "simulated_rater": {"realism": 0.5, "noise": 0.0},
            "rounds": {"r1": {"model": "phase1", "critic": "none", "labels": labels}},
            "workers": 1,
            "critic_training": {
                "size": 16,
                "epochs": 3,
                "batch": 16,
                "lr": 0.003,
                "weight_decay": 0.0005,
                "crop": 0.6,
                "folds": 2,
                "least": 8,
                "shown": 4,
            }
            | training,
        },
    }


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A curated set and references: prompt 0 (red) is done well, prompt 1 (blue) is not."""
    root = tmp_path_factory.mktemp("sets")
    rng = np.random.default_rng(0)
    curated, references = root / "curated", root / "references"
    curated.mkdir()
    references.mkdir()
    keys = [f"{i // 50:05d}{i % 50:04d}" for i in range(N)]
    for shard in ("00000", "00001"):
        samples = []
        for i, key in enumerate(keys):
            if key[:5] == shard:
                pixels = rng.integers(0, 120, (24, 20, 3), dtype=np.uint8)
                pixels[:, :, 0 if i % 2 == 0 else 2] += 120
                stream = io.BytesIO()
                Image.fromarray(pixels).save(stream, "PNG")
                samples.append((key, {"png": stream.getvalue(), "txt": b"x", "json": b"{}"}))
        write_shard(curated / f"{shard}.tar", samples)
    manifest = {"key": keys, "shard": [k[:5] for k in keys], "caption": "x"}
    pd.DataFrame(manifest | {"width": 20, "height": 24}).to_parquet(curated / "manifest.parquet")
    table = pd.DataFrame(
        {
            "prompt_index": np.repeat([0, 1], REFERENCES),
            "file": [f"{p:05d}/samples/{s:04d}.png" for p in (0, 1) for s in range(REFERENCES)],
            "label": np.repeat([True, False], REFERENCES),
            "realism": 0.9,
            "seed": range(2 * REFERENCES),
            "row": range(2 * REFERENCES),
        }
    )
    table.to_parquet(references / "references.parquet")
    spread = np.tile(np.linspace(-0.25, 0.25, REFERENCES), 2)
    direction = np.stack([np.repeat([1.0, -1.0], REFERENCES), spread], axis=1)
    features = np.where(np.arange(N)[:, None] % 2 == 0, 1.0, -1.0) * [[1.0, 0.0]]
    features = features + 0.1 * rng.standard_normal((N, 2))
    features[0] = [0.0, 5.0]  # close to no reference
    save_file(
        {"references": direction.astype(np.float16), "retrieved": features.astype(np.float16)},
        references / "features.safetensors",
    )
    pd.DataFrame(
        {"prompt_index": np.arange(N) % 2, "key": keys, "row": np.arange(N), "text_similarity": 1.0}
    ).to_parquet(references / "retrieved.parquet")
    return curated, references


def run(sets, out, params, previous=None, labels=None):
    curated, references = sets
    labels, metrics = labels or out / "none", out.parent / "metrics.json"
    return critic(references, curated, previous, labels, out, metrics, "r1", params, Tracker())


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "IVF4,PQ4x4"])
def test_retrieval_finds_the_nearest_captions(factory):
    rng = np.random.default_rng(0)
    vectors = unit(rng.standard_normal((200, 8)))
    captions = [f"caption {i}" for i in range(200)]
    asked = []

    def of(places):
        asked.append(len(places))
        return vectors[places]

    prompt, sample, cosine = retrieve(vectors[[3, 7]], captions, of, 5, factory)
    assert max(asked) <= 1024
    for p, own in enumerate((3, 7)):
        mine = sample[prompt == p]
        assert len(mine) == 5 and own in mine and (np.diff(cosine[prompt == p]) <= 0).all()
    if factory == "Flat":
        best = np.argsort(-(vectors[[3, 7]] @ vectors.T), axis=1)[:, :5]
        assert sample.reshape(2, 5).tolist() == best.tolist()


def test_equal_captions_are_indexed_once_and_come_earliest_first():
    words = ["a", "b", "c"]
    captions = [words[i % 3] for i in range(30)]
    vectors, made = {"a": [1.0, 0.0], "b": [0.6, 0.8], "c": [1.0, 0.0]}, []

    def of(places):
        made.extend(places)
        return np.array([vectors[captions[place]] for place in places])

    _, sample, cosine = retrieve(np.array([[2.0, 0.0]]), captions, of, 14, "Flat")
    # "a" and "c" are equally near; all of one follow its first sample.
    assert sample.tolist() == [*range(0, 30, 3), *range(2, 14, 3)]
    assert np.allclose(cosine, 1) and len(set(made)) == 3
    assert len(retrieve(np.array([[2.0, 0.0]]), captions, of, 99, "Flat")[1]) == 30


@pytest.mark.parametrize("factory", ["Flatt", "IVF64,PQ4"])
def test_an_index_that_cannot_be_made_is_refused(factory):
    vectors = np.eye(8, dtype=np.float32)
    with pytest.raises(UserError, match=r"feedback\.references\.index"):
        retrieve(vectors, [str(i) for i in range(8)], lambda p: vectors[p], 2, factory)


def test_of_a_large_set_as_many_captions_as_said_are_searched():
    rows = [np.arange(0, 10**6, 2), np.arange(0, 10**6, 3)]
    some = searched(rows, 10**6, 500, 0)
    assert len(some) == 500 and (np.diff(some) > 0).all()
    assert ((some % 2 == 0) | (some % 3 == 0)).all()
    assert (some == searched(rows, 10**6, 500, 0)).all()
    assert (some != searched(rows, 10**6, 500, 1)).any()
    assert len(searched([np.arange(10), np.arange(5, 20)], 20, 500, 0)) == 20
    assert len(searched([np.array([7])], 10**6, 500, 0)) <= 1


def test_faiss_and_torch_work_in_one_process():
    code = """
import faiss, torch
import numpy as np
from components.feedback.retrieval import retrieve
torch.set_num_threads(2)
x = torch.randn(600, 600)
vectors = np.random.default_rng(0).standard_normal((2000, 32)).astype(np.float32)
for _ in range(3):
    x = torch.nn.functional.normalize(x @ x)
    retrieve(vectors[:9], [str(i) for i in range(2000)], lambda p: vectors[p], 3)
print(float(x.sum()) == float(x.sum()))
"""
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr


@settings(deadline=None)
@given(st.integers(0, 1000), st.floats(-1, 1))
def test_labels_come_from_the_nearest_reference_of_the_same_prompt(seed, threshold):
    rng = np.random.default_rng(seed)
    features, prompt = unit(rng.standard_normal((20, 3))), rng.integers(3, size=20)
    others, other_prompt = unit(rng.standard_normal((9, 3))), np.arange(9) % 3
    labels = rng.random(9) < 0.5
    found = inherit(features, prompt, others, other_prompt, labels, threshold)
    for i, row in found.iterrows():
        mine = np.flatnonzero(other_prompt == prompt[i])
        best = mine[np.argmax(others[mine] @ features[i])]
        assert row["label"] == labels[best]
        assert row["close"] == (row["similarity"] >= threshold)
    higher = inherit(features, prompt, others, other_prompt, labels, threshold + 0.2)
    assert higher["close"].sum() <= found["close"].sum()


def test_quality_of_known_scores():
    labels, own = np.array([True] * 50 + [False] * 50), np.arange(100)
    perfect = quality(labels, labels.astype(float), own, 0, 100)
    assert perfect["auroc"] == 1.0 and perfect["ece"] == 0.0 and perfect["brier"] == 0.0
    assert no_better_than_chance(perfect) is None
    guess = quality(labels, np.random.default_rng(0).random(100), own, 0, 100)
    low, high = guess["auroc_interval"]
    assert low < guess["auroc"] < high and low < 0.5 < high
    assert f"{low:.3f} to {high:.3f}" in no_better_than_chance(guess)
    alike = quality(np.ones(5, bool), np.ones(5), own[:5], 0)
    assert alike["auroc"] is None and "all alike" in no_better_than_chance(alike)


def test_pictures_with_one_label_in_common_are_no_independent_evidence():
    rng = np.random.default_rng(1)
    labels, scores = rng.random(200) < 0.5, rng.random(200)
    scores += 0.3 * labels
    alone = quality(labels, scores / 2, np.arange(200), 0)["auroc_interval"]
    labels, scores = np.repeat(labels[:20], 10), np.repeat(scores[:20], 10)
    together = quality(labels, scores / 2, np.repeat(np.arange(20), 10), 0)["auroc_interval"]
    assert together[1] - together[0] > 2 * (alone[1] - alone[0])


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.integers(2, 5))
def test_a_label_is_never_learned_and_held_out(seed, count):
    rng = np.random.default_rng(seed)
    reference = rng.integers(40, size=300)
    labels = (reference % 3) == 0
    held = np.zeros(300, int)
    for learned, out in folds(labels, reference, count, seed):
        assert not set(reference[learned]) & set(reference[out])
        assert len(set(labels[learned])) == 2
        held[out] += 1
    assert (held == 1).all()


@pytest.mark.parametrize("side", [32, 40, 64])
def test_leaving_out_the_padding_changes_no_value_and_no_gradient(side):
    network, plain = build(0).eval(), timm.create_model("resnet18", num_classes=1).eval()
    for block in network.layer4:
        torch.nn.init.ones_(block.bn2.weight)  # zero at first, and with it all gradients
    plain.load_state_dict(network.state_dict())
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    outs = [net(x) for net in (network, plain)]
    grads = [torch.autograd.grad(out.sum(), net.layer4[0].conv1.weight)[0]
             for out, net in zip(outs, (network, plain), strict=True)]  # fmt: skip
    for ours, theirs in (outs, grads):
        assert theirs.abs().max() > 0
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_critic_learns_labels_and_scores_every_curated_picture(sets, tmp_path):
    report = run(sets, tmp_path / "r1", params())
    assert report["drops"] and report["labelled"] == N - 1 and report["not_close"] == 1
    assert report["auroc"] > 0.8 and report["started_from"] != "previous critic"
    scores = pd.read_parquet(tmp_path / "r1" / "scores.parquet")
    assert len(scores) == N and scores["score"].between(0, 1).all()
    assert scores["score"][::2].mean() > scores["score"][1::2].mean() + 0.2
    for name in ("critic.safetensors", "config.json", "report.json", "critic.png"):
        assert (tmp_path / "r1" / name).is_file()
    again = run(sets, tmp_path / "r2", params(epochs=1, lr=1e-9), previous=tmp_path / "r1")
    assert again["started_from"] == "previous critic" and again["auroc"] > 0.8


def test_same_seed_gives_the_same_bytes_whatever_the_number_of_processes(sets, tmp_path):
    for name, workers in (("a", 1), ("b", 2)):
        settings = params(epochs=1)
        settings["feedback"]["workers"] = workers
        run(sets, tmp_path / name, settings)
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert {"critic.safetensors", "report.json", "scores.npy"} <= set(files)
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    assert len(np.unique(np.load(tmp_path / "a" / "scores.npy"))) > 1


def changed(sets, folder, labels):
    """The sets with other labels of the references."""
    curated, references = sets
    folder.mkdir()
    for name in ("retrieved.parquet", "features.safetensors"):
        (folder / name).write_bytes((references / name).read_bytes())
    table = pd.read_parquet(references / "references.parquet")
    table.assign(label=labels).to_parquet(folder / "references.parquet")
    return curated, folder


def refused(out):
    """That a critic at `out` drops nothing, has no weights and constant scores; its config."""
    config = read_json(out / "config.json")
    scores = pd.read_parquet(out / "scores.parquet")
    assert not config["drops"] and not (out / "critic.safetensors").exists()
    assert len(scores) == N and scores["score"].nunique() == 1
    assert (np.load(out / "scores.npy") == scores["score"]).all()
    assert read_scores(out, Encoded(scores["key"].tolist())) is None
    return config


@pytest.mark.parametrize("label", [True, False])
def test_labels_of_one_class_give_a_constant_score_and_no_drop(sets, tmp_path, label):
    one_sided = changed(sets, tmp_path / "references", label)
    report = run(one_sided, tmp_path / "r1", params())
    assert not report["drops"] and "nothing is dropped" in report["why"]
    refused(tmp_path / "r1")
    assert (np.load(tmp_path / "r1" / "scores.npy") == float(label)).all()
    # A later round may name it as its previous critic.
    after = run(sets, tmp_path / "r2", params(epochs=1), previous=tmp_path / "r1")
    assert after["drops"] and "scratch" in after["started_from"]


class Noting(Tracker):
    def __init__(self):
        self.metrics, self.tags, self.files = {}, {}, []

    def log_metrics(self, metrics, step=None, images=None):
        self.metrics |= metrics

    def set_tags(self, tags):
        self.tags |= tags

    def log_artifact(self, path, folder=None):
        assert path.is_file()
        self.files.append(f"{folder}/{path.name}")


def test_a_critic_of_labels_that_are_pure_noise_is_refused(sets, tmp_path, capsys):
    coins = np.tile([True, False], REFERENCES)  # of either prompt's references as many
    noise = changed(sets, tmp_path / "references", coins)
    tracker, out = Noting(), tmp_path / "r1"
    report = critic(
        noise[1],
        noise[0],
        None,
        tmp_path / "no",
        out,
        tmp_path / "m.json",
        "r1",
        params(epochs=1),
        tracker,
    )
    low, _ = report["auroc_interval"]
    assert low <= 0.5 and not report["drops"] and report["critic"] == "resnet18"
    config = refused(out)
    assert "no better than chance" in config["why"] and f"{low:.3f}" in config["why"]
    assert config["why"] in capsys.readouterr().out
    assert tracker.metrics["critic/drops"] == 0 and tracker.tags["critic.why"] == config["why"]
    assert tracker.files == ["critic/report.json", "critic/config.json"]
    after = run(sets, tmp_path / "r2", params(epochs=1), previous=out)
    assert "scratch" in after["started_from"]


def test_scores_of_another_set_are_refused(sets, tmp_path):
    out = tmp_path / "r1"
    run(sets, out, params(epochs=1))
    keys = pd.read_parquet(out / "scores.parquet")["key"].tolist()
    scores = read_scores(out, Encoded(keys))
    assert isinstance(scores, np.memmap) and scores.dtype == np.float32 and len(scores) == N
    for other in (keys[:-1], keys[::-1]):
        with pytest.raises(UserError, match="another set"):
            read_scores(out, Encoded(other))
    whole = (out / "scores.npy").read_bytes()
    for damaged in (b"", whole[:100], whole[:-9], b"no array"):
        (out / "scores.npy").write_bytes(damaged)
        with pytest.raises(UserError, match=r"scores\.npy"):
            read_scores(out, Encoded(keys))
    write_json(out / "config.json", {})
    with pytest.raises(UserError, match="drops"):
        read_scores(out, Encoded(keys))
    assert read_scores(None, Encoded(keys)) is None


def test_no_critic_gives_an_empty_set_without_reading_anything(tmp_path):
    nothing = (tmp_path / "absent", tmp_path / "absent")
    report = run(nothing, tmp_path / "r1", params(critic="none"))
    assert not report["drops"]
    assert read_scores(tmp_path / "r1", Encoded(["a"])) is None


def test_a_manifest_that_lists_more_than_the_shards_hold_is_refused(sets, tmp_path):
    curated, references = sets
    other = tmp_path / "curated"
    other.mkdir()
    for shard in curated.glob("*.tar"):
        (other / shard.name).write_bytes(shard.read_bytes())
    table = pd.read_parquet(curated / "manifest.parquet")
    table.loc[len(table)] = ["000099999", "00009", "x", 20, 24]
    table.to_parquet(other / "manifest.parquet")
    with pytest.raises(UserError, match="000099999"):
        run((other, references), tmp_path / "r1", params(epochs=1))


def test_references_of_another_curated_set_are_refused(sets, tmp_path):
    curated, references = sets
    table = pd.read_parquet(curated / "manifest.parquet")
    (tmp_path / "curated").mkdir()
    table.iloc[:50].to_parquet(tmp_path / "curated" / "manifest.parquet")
    with pytest.raises(UserError, match="references stage again"):
        run((tmp_path / "curated", references), tmp_path / "r1", params())


def test_unknown_critic_is_refused(sets, tmp_path):
    with pytest.raises(UserError, match="resnet18 or none"):
        run(sets, tmp_path / "r1", params(critic="vit"))
