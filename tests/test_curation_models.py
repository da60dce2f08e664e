"""Aesthetic scores and written captions, on small models saved in the formats of the real ones."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from components.curation.aesthetic import Aesthetic, read_head
from components.curation.captioner import Captioner
from components.curation.curate import curate
from components.curation.filters import Picture
from components.curation.shards import read_shard, write_shard
from components.errors import UserError
from components.tracking import Tracker
from tests.conftest import ROOT
from tests.test_curation import SETTINGS, members, scene, sound

SIDE = 32  # px, of the small CLIP's pictures
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])
CURATION = yaml.safe_load((ROOT / "params/curation/default.yaml").read_text())
TALK = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<IMG_CONTEXT>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def picture(seed: int, height: int = SIDE, width: int = SIDE) -> Picture:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Picture(f"{seed:09d}", pixels, "", {})


def one_sentence(error: pytest.ExceptionInfo[UserError], *parts: str) -> None:
    """The refusal is a single line that names what it must."""
    text = str(error.value)
    assert "\n" not in text and text.endswith("."), text
    for part in parts:
        assert part in text, text


# ---- aesthetic


def write_clip(folder: Path) -> Path:
    """A whole CLIP, text and vision, 24 numbers a picture, and its picture processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(0)
    both = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    both |= {"num_attention_heads": 2, "projection_dim": 24}
    config = CLIPConfig(
        text_config=both | {"vocab_size": 50, "max_position_embeddings": 8},
        vision_config=both | {"image_size": SIDE, "patch_size": 8},
        projection_dim=24,
    )
    CLIPModel(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    CLIPImageProcessor(**size).save_pretrained(folder)
    return folder


def write_head(path: Path, width: int = 24, **changes: Any) -> Path:
    """A linear layer with one output, saved as the official head is."""
    values = torch.Generator().manual_seed(1)
    state = {"weight": torch.randn(1, width, generator=values), "bias": torch.tensor([3.5])}
    torch.save({k: v for k, v in (state | changes).items() if v is not None}, path)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_clip(tmp_path_factory.mktemp("aesthetic") / "clip")
    write_head(folder.parent / "head.pth")
    return folder


def aesthetic(folder: Path, **changes: Any) -> Aesthetic:
    settings = {"model": str(folder), "head": str(folder.parent / "head.pth")}
    stage = Aesthetic.from_params(CURATION["aesthetic"] | settings | changes)
    assert stage is not None
    return stage


def by_hand(clip: Path, pixels: np.ndarray) -> float:
    """The score of a picture that needs no scaling, through CLIP's own image features."""
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(clip).eval()
    values = torch.tensor((pixels / 255 - MEAN) / STD, dtype=torch.float32).permute(2, 0, 1)
    with torch.no_grad():
        state = model.vision_model(pixel_values=values[None]).pooler_output
        embedding = model.visual_projection(state)[0].double().numpy()
    head = torch.load(clip.parent / "head.pth", weights_only=True)
    weight, bias = head["weight"][0].double().numpy(), float(head["bias"])
    return float(embedding @ weight / np.linalg.norm(embedding) + bias)


def test_aesthetic_score_is_the_head_on_the_normalised_embedding(clip: Path) -> None:
    stage = aesthetic(clip)
    stage.setup()
    batch = [picture(i) for i in range(3)]
    scores = stage.score(batch)
    assert scores.shape == (3,) and scores.dtype == np.float64
    assert scores == pytest.approx([by_hand(clip, p.pixels) for p in batch], abs=1e-4)
    assert np.ptp(scores) > 1e-3
    stage.threshold = float(np.sort(scores)[1])
    assert stage.keeps(scores).sum() == 2
    said = stage.reason.format(score=3.25, threshold=5.0)
    assert said == "aesthetic score 3.25, at least 5 wanted"


def test_aesthetic_scores_do_not_depend_on_the_batch(clip: Path) -> None:
    stage = aesthetic(clip, batch=2)
    stage.setup()
    batch = [picture(i, 40 + 10 * i, 64) for i in range(5)]  # of five sizes
    alone = np.concatenate([stage.score([p]) for p in batch])
    assert stage.score(batch) == pytest.approx(alone, abs=1e-5)
    assert stage.score([]).shape == (0,)


def test_no_model_is_no_filter_and_no_head_is_refused(clip: Path) -> None:
    assert Aesthetic.from_params(CURATION["aesthetic"]) is None
    with pytest.raises(UserError) as error:
        aesthetic(clip, head="none")
    one_sentence(error, "curation.aesthetic.head", "curation.aesthetic.model=none")


def test_missing_weights_and_heads_are_said_in_a_sentence(clip: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        aesthetic(clip, model=str(tmp_path / "deep" / "nowhere")).setup()
    one_sentence(error, "nowhere", "hf download", "curation.aesthetic.model=none")
    with pytest.raises(UserError) as error:
        aesthetic(clip, head=str(tmp_path / "gone.pth")).setup()
    one_sentence(error, "gone.pth is not there", "sa_0_4_vit_l_14_linear.pth")


def test_a_model_without_its_processor_or_of_another_kind_is_refused(
    clip: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(clip, tmp_path / "clip")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UserError) as error:
        aesthetic(clip, model=str(folder)).setup()
    one_sentence(error, str(folder), "preprocessor_config.json")
    (folder / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(UserError) as error:
        aesthetic(clip, model=str(folder)).setup()
    one_sentence(error, "t5 model, not CLIP")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 768}, ("768 numbers", "gives 24")),
        ({"bias": torch.zeros(2)}, ("bias (2,)", "weight (1, D)")),
        ({"bias": None}, ("weight (1, 24)", "instead of")),
        ({"weight": torch.zeros(24)}, ("weight (24,)",)),
        ({"more": torch.zeros(3)}, ("more (3,)",)),
    ],
)
def test_heads_of_other_shapes_are_refused(
    clip: Path, tmp_path: Path, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    head = write_head(tmp_path / "head.pth", **changes)
    with pytest.raises(UserError) as error:
        aesthetic(clip, head=str(head)).setup()
    one_sentence(error, "head.pth", *words)


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("sprung"),))


def test_a_head_is_never_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Trap()}, "trap.pth")
    with pytest.raises(UserError) as error:
        read_head(Path("trap.pth"))
    one_sentence(error, "trap.pth cannot be read")
    assert not Path("sprung").exists()
    Path("text.pth").write_text("no head")
    with pytest.raises(UserError, match=r"text\.pth cannot be read"):
        read_head(Path("text.pth"))


# ---- captions


def write_internvl(folder: Path) -> Path:
    """An InternVL in its -hf format: 56 px tiles of 4 tokens, byte vocabulary, chat template."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
        Qwen2Config,
        Qwen2Tokenizer,
    )
    from transformers.models.internvl.configuration_internvl import InternVLVisionConfig

    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *names.values()]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(ByteLevel.alphabet())])}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary, merges=[], extra_special_tokens=names, eos_token="<|im_end|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    size = {"height": 56, "width": 56}
    InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=TALK,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    both = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    both |= {"num_attention_heads": 2, "initializer_range": 0.3}
    vision = InternVLVisionConfig(**both, image_size=[56, 56], patch_size=[14, 14])
    ends = {"eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 0}
    text = Qwen2Config(**both, vocab_size=len(tokenizer), num_key_value_heads=1, **ends)
    config = InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=vocabulary["<IMG_CONTEXT>"],
        image_seq_length=4,
        tie_word_embeddings=False,
        **ends,
    )
    model = InternVLForConditionalGeneration(config).eval()
    # Only printable letters and blanks are ever said, so that texts can be compared by eye.
    spoken = [vocabulary[c] for c in "abcdefghijklmnopqrstuvwxyzĠĊ"]
    silent = torch.ones(len(model.lm_head.weight), dtype=torch.bool)
    silent[spoken] = False
    model.lm_head.weight.data[silent] = 0
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def internvl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_internvl(tmp_path_factory.mktemp("captioner") / "internvl")


def captioner(folder: Path, **changes: Any) -> Captioner:
    settings = {"write": "missing", "model": str(folder), "max_new_tokens": 24}
    made = Captioner.from_params(CURATION["captions"] | settings | changes)
    assert made is not None
    return made


def test_captions_are_single_lines_without_the_prompt(internvl: Path) -> None:
    writer = captioner(internvl)
    writer.setup()
    pictures = [picture(i, 80, 60 + 30 * i) for i in range(3)]
    texts = writer.write(pictures)
    assert texts == writer.write(pictures), "greedy decoding is the same every time"
    assert len(set(texts)) == 3, "the picture is looked at"
    for text in texts:
        assert 5 < len(text) <= 24 and text == " ".join(text.split())
        for part in ("Describe", "assistant", "user", "<|im", "IMG"):
            assert part not in text
    assert len(captioner(internvl).captions["prompt"]) > 24, "else the prompt could be hidden in it"


def test_captions_do_not_depend_on_the_batch(internvl: Path) -> None:
    pictures = [picture(i, 60 + 40 * i, 150) for i in range(5)]
    for tiles in (1, 4):  # with several tiles prompts are of different lengths
        together = captioner(internvl, batch=3, tiles=tiles)
        together.setup()
        alone = captioner(internvl, batch=1, tiles=tiles)
        alone.setup()
        assert together.write(pictures) == alone.write(pictures)


def test_tiles_are_as_many_as_the_parameter_allows(internvl: Path) -> None:
    wide = picture(0, 56, 224)
    for tiles, seen in ((1, 1), (4, 5)):  # four tiles and an overview
        writer = captioner(internvl, tiles=tiles)
        writer.setup()
        counts: list[int] = []
        tower = writer.model.model.vision_tower
        tower.register_forward_pre_hook(
            lambda _, args, kwargs, counts=counts: counts.append(len(kwargs["pixel_values"])),
            with_kwargs=True,
        )
        writer.write([wide])
        assert counts == [seen]


def test_who_gets_a_caption(internvl: Path) -> None:
    missing, every = captioner(internvl), captioner(internvl, write="all")
    assert [missing.wants(c) for c in ("", " \n", "a ring")] == [True, True, False]
    assert [every.wants(c) for c in ("", "a ring")] == [True, True]
    assert Captioner.from_params(CURATION["captions"]) is None
    assert captioner(internvl).write([]) == []


def test_wrong_settings_of_captions_are_refused(internvl: Path) -> None:
    with pytest.raises(UserError) as error:
        captioner(internvl, write="sometimes")
    one_sentence(error, "curation.captions.write", "'sometimes'")
    with pytest.raises(UserError) as error:
        captioner(internvl, model="none")
    one_sentence(error, "curation.captions.model", "OpenGVLab/InternVL3-1B-hf", "write=never")


def test_missing_or_damaged_captioners_are_said_in_a_sentence(
    internvl: Path, clip: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError) as error:
        captioner(tmp_path / "deep" / "nowhere").setup()
    one_sentence(error, "nowhere", "hf download", "curation.captions.write=never")
    with pytest.raises(UserError) as error:
        captioner(clip).setup()
    one_sentence(error, str(clip), "chat template")
    silent = shutil.copytree(internvl, tmp_path / "silent")
    (silent / "chat_template.jinja").unlink()
    with pytest.raises(UserError) as error:
        captioner(silent).setup()
    one_sentence(error, "without a chat template")
    lost = shutil.copytree(internvl, tmp_path / "lost")
    tensors = load_file(lost / "model.safetensors")
    del tensors[next(name for name in sorted(tensors) if "mlp" in name)]
    save_file(tensors, lost / "model.safetensors", {"format": "pt"})
    capfd.readouterr()
    with pytest.raises(UserError) as error:
        captioner(lost).setup()
    one_sentence(error, str(lost), "tensors do not fit")
    assert "initialized" not in capfd.readouterr().err


@pytest.mark.parametrize("skip", [[], ["caption"]])
def test_curated_shards_bear_what_the_models_said(
    clip: Path, internvl: Path, tmp_path: Path, skip: list[str]
) -> None:
    (tmp_path / "raw").mkdir()
    mute = members(scene(7)[0], "")
    write_shard(tmp_path / "raw/a.tar", [("spoken", sound(1)), ("mute", mute)])
    curation = SETTINGS | {
        "caption": {"letters": 0},
        "skip": skip,
        "captions": CURATION["captions"] | {"write": "missing", "model": str(internvl)},
        "aesthetic": CURATION["aesthetic"]
        | {"model": str(clip), "head": str(write_head(tmp_path / "head.pth")), "threshold": -99.0},
    }
    curate(tmp_path / "raw", tmp_path / "out", {"curation": curation}, Tracker())
    manifest = pd.read_parquet(tmp_path / "out/manifest.parquet").set_index("key")
    (shard,) = (tmp_path / "out").glob("*.tar")
    samples = {s.key: s for s in read_shard(shard, SETTINGS["limits"])}
    assert samples["spoken"].caption == sound(1)["txt"].decode()
    alone = captioner(internvl, max_new_tokens=CURATION["captions"]["max_new_tokens"])
    alone.setup()
    written = alone.write([Picture("mute", scene(7)[0], "", {})])
    assert written[0] and manifest.loc["mute", "caption"] == samples["mute"].caption == written[0]
    assert samples["mute"].meta["caption_before"] == ""
    assert manifest["score_aesthetic"].notna().all()
