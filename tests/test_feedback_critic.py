"""Retrieval, inherited labels and the critic on small made-up sets."""

import io
import json

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
from components.feedback.quality import auroc, quality
from components.feedback.retrieval import inherit, read_human_labels, retrieve, unit
from components.feedback.scores import read_scores
from components.files import read_json
from components.tracking import Tracker

N = 96  # curated pictures: even ones red, odd ones blue


def params(critic="resnet18", labels="auto", **training):
    return {
        "seed": 0,
        "curation": {"limits": {"picture_bytes": 10**7, "text_bytes": 10**5, "pixels": 10**7}},
        "feedback": {
            "critic": critic,
            "similarity": {"auto": 0.3, "human": 0.5},
            "rounds": {"r1": {"model": "phase1", "critic": "none", "labels": labels}},
            "critic_training": {
                "size": 16,
                "epochs": 3,
                "batch": 12,
                "lr": 0.003,
                "weight_decay": 0.0005,
                "crop": 0.6,
                "held_out": 0.25,
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
    pd.DataFrame({"key": keys, "shard": [k[:5] for k in keys]}).to_parquet(
        curated / "manifest.parquet"
    )
    table = pd.DataFrame(
        {
            "prompt_index": [0, 0, 1, 1],
            "file": [f"{p:05d}/samples/{s:04d}.png" for p in (0, 1) for s in (0, 1)],
            "label": [True, True, False, False],
            "row": range(4),
        }
    )
    table.to_parquet(references / "references.parquet")
    direction = np.array([[1.0, 0.2], [1.0, -0.2], [-1.0, 0.2], [-1.0, -0.2]])
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


def test_retrieval_finds_the_nearest_captions():
    captions = unit(np.random.default_rng(0).standard_normal((50, 8)))
    index, similarity = retrieve(captions[[3, 7]], captions, 5)
    assert index[:, 0].tolist() == [3, 7] and np.allclose(similarity[:, 0], 1, atol=1e-5)
    assert (np.diff(similarity) <= 1e-6).all()
    assert retrieve(captions[:1], captions[:2], 5)[0].shape == (1, 2)


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
    labels = np.array([True] * 50 + [False] * 50)
    perfect = quality(labels, labels.astype(float), 0, 100)
    assert perfect["auroc"] == 1.0 and perfect["ece"] == 0.0 and perfect["brier"] == 0.0
    guess = quality(labels, np.random.default_rng(0).random(100), 0, 100)
    low, high = guess["auroc_interval"]
    assert low < guess["auroc"] < high and low < 0.5 < high
    assert quality(np.ones(5, bool), np.ones(5), 0)["auroc"] is None


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=2, max_size=30))
def test_auroc_is_the_share_of_pairs_in_the_right_order(drawn):
    labels, scores = (np.array(column) for column in zip(*drawn, strict=True))
    pairs = [(a > b) + (a == b) / 2 for a in scores[labels] for b in scores[~labels]]
    if pairs:
        assert auroc(labels, scores / 5) == pytest.approx(np.mean(pairs))


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


def test_same_seed_gives_the_same_scores(sets, tmp_path):
    for name in "ab":
        run(sets, tmp_path / name, params(epochs=1))
    a, b = (read_scores(tmp_path / n, pd.Series(["000000001", "000010003"])) for n in "ab")
    assert (a == b).all()


@pytest.mark.parametrize("label", [True, False])
def test_labels_of_one_class_give_a_constant_score_and_no_drop(sets, tmp_path, label):
    curated, references = sets
    one_sided = tmp_path / "references"
    one_sided.mkdir()
    for name in ("retrieved.parquet", "features.safetensors"):
        (one_sided / name).write_bytes((references / name).read_bytes())
    table = pd.read_parquet(references / "references.parquet").assign(label=label)
    table.to_parquet(one_sided / "references.parquet")
    report = run((curated, one_sided), tmp_path / "r1", params())
    assert not report["drops"] and "nothing is dropped" in report["why"]
    scores = pd.read_parquet(tmp_path / "r1" / "scores.parquet")
    assert len(scores) == N and (scores["score"] == float(label)).all()
    assert read_scores(tmp_path / "r1", scores["key"]) is None
    # A later round may name it as its previous critic.
    after = run(sets, tmp_path / "r2", params(epochs=1), previous=tmp_path / "r1")
    assert after["drops"] and "scratch" in after["started_from"]


def test_no_critic_gives_an_empty_set_without_reading_anything(tmp_path):
    nothing = (tmp_path / "absent", tmp_path / "absent")
    report = run(nothing, tmp_path / "r1", params(critic="none"))
    assert not report["drops"]
    assert pd.read_parquet(tmp_path / "r1" / "scores.parquet").empty
    assert read_scores(tmp_path / "r1", pd.Series(["a"])) is None


def test_human_labels_replace_automatic_ones_and_the_threshold(sets, tmp_path):
    lines = [
        {"file": "00000/samples/0000.png", "label": True},
        {"file": "00000/samples/0000.png", "label": False},
        {"file": "00001/samples/0001.png", "label": True},
    ]
    path = tmp_path / "r1.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    report = run(sets, tmp_path / "r1", params(labels="human"), labels=path)
    assert report["threshold"] == 0.5 and report["references"] == 2
    assert report["references_positive"] == 1
    scores = pd.read_parquet(tmp_path / "r1" / "scores.parquet")["score"]
    assert scores[::2].mean() < scores[1::2].mean()
    assert read_json(tmp_path / "r1" / "report.json")["labels"] == "human"


@pytest.mark.parametrize(
    "text, words",
    [
        (None, "djepa rate labels"),
        ("", "empty"),
        ("{", "line 1"),
        ('{"file": "x.png", "label": true}', "x.png"),
        ('{"file": "00000/samples/0000.png", "label": "good"}', "good"),
    ],
)
def test_bad_human_labels_are_refused(sets, tmp_path, text, words):
    path = tmp_path / "r1.jsonl"
    if text is not None:
        path.write_text(text + "\n")
    table = pd.read_parquet(sets[1] / "references.parquet")
    with pytest.raises(UserError, match=words):
        read_human_labels(path, table)


def test_a_manifest_that_lists_more_than_the_shards_hold_is_refused(sets, tmp_path):
    curated, references = sets
    other = tmp_path / "curated"
    other.mkdir()
    for shard in curated.glob("*.tar"):
        (other / shard.name).write_bytes(shard.read_bytes())
    table = pd.read_parquet(curated / "manifest.parquet")
    table.loc[len(table)] = ["000099999", "00009"]
    table.to_parquet(other / "manifest.parquet")
    with pytest.raises(UserError, match="000099999"):
        run((other, references), tmp_path / "r1", params(epochs=1))


def test_unknown_critic_is_refused(sets, tmp_path):
    with pytest.raises(UserError, match="resnet18 or none"):
        run(sets, tmp_path / "r1", params(critic="vit"))
