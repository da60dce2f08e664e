"""The model that comes with the package: packing, going on from it, drawing with it."""

import copy
import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from components.compose import composed
from components.errors import UserError
from components.generate import about_starter, generate, last_model
from components.model import DJEPAPipeline
from components.scenes.tasks import TASKS
from components.scenes.world import World
from components.starter import FOLDER
from components.starter.begin import weights_hash
from components.starter.pack import pack
from components.tokens.encode import encode
from components.tracking import Tracker
from components.training.phases import train_phase
from tests.tiny_curated import tiny_params, write_curated

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
WORLD = yaml.safe_load((Path(__file__).parents[1] / "params/data/scenes.yaml").read_text())


def params() -> dict:
    tiny = tiny_params()
    tiny["data"] |= copy.deepcopy(WORLD)
    tiny["scale"] = "tiny"
    tiny["model"]["encode"]["most_cropped"] = 0.12
    return tiny


def train(encoded: Path, out: Path, settings: dict) -> Path:
    train_phase(
        "phase1",
        encoded,
        None,
        None,
        out / "phase1",
        out / "states",
        out / "phase1.json",
        out / "resume",
        settings,
        Tracker(),
    )
    return out / "phase1"


@pytest.fixture(scope="module")
def packed(encoded_folder, tmp_path_factory) -> Path:
    """A folder with a packed model in starter/model and the parameters that go on from it."""
    root = tmp_path_factory.mktemp("packed")
    model = train(encoded_folder, root, params())
    (root / "data.dvc").write_text("outs:\n- md5: 0123abcd.dir\n  path: data\n")
    pack(
        model,
        params(),
        root / "phase1.json",
        root / "data.dvc",
        folder=root / "starter" / "model",
        init=root / "starter.yaml",
    )
    return root


def going_on(packed: Path) -> dict:
    settings = params()
    settings["init"] = {
        "model": str(packed / "starter/model"),
        "weights": yaml.safe_load((packed / "starter.yaml").read_text())["weights"],
    }
    return settings


def test_a_packed_model_is_half_as_large_and_draws_the_same(packed):
    whole = load_file(packed / "phase1" / WEIGHTS)
    small = load_file(packed / "starter/model" / WEIGHTS)
    assert {t.dtype for t in small.values()} == {torch.bfloat16}
    assert all(torch.equal(small[name], whole[name].bfloat16()) for name in whole)
    pipes = [DJEPAPipeline.from_pretrained(packed / n) for n in ("phase1", "starter/model")]
    drawn = [
        pipe("a red circle", generator=torch.Generator().manual_seed(0), output_type="np").images
        for pipe in pipes
    ]
    assert abs(drawn[0] - drawn[1]).max() < 0.1


def test_the_card_says_how_it_was_made(packed):
    card = (packed / "starter/model/README.md").read_text()
    trained = json.loads((packed / "phase1.json").read_text())
    assert "0123abcd.dir" in card
    assert "| seed | 0 |" in card
    assert f"| images seen | {trained['images']} |" in card
    assert "python -m flows.starter" in card
    assert (packed / "starter/model/card/curves.png").is_file()


def test_phase1_goes_on_from_the_packed_weights(packed, tmp_path):
    settings = going_on(packed)
    settings["training"]["phase1"]["images"] = 0
    encode_again(packed, tmp_path, settings)
    model = train(tmp_path / "encoded", tmp_path, settings)
    begun, kept = load_file(model / WEIGHTS), load_file(packed / "starter/model" / WEIGHTS)
    assert all(torch.equal(begun[name], kept[name].float()) for name in kept)
    settings["training"]["phase1"]["images"] = 16
    moved = load_file(train(tmp_path / "encoded", tmp_path / "more", settings) / WEIGHTS)
    steps = [(moved[name] - begun[name]).abs().max() for name in moved]
    assert 0 < max(steps) < 0.1


def encode_again(packed: Path, out: Path, settings: dict) -> None:
    curated = out / "curated"
    write_curated(curated, count=24)  # other pictures: their own principal components would differ
    encode(curated, out / "encoded", out / "encode.json", settings, Tracker())
    kept = packed / "starter/model/tokenizer/diffusion_pytorch_model.safetensors"
    used = out / "encoded/tokenizer/diffusion_pytorch_model.safetensors"
    assert all(torch.equal(load_file(kept)[n], t) for n, t in load_file(used).items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p["data"]["shapes"].pop(), ["data.shapes", "scale=tiny", "init=none"]),
        (lambda p: p["data"]["held_out"].update(seed=9), ["data.held_out", "init=none"]),
        (lambda p: p["model"]["network"].update(width=32), ["model.network.width", "32", "16"]),
        (lambda p: p["model"]["text"].update(width=8), ["model.text.width"]),
        (lambda p: p["init"].update(weights="0" * 16), ["0000", "djepa compose"]),
        (lambda p: p["init"].update(model="models/none"), ["models/none", "no packed model"]),
    ],
)
def test_another_world_or_model_is_refused_in_words(
    packed, encoded_folder, tmp_path, change, words
):
    settings = going_on(packed)
    change(settings)
    with pytest.raises(UserError) as refused:
        train(encoded_folder, tmp_path, settings)
    assert all(word in str(refused.value) for word in words), refused.value


def test_a_set_of_another_tokeniser_is_refused(packed, encoded_folder, tmp_path):
    """Encoded by hand with `init=none`, then trained with a packed model."""
    write_curated(tmp_path / "curated", count=24)
    encode(tmp_path / "curated", tmp_path / "encoded", tmp_path / "e.json", params(), Tracker())
    with pytest.raises(UserError, match="dvc repro encode"):
        train(tmp_path / "encoded", tmp_path, going_on(packed))


def test_what_the_demo_holds_out_the_starter_never_saw():
    demo = World.from_params(composed(["scale=demo"])["data"])
    starter = World.from_params(composed(["scale=starter"])["data"])
    assert set(demo.shapes) <= set(starter.shapes)
    assert demo.colors.items() <= starter.colors.items()
    for task in TASKS:
        for prompt in demo.prompts("held_out", task):
            assert starter.is_held_out(prompt), prompt["prompt"]


def test_without_a_model_of_ones_own_the_starter_draws(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert last_model() == FOLDER
    assert "never learnt" not in about_starter("a photo of a red circle")
    assert "never learnt giraffe" in about_starter("a photo of a giraffe")


@pytest.mark.parametrize(
    ("out", "seed", "words"),
    [
        ("folder", 0, r"--out \S*folder is a folder: .*a\.png"),
        ("folder/a", 0, r"a does not say which .*a\.png"),
        ("folder/a.pnng", 0, r"a\.pnng does not say which .*a\.png"),
        ("file/a.png", 0, r"file is a file, no folder"),
        ("file/b/a.png", 0, r"is a file, no folder"),
        ("folder/a.png", 10**20, r"--seed is 100000000000000000000"),
    ],
)
def test_a_file_that_cannot_be_is_refused_before_drawing(tmp_path, out, seed, words, monkeypatch):
    monkeypatch.setattr("components.generate.last_model", lambda: tmp_path / "not asked for")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=words):
        generate("a photo of a red circle", None, None, 1, seed, tmp_path / out)


def test_a_drawn_picture_can_be_made_larger_to_look_at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (path,) = generate("a photo of a red circle", None, None, 1, 0, tmp_path / "a.png", enlarge=4)
    picture = Image.open(path)
    assert picture.size == (128, 128)
    small = picture.resize((32, 32), Image.Resampling.NEAREST)
    assert small.resize((128, 128), Image.Resampling.NEAREST).tobytes() == picture.tobytes()


def test_the_starter_in_the_tree_is_what_its_card_says():
    assert (FOLDER / WEIGHTS).stat().st_size <= 16 * 2**20
    small = load_file(FOLDER / WEIGHTS)
    assert {t.dtype for t in small.values()} == {torch.bfloat16}
    record = json.loads((FOLDER / "world.json").read_text())
    now = json.loads(json.dumps(composed(["scale=starter"])["data"]))  # keys are words in JSON
    now.pop("encode")
    assert record["data"] == now
    init = composed(["scale=starter", "init=starter"])["init"]
    assert init["weights"] == weights_hash(FOLDER)
    scores = json.loads((FOLDER / "card/scores.json").read_text())["geneval"]
    assert f"{scores['overall']:.3f} ± {scores['stderr']:.3f}" in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.phase1.images=0", "init=starter"),
        ("+evaluation.beside.dpo={model: models/mine}", "trained here"),
        ("+evaluation.beside.mine={folder: models/mine}", "`model`"),
    ],
)
def test_what_cannot_be_begun_from_or_scored_beside_is_refused(override, words):
    with pytest.raises(UserError, match=words):
        composed([override])
