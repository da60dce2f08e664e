"""GenEval's official detector: its post-processing, its refusals, and the colours beside it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from components.errors import UserError
from components.evaluation.clip_colors import ClipColors
from components.evaluation.mask2former import Mask2FormerDetector, instances, prepared
from components.evaluation.prompts import COCO
from components.scenes.tasks import OFFICIAL_COLORS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mask2Former with random weights, COCO's classes and the names of the public weights."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    torch.manual_seed(0)
    backbone = SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    old = {"tv": "tvmonitor", "couch": "sofa", "computer mouse": "mouse"}
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2,
        dim_feedforward=16, num_queries=20,
        id2label={i: old.get(name, name) for i, name in enumerate(COCO)},
    )  # fmt: skip
    place = tmp_path_factory.mktemp("mask2former")
    Mask2FormerForUniversalSegmentation(config).save_pretrained(place)
    return place


def detector(folder: Path) -> Mask2FormerDetector:
    return Mask2FormerDetector({"model": str(folder), "revision": "main"}, None)


def test_known_masks_give_their_boxes_scores_and_classes() -> None:
    masks = torch.full((3, 20, 30), -9.0)
    masks[0, 5:10, 3:13] = 9.0  # rows 5 to 9, columns 3 to 12
    masks[1, 0:20, 20:30] = 9.0
    classes = torch.full((3, 5), -20.0)  # four classes and the null class
    classes[0, 2], classes[1, 1], classes[2, 4] = 20.0, 20.0, 20.0
    label, score, boxes, inside = instances(classes, masks)
    best = score.argsort(descending=True)[:2].tolist()
    assert {int(label[i]) for i in best} == {1, 2}
    for i in best:
        expected = [3, 5, 13, 10] if int(label[i]) == 2 else [20, 0, 30, 20]
        assert boxes[i].tolist() == expected
        assert float(score[i]) == pytest.approx(1 / (1 + np.exp(-9)), rel=1e-3)
        assert int(inside[i].sum()) in (50, 200)
    # A query without a mask has a score of 0, however sure of its class it is.
    assert float(score[(label == 0) & (boxes.sum(1) == 0)].abs().sum()) == 0


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 60), st.integers(1, 6))
def test_instances_are_those_of_the_plain_rule(seed: int, queries: int, kinds: int) -> None:
    g = torch.Generator().manual_seed(seed)
    # In float64, as the plain rule is: rounding would swap scores that are nearly alike.
    classes = torch.randn(queries, kinds + 1, generator=g, dtype=torch.float64)
    masks = torch.randn(queries, 6, 7, generator=g, dtype=torch.float64)
    label, score, boxes, _ = instances(classes, masks)
    plain = []
    for q in range(queries):
        chance = np.exp(classes[q].numpy())
        chance /= chance.sum()
        logits = masks[q].numpy()
        on = logits > 0
        sure = (1 / (1 + np.exp(-logits[on]))).sum() / (on.sum() + 1e-6)
        rows, columns = np.nonzero(on)
        box = (0, 0, 0, 0)
        if on.any():
            box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        plain += [(chance[k], k, chance[k] * sure, box) for k in range(kinds)]
    plain = sorted(plain, reverse=True)[:100]
    assert len(label) == len(plain)
    order = score.argsort(descending=True).tolist()
    expected = sorted(plain, key=lambda row: -row[2])
    assert score[order].tolist() == pytest.approx([row[2] for row in expected], rel=1e-4, abs=1e-6)
    for i, (_, kind, value, box) in zip(order, expected, strict=True):
        if value > 1e-3:
            assert (int(label[i]), tuple(boxes[i].int().tolist())) == (kind, box)


@settings(deadline=None)
@given(st.integers(1, 2000), st.integers(1, 2000))
def test_the_network_sees_the_official_size(width: int, height: int) -> None:
    scale = min(800 / min(width, height), 1333 / max(width, height))
    w, h = int(width * scale + 0.5), int(height * scale + 0.5)
    if min(w, h) < 1:
        return
    pixels, part = prepared(Image.new("RGB", (width, height), (124, 116, 104)))
    assert part == (h, w)
    assert pixels.shape == (1, 3, -(-h // 32) * 32, -(-w // 32) * 32)
    assert pixels[:, :, :h, :w].abs().max() < 0.02  # the mean colour


def test_boxes_lie_in_the_picture_under_genevals_names(folder: Path) -> None:
    found = detector(folder).detect(Image.new("RGB", (96, 64), (200, 30, 30)))
    assert set(found) <= set(COCO) and 0 < sum(map(len, found.values())) <= 100
    for items in found.values():
        assert [item[4] for item in items] == sorted((i[4] for i in items), reverse=True)
        for x1, y1, x2, y2, score, color in items:
            assert 0 <= x1 <= x2 <= 96 and 0 <= y1 <= y2 <= 64
            assert 0 <= score <= 1 and color == ""


def test_colours_are_asked_of_the_things_that_a_prompt_can_count(folder: Path) -> None:
    asked: list[tuple[str, list]] = []

    class Namer:
        def name(self, image: Image.Image, thing: str, found: list) -> list[str]:
            asked.append((thing, [box for box, _ in found]))
            return ["red", "blue"][: len(found)]

    finder = detector(folder)
    finder.colors = Namer()  # type: ignore[assignment]
    items = [[0, 0, 9, 9, 0.9, ""], [5, 5, 9, 9, 0.4, ""], [7, 7, 9, 9, 0.3, ""]]
    finder._color(Image.new("RGB", (9, 9)), "cup", items, [np.ones((9, 9), bool)] * 3)
    assert asked == [("cup", [[0, 0, 9, 9], [5, 5, 9, 9]])]
    assert [item[5] for item in items] == ["red", "blue", ""]


def test_untrained_weights_fail_the_self_test_and_other_classes_are_refused(
    folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"failed its self-test: in a portrait of one person"):
        detector(folder).self_test(512, 512)
    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((folder / "config.json").read_text())
    config["id2label"]["0"] = "human"
    (other / "config.json").write_text(json.dumps(config))
    (other / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(UserError, match=r"its classes are not COCO's 80: human"):
        detector(other)
    with pytest.raises(UserError, match=r"no-such-folder.*--detections FILE"):
        detector(tmp_path / "no-such-folder")


def test_colours_are_asked_of_the_thing_alone_on_grey(tmp_path: Path) -> None:
    seen: list[Image.Image] = []
    colors = write_clip(tmp_path)
    ask = colors.processor.image_processor.__class__.__call__

    def noted(self, images, *rest, **named):  # type: ignore[no-untyped-def]
        seen.extend(images)
        return ask(self, images, *rest, **named)

    picture = Image.new("RGB", (40, 30), "blue")
    picture.paste("red", (10, 5, 20, 25))
    mask = np.zeros((30, 40), bool)
    mask[5:25, 10:15] = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(colors.processor.image_processor.__class__, "__call__", noted)
        named = colors.name(picture, "cup", [((10, 5, 20, 25), mask)])
    assert named[0] in OFFICIAL_COLORS
    (alone,) = seen
    assert alone.size == (10, 20)
    assert alone.getpixel((1, 1)) == (255, 0, 0) and alone.getpixel((8, 1)) == (153, 153, 153)
    with pytest.raises(UserError, match="failed their self-test: of ten discs it named"):
        colors.self_test()


def write_clip(folder: Path) -> ClipColors:
    """A CLIP with random weights, in the very files of the real one."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    torch.manual_seed(0)
    letters = [chr(i) for i in range(33, 127)]
    words = {w: i for i, w in enumerate([*letters, *(f"{c}</w>" for c in letters)])}
    words |= {"<|startoftext|>": len(words), "<|endoftext|>": len(words) + 1}
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2, "projection_dim": 8}  # fmt: skip
    tokenizer = CLIPTokenizer(vocab=words, merges=[])
    config = CLIPConfig(
        text_config=small
        | {
            "vocab_size": len(words),
            "eos_token_id": words["<|endoftext|>"],
            "bos_token_id": words["<|startoftext|>"],
        },
        vision_config=small | {"image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    size = {"shortest_edge": 32}
    images = CLIPImageProcessor(size=size, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return ClipColors({"model": str(folder), "revision": "main", "batch": 16})
