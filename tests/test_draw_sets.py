"""Sets of pictures that are drawn on after a kill: GenEval's folders and the stage evaluate."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from components.errors import UserError
from components.evaluation.draw_sets import claim, draw_geneval, draw_missing
from components.evaluation.evaluate import evaluate
from components.evaluation.folder import read_folder
from components.evaluation.prompts import geneval_prompts
from components.model import DJEPAPipeline
from components.model.djepa import DJEPA
from components.model.sampler import SamplerConfig
from components.tokens.text import WordEncoder
from components.tokens.tokenizer import PatchTokenizer
from components.tracking import Tracker
from tests.test_evaluation_stages import PARAMS, Truthful
from tests.tiny_curated import tiny_config

ROOT = Path(__file__).parents[1]
SETTINGS: dict[str, Any] = {"seed": 0, "batch_size": 4, "workers": 1, "sampler": {}}
# Of every task, and with classes that no scene of the embedded world shows.
PROMPTS = geneval_prompts()[::80]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tokenizer = PatchTokenizer(4, 12)
    tokenizer.fit([torch.rand(8, 3, 16, 16) * 2 - 1])
    network = DJEPA(tiny_config(12, 24))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    sampler = SamplerConfig(8, 40, 2.0, 0.9, 1.0, width=16, height=16)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    DJEPAPipeline(network, tokenizer, WordEncoder(16, 24), sampler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven prompts with three pictures each, drawn without a break."""
    out = tmp_path_factory.mktemp("whole") / "set"
    assert draw_geneval(model, out, PROMPTS, 3, None, SETTINGS) == 21
    return out


def contents(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def test_the_set_is_in_the_official_folders(whole: Path) -> None:
    samples = read_folder(whole)
    assert [s.metadata for s in samples[::3]] == PROMPTS
    assert samples[-1].filename == "00006/samples/0002.png"
    assert len({s.path.read_bytes() for s in samples}) == 21  # each has its own seed
    assert samples[0].open().size == (16, 16)


def test_a_killed_run_goes_on_to_the_same_set(model: Path, whole: Path, tmp_path: Path) -> None:
    out, asked = tmp_path / "set", tmp_path / "prompts.jsonl"
    asked.write_text("".join(json.dumps(metadata) + "\n" for metadata in PROMPTS))
    command = [sys.executable, "-m", "components.cli", "draw", "geneval", str(model), str(out)]
    command += ["--images", "3", "--batch", "4", "--workers", "1", "--prompts", str(asked)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and len(list(out.glob("*/samples/*.png"))) < 5:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
    there = contents(out)
    pictures = [name for name in there if name.endswith(".png")]
    assert 5 <= len(pictures) < 21
    # What is there is whole: nothing of it is drawn anew.
    expected = contents(whole)
    assert all(expected[name] == there[name] for name in pictures)
    assert draw_geneval(model, out, PROMPTS, 3, None, SETTINGS) == 21 - len(pictures)
    names = {n: b for n, b in contents(out).items() if ".tmp-" not in n}
    assert names == expected


def test_one_missing_picture_comes_back_as_it_was(model: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    shutil.copytree(whole, out)
    (out / "00002/samples/0001.png").unlink()
    others = {p: p.stat().st_mtime_ns for p in out.glob("*/samples/*.png")}
    assert draw_geneval(model, out, PROMPTS, 3, None, SETTINGS) == 1
    assert contents(out) == contents(whole)
    assert all(p.stat().st_mtime_ns == when for p, when in others.items())
    assert draw_geneval(model, out, PROMPTS, 3, None, SETTINGS) == 0


def test_a_run_is_not_gone_on_with_by_another(model: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    shutil.copytree(whole, out)
    before = contents(out)
    for name, prompts, images, size, settings in (
        ("prompts", PROMPTS[1:], 3, None, SETTINGS),
        ("images", PROMPTS, 4, None, SETTINGS),
        ("seed", PROMPTS, 3, None, SETTINGS | {"seed": 1}),
        ("size", PROMPTS, 3, (32, 16), SETTINGS),
        ("batch", PROMPTS, 3, None, SETTINGS | {"batch_size": 2}),
        ("sampler", PROMPTS, 3, None, SETTINGS | {"sampler": {"guidance_scale": 4.0}}),
    ):
        with pytest.raises(UserError, match=rf"other settings \({name}: "):
            draw_geneval(model, out, prompts, images, size, settings)
    other = tmp_path / "other"
    shutil.copytree(model, other)
    config = json.loads((other / "sampler/config.json").read_text())
    (other / "sampler/config.json").write_text(json.dumps(config | {"temperature": 0.5}))
    with pytest.raises(UserError, match=r"other settings \(model: "):
        draw_geneval(other, out, PROMPTS, 3, None, SETTINGS)
    assert contents(out) == before
    (out / "run.json").unlink()
    with pytest.raises(UserError, match=r"holds files but no run\.json"):
        draw_geneval(model, out, PROMPTS, 3, None, SETTINGS)
    with pytest.raises(UserError, match="not a model folder"):
        draw_geneval(tmp_path, tmp_path / "new", PROMPTS, 3, None, SETTINGS)


def test_only_batches_that_lack_a_picture_are_drawn(tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def pipeline(prompts: list[str], **settings: Any) -> SimpleNamespace:
        asked.append(prompts)
        return SimpleNamespace(images=[Image.new("RGB", (8, 8)) for _ in prompts])

    jobs = [(f"prompt {i}", i, tmp_path / f"{i}.png") for i in range(10)]
    draw = lambda: draw_missing(tmp_path, jobs, (8, 8), SETTINGS, "it", lambda m: pipeline)  # noqa: E731
    assert draw() == 10
    (tmp_path / "5.png").unlink()
    (tmp_path / "9.png").unlink()
    asked.clear()
    assert draw() == 2
    assert asked == [[f"prompt {i}" for i in range(4, 8)], ["prompt 8", "prompt 9"]]


class Kill(BaseException):
    """Stands for a signal: nothing in the program catches it."""


def test_the_stage_evaluate_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    params = PARAMS | {"evaluation": PARAMS["evaluation"] | {"batch_size": 8}}
    batches: list[int] = []

    def stage(name: str, most: int | None, resume: Path | None) -> dict[str, Any]:
        truthful = Truthful(0.6)

        def pipeline(prompt: list[str], **settings: Any) -> SimpleNamespace:
            if len(batches) == most:
                raise Kill
            batches.append(len(prompt))
            return truthful(prompt, **settings)

        metrics = tmp_path / f"{name}.json"
        batches.clear()
        return evaluate(
            tmp_path / "model", tmp_path / name, metrics, params, Tracker(),
            lambda model: pipeline, resume,
        )  # fmt: skip

    expected = stage("dpo", None, None)
    first = contents(tmp_path / "dpo")
    shutil.rmtree(tmp_path / "dpo")
    with pytest.raises(Kill):
        stage("dpo", 5, tmp_path / "resume")
    assert not (tmp_path / "dpo").exists()
    assert stage("dpo", None, tmp_path / "resume") == expected
    assert len(batches) == 9 - 5  # 66 pictures in batches of 8
    assert contents(tmp_path / "dpo") == first
    assert not (tmp_path / "resume").exists()
    # What another model left there is not taken for this one's.
    claim(tmp_path / "resume", {"model": "another"})
    samples = tmp_path / "resume/00000/samples"
    samples.mkdir(parents=True)
    (samples / "0000.png").write_bytes(b"another's")
    assert stage("dpo", None, tmp_path / "resume") == expected
    assert contents(tmp_path / "dpo") == first
