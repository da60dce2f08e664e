"""Processes that train together: the same numbers, any number of them, killed or not."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from components.errors import UserError
from components.feedback.ledger import Ledger
from components.limits import check
from components.processes import one_thread
from components.tokens.encoded import EncodedSet
from components.tracking import Tracker
from components.training import record
from components.training.checkpoint import Training, load_state
from components.training.distribution import team
from components.training.phases import train_phase
from tests.conftest import ROOT, Checkout
from tests.kill import killed_after
from tests.tiny_curated import tiny_params

LOSS = 2e-5  # relative, of what one process says: rounding over four steps
PARTS = ("model", "ema", "target", "optimizer")
VALIDATION = {"pictures": 4, "most": 0.5, "points": 2, "times": 2, "seed": 0}


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Threads of so small operations only wait for each other."""
    with one_thread():
        yield


def params_for(workers: int, **training) -> dict:
    """Four steps, one line each, AdamW: Muon's orthogonal steps enlarge rounding; validation."""
    params = tiny_params()
    params["training"] |= {"workers": workers, "lines": 1000, "grids": 0}
    params["training"] |= {"validation": VALIDATION, **training}
    params["training"]["optimizer"]["kind"] = "adamw"
    params["training"]["phase1"]["images"] = 32
    return params


def train(encoded: Path, out: Path, params: dict, tracker: Tracker | None = None) -> dict:
    train_phase(
        "phase1", encoded, None, None, out / "model", out / "state", out / "phase1.json",
        out / "resume", params, tracker or Tracker(),
    )  # fmt: skip
    return json.loads((out / "phase1.json").read_text())


def killed(encoded: Path, out: Path, params: dict, saves: int, monkeypatch) -> None:
    """Train until so many snapshots were written, one a step, then die."""
    params["training"]["snapshot_seconds"] = -1
    with killed_after(saves, monkeypatch):
        train(encoded, out, params)


def said(metrics: dict) -> np.ndarray:
    """(steps, 3): both losses and the norm of the gradient."""
    return np.array([[line[k] for k in ("flow", "jepa", "gradient_norm")]
                     for line in metrics["history"]])  # fmt: skip


def weights(out: Path) -> dict[str, torch.Tensor]:
    return {
        f"{part}/{name}": tensor
        for part in PARTS
        for name, tensor in load_file(out / "state" / f"{part}.safetensors").items()
    }


def close(one: Path, other: Path) -> None:
    """The same weights but for what Adam makes of rounding where a gradient is nearly 0."""
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    distance = sum(float((a[k] - b[k]).square().sum()) for k in a) ** 0.5
    size = sum(float(a[k].square().sum()) for k in a) ** 0.5
    assert distance < 1e-3 * size


@pytest.fixture(scope="module")
def alone(encoded_folder: Path, tmp_path_factory) -> Path:
    """What one process makes of it; batches of 8 and, over the smaller rung, of 12."""
    out = tmp_path_factory.mktemp("alone")
    train(encoded_folder, out, params_for(1))
    return out


@pytest.mark.parametrize("sharding", ["replicate", "shard"])
def test_two_processes_say_and_learn_what_one_does(encoded_folder, alone, tmp_path, sharding):
    one = json.loads((alone / "phase1.json").read_text())
    two = train(encoded_folder, tmp_path, params_for(2, sharding=sharding))
    assert len(one["history"]) == 4
    np.testing.assert_allclose(said(two), said(one), rtol=LOSS)
    close(alone, tmp_path)
    validated = [
        [point[k] for k in ("images", "flow", "jepa")]
        for metrics in (one, two)
        for point in metrics["validation"]["history"]
    ]
    assert len(validated) == 4 and one["validation"]["pictures"] >= 4
    np.testing.assert_allclose(validated[2:], validated[:2], rtol=10 * LOSS)
    assert two["sampling"] == one["sampling"] and two["coverage"] == one["coverage"]


@pytest.mark.parametrize("batch", [1, 3])
def test_parts_of_different_sizes_weigh_what_they_hold(encoded_folder, tmp_path, batch):
    """Three pictures over two processes; one, where the other process has nothing to do.

    And in two parts each, of which one is empty in one process.
    """
    results = []
    for workers, accumulate in ((1, 1), (2, 1), (2, 3)):
        params = params_for(workers, accumulate=accumulate)
        params["training"]["phase1"] |= {"batch": batch, "images": 3 * batch}
        results.append(train(encoded_folder, tmp_path / f"{workers}-{accumulate}", params))
    for other in results[1:]:
        np.testing.assert_allclose(said(other), said(results[0]), rtol=LOSS)


@pytest.mark.parametrize(
    ("workers", "sharding"), [(1, "replicate"), (2, "replicate"), (2, "shard")]
)
def test_a_batch_in_parts_says_and_learns_what_the_whole_does(
    encoded_folder, alone, tmp_path, workers, sharding
):
    params = params_for(workers, sharding=sharding, accumulate=3)
    parts = train(encoded_folder, tmp_path, params)
    one = json.loads((alone / "phase1.json").read_text())
    np.testing.assert_allclose(said(parts), said(one), rtol=LOSS)
    close(alone, tmp_path)
    assert parts["sampling"] == one["sampling"] and parts["coverage"] == one["coverage"]


def test_packed_pictures_weigh_what_is_hidden_of_them(encoded_folder, tmp_path):
    """Two shapes in a row, a mask ratio each, shared out among processes and parts."""
    results, outs = [], []
    for workers, accumulate in ((1, 1), (2, 1), (1, 3), (2, 2)):
        params = params_for(workers, batches="packed", accumulate=accumulate)
        outs.append(tmp_path / f"{workers}-{accumulate}")
        results.append(train(encoded_folder, outs[-1], params))
    assert min(results[0]["sampling"]["rungs"].values()) > 0
    for other, out in zip(results[1:], outs[1:], strict=True):
        np.testing.assert_allclose(said(other), said(results[0]), rtol=LOSS)
        close(outs[0], out)
        assert other["sampling"] == results[0]["sampling"]


def test_without_the_jepa_loss_there_is_no_target_encoder(encoded_folder, tmp_path, monkeypatch):
    results = []
    for workers in (1, 2):
        out = tmp_path / str(workers)
        results.append(train(encoded_folder, out, params_for(workers, jepa_weight=0.0)))
        assert not (out / "state" / "target.safetensors").exists()
        assert all(line["jepa"] == 0 for line in results[-1]["history"])
        assert all(line["loss"] == line["flow"] for line in results[-1]["history"])
    np.testing.assert_allclose(said(results[1]), said(results[0]), rtol=LOSS)
    fresh = Training.fresh(params_for(1, jepa_weight=0.0), EncodedSet.open(encoded_folder))
    before = {k: v.clone() for k, v in fresh.model.projection.state_dict().items()}
    after = load_file(tmp_path / "2" / "state" / "model.safetensors")
    assert all(torch.equal(after[f"projection.{k}"], v) for k, v in before.items())
    with_jepa = Training.fresh(params_for(1), EncodedSet.open(encoded_folder))
    load_state(tmp_path / "2" / "state", with_jepa)  # from here on with L_pred
    average = with_jepa.ema.encoder.state_dict()
    assert all(torch.equal(average[k], v) for k, v in with_jepa.target.state_dict().items())


def test_numbers_that_are_none_are_said_with_their_samples(encoded_folder, tmp_path):
    """In the part of the other process, which alone meets it."""
    folder = tmp_path / "encoded"
    shutil.copytree(encoded_folder, folder)
    path = folder / "latents" / "24x24.safetensors"
    tensors = load_file(path)
    tensors["latents"][5, 0, 1, 1] = float("nan")
    save_file(tensors, path)
    key = pd.read_parquet(folder / "index.parquet")["key"][int(tensors["rows"][5])]
    params = params_for(2)
    params["training"]["phase1"]["images"] = 800
    with pytest.raises(UserError, match=rf"samples {key} \(rung 24x24\).*encode again") as said:
        train(folder, tmp_path, params)
    assert "diverged" not in str(said.value)


@pytest.mark.parametrize(
    ("often", "written"),
    [
        ({"lines": 0, "snapshot_seconds": -1}, []),
        ({"lines": 1000, "snapshot_seconds": -1}, [1, 1]),  # the line, the snapshot
        ({"lines": 0, "grids": 1000}, [1]),
        ({"lines": 0, "validation": VALIDATION | {"points": 1000}}, [1]),
    ],
    ids=["snapshots", "lines", "grids", "points"],
)
def test_nothing_is_written_of_weights_whose_loss_was_no_number(
    encoded_folder, tmp_path, monkeypatch, often, written
):
    """Step 0 goes much too far, so step 1 says no number; what is written comes after one step."""
    params = params_for(1, **{"validation": VALIDATION | {"pictures": 0}, **often})
    params["training"]["phase1"]["images"] = 800
    params["training"]["optimizer"]["adam_rate"] = 1e20
    found = []
    monkeypatch.setattr(record, "draw_grid", lambda *x: found.append(x[4]))

    class Keeper(Tracker):
        def log_metrics(self, metrics, step=None, images=None):
            found.append(step)

    with pytest.raises(UserError, match="diverged at step 1: the loss is no number"):
        train(encoded_folder, tmp_path, params, Keeper())
    found += [int(path.name.removeprefix("step-")) for path in (tmp_path / "resume").glob("step-*")]
    assert found == written
    assert not any((tmp_path / name).exists() for name in ("model", "state", "phase1.json"))


def test_the_last_step_may_not_be_none_either(encoded_folder, tmp_path):
    params = params_for(1, lines=0)
    params["training"]["phase1"]["images"] = 9  # two steps
    params["training"]["optimizer"]["adam_rate"] = 1e20
    with pytest.raises(UserError, match="diverged at step 1"):
        train(encoded_folder, tmp_path, params)
    assert not any((tmp_path / name).exists() for name in ("model", "state", "phase1.json"))


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_sharded_snapshots_go_on_in_another_number_of_processes(
    encoded_folder, alone, tmp_path, monkeypatch, before, after
):
    killed(encoded_folder, tmp_path, params_for(before, sharding="shard"), 2, monkeypatch)
    (snapshot,) = (tmp_path / "resume").glob("step-*")
    files = [path for path in snapshot.rglob("*") if path.is_file()]
    assert len(list(snapshot.glob("model/*.safetensors"))) == (2 if before == 2 else 0)
    assert {path.suffix for path in files} == {".safetensors", ".json", ".npy"}  # no pickle
    said = train(encoded_folder, tmp_path, params_for(after, sharding="shard"))
    close(alone, tmp_path)
    assert len(said["validation"]["history"]) == 2
    assert not list((tmp_path / "resume").glob("*"))


SCRIPT = """
import json, sys
from pathlib import Path
from components.feedback.sampler import StatisticalSampler
from components.tracking import Tracker
from components.training.phases import train_phase

if __name__ == "__main__":
    out, encoded = Path(sys.argv[1]), Path(sys.argv[2])
    log, draw = (out / "ids.jsonl").open("a"), StatisticalSampler.next_batch

    def logged(self):
        before = int(self.trained.sum())
        rung, ids = draw(self)
        print(json.dumps([before, rung, ids.tolist()]), file=log, flush=True)
        return rung, ids

    StatisticalSampler.next_batch = logged
    train_phase("phase1", encoded, None, None, out / "model", out / "state", out / "phase1.json",
                out / "resume", json.loads((out / "params.json").read_text()), Tracker())
"""


def run_and_kill(out: Path, encoded: Path, batches: int | None) -> dict[int, list]:
    """Run the script; kill -9 it when it has drawn so many more batches; all that it drew."""
    out.mkdir(exist_ok=True)
    params = params_for(2, snapshot_seconds=-1)
    params["training"]["optimizer"]["kind"] = "muon"
    params["training"]["phase1"]["images"] = 80
    (out / "params.json").write_text(json.dumps(params))
    (out / "script.py").write_text(SCRIPT)
    log = out / "ids.jsonl"
    log.touch()
    target = None if batches is None else len(log.read_text().splitlines()) + batches
    process = subprocess.Popen(
        [sys.executable, out / "script.py", out, encoded],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    while process.poll() is None:
        if target is not None and len(log.read_text().splitlines()) >= target:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    assert process.wait(120) == (0 if target is None else -signal.SIGKILL)
    drawn: dict[int, list] = {}
    for line in log.read_text().splitlines():
        before, *batch = json.loads(line)
        assert drawn.setdefault(before, batch) == batch  # what is drawn again is the same
    return drawn


@pytest.mark.slow
def test_killed_at_any_step_no_sample_is_repeated_or_lost(encoded_folder, tmp_path):
    whole = run_and_kill(tmp_path / "whole", encoded_folder, None)
    for batches in (1, 4):
        run_and_kill(tmp_path / "broken", encoded_folder, batches)
    broken = run_and_kill(tmp_path / "broken", encoded_folder, None)
    assert list(broken.items()) == list(whole.items())
    counts = np.zeros(36, int)
    for _, ids in whole.values():
        np.add.at(counts, ids, 1)
    for out in (tmp_path / "whole", tmp_path / "broken"):
        assert (Ledger.load(out / "state" / "ledger").drawn == counts).all()
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_low_precision_and_recomputation_change_rounding_only(encoded_folder, alone, tmp_path):
    one = said(json.loads((alone / "phase1.json").read_text()))
    again = said(train(encoded_folder, tmp_path / "a", params_for(1, checkpointing="blocks")))
    np.testing.assert_allclose(again, one, rtol=1e-6)
    low = said(train(encoded_folder, tmp_path / "b", params_for(1, precision="bfloat16")))
    assert not np.allclose(low, one, rtol=1e-6)  # it was done
    np.testing.assert_allclose(low, one, rtol=3e-2)


def test_everything_at_once_in_shards(encoded_folder, alone, tmp_path):
    one = said(json.loads((alone / "phase1.json").read_text()))
    params = params_for(2, sharding="shard", checkpointing="blocks", precision="bfloat16")
    params["training"]["grids"] = 1  # drawn from gathered averages
    np.testing.assert_allclose(said(train(encoded_folder, tmp_path, params)), one, rtol=3e-2)


def test_a_state_of_another_network_is_refused_and_named(encoded_folder, alone, tmp_path):
    params, encoded = params_for(1), EncodedSet.open(encoded_folder)
    params["model"]["network"]["mlp_ratio"] = 3
    with pytest.raises(UserError, match=r"another network .*down\.weight is \[16, 32\] there"):
        load_state(alone / "state", Training.fresh(params, encoded))
    params = params_for(1)
    params["training"]["optimizer"]["kind"] = "muon"
    with pytest.raises(UserError, match=r"another optimizer"):
        load_state(alone / "state", Training.fresh(params, encoded))


def _never(place):
    raise AssertionError("a peer was started")


def test_one_worker_starts_no_process():
    with team(1, _never) as place:
        assert (place.rank, place.size, place.agree(7)) == (0, 1, 7)


@pytest.mark.parametrize(
    ("name", "value"),
    [("precision", "float16"), ("sharding", "zero3"), ("checkpointing", "all"), ("compile", "yes")],
)
def test_an_unknown_choice_is_refused(name, value):
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["training"][name] = value
    with pytest.raises(UserError, match=rf"training\.{name} is '{value}': set it to"):
        check(params)


def test_muon_on_shards_is_refused_with_the_way_out():
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["training"]["sharding"] = "shard"
    with pytest.raises(UserError, match=r"kind=adamw, or training\.sharding=replicate"):
        check(params)
    params["training"]["optimizer"]["kind"] = "adamw"
    check(params)


@pytest.mark.slow
def test_torchrun_trains_what_the_stage_trains_by_itself(checkout: Checkout, encoded_folder):
    shutil.copytree(encoded_folder, checkout.root / "encoded")
    (checkout.root / "curated").mkdir()  # an input of the stage, read when encoding on demand
    checkout.djepa(
        "compose", "scale=micro", "training.grids=0", "training.phase1.images=64",
        "training.phase1.rungs=[24x24,24x16]",
        "training.phase1.size={mean: 24, std: 4, low: 20, high: 24}",
    )  # fmt: skip
    checkout.djepa("stage", "phase1")
    own = (checkout.root / "states/phase1/model.safetensors").read_bytes()
    shutil.rmtree(checkout.root / "states")
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    answer = checkout.ok(sys.executable, *torchrun, "-m", "components.cli", "stage", "phase1")
    assert answer.count("phase1: done") == answer.count("phase1: started") == 1
    assert (checkout.root / "states/phase1/model.safetensors").read_bytes() == own
    refused = checkout.call(sys.executable, *torchrun, "-m", "components.cli", "stage", "report")
    assert refused.returncode and "without torchrun" in refused.stderr
