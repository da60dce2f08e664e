"""What a GPU machine without DVC and Hydra runs, and the table of what it brought back."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import lease as there
from benchmarks.gpu import plan as home
from benchmarks.gpu.record import Results
from components.errors import UserError
from components.evaluation.ablation import GROUPS, Result
from components.files import read_json, read_yaml, write_json

MICRO = (
    "training.workers=1", "feedback.workers=1", "curation.workers=1", "evaluation.workers=1",
    "training.phase1.images=64",
)  # fmt: skip
# What a stage leaves, without the stage; `broken` in the folder makes it fail.
STUB = """
import json, pathlib, sys
for step in sys.argv[1:]:
    if pathlib.Path("broken").exists():
        sys.exit(3)
    print(step, flush=True)
    stage, _, name = step.partition("@")
    name = name or stage
    score = {"overall": 0.5, "chance": 0.1, "stderr": 0.01, "n": 9}
    train = {"images_total": 64, "images_per_second": 9.0, "parameters": 5}
    made = {
        "phase1": ["models", "states"], "phase2": ["models", "states"],
        "references": ["references"], "critic": ["critics"], "evaluate": ["samples"],
    }[stage]
    for folder in made:
        pathlib.Path(folder, name).mkdir(parents=True)
    kind = "train" if stage.startswith("phase") else stage
    file = pathlib.Path("metrics", kind, f"{name}.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"geneval": score, **train}))
"""


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("plan") / "plan.json"
    words = ["ablation", *MICRO, "--scale", "micro", "--seeds", "2", "--at-once", "3"]
    assert home.main([*words, "--out", str(file)]) == 0
    return read_json(file)


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(folder: Path, steps: list[str], cores: int) -> subprocess.Popen[bytes]:
        with (folder / "log").open("ab") as log:
            return subprocess.Popen([sys.executable, "-c", STUB, *steps], cwd=folder, stdout=log)

    monkeypatch.setattr(there, "start", start)
    monkeypatch.setattr(there.Lease, "prepare", lambda self: None)


def run(planned: dict[str, Any], work: Path, lines: Path) -> tuple[there.Lease, list[str]]:
    lease = there.Lease(planned, work, Results([lines]), 1)
    return lease, lease.run()


def said(lease: there.Lease, name: str) -> list[str]:
    return (lease.folder(name) / "log").read_text().split()


def test_each_job_comes_after_the_one_it_goes_on_from(planned):
    names = [job["name"] for job in planned["jobs"]]
    assert len(names) == 14 and names[0] == "A-0"
    for job in planned["jobs"]:
        before = GROUPS[job["about"]["group"]].follows
        assert job["follows"] == (f"{before}-{job['params']['seed']}" if before else None)
        if before:
            assert names.index(job["follows"]) < names.index(job["name"])
    assert len({job["key"] for job in planned["jobs"]}) == 14
    # That machine finds no letters and no faces.
    curation = planned["jobs"][0]["params"]["curation"]
    assert curation["skip"] == ["text", "nsfw", "faces"]


def test_what_groups_share_is_trained_once(planned, stubbed, tmp_path):
    lease, failed = run(planned, tmp_path / "work", tmp_path / "lines")
    assert failed == []
    assert said(lease, "C-0") == ["phase1", "evaluate@phase1"]
    assert said(lease, "G-0") == ["references@r2", "critic@r2", "phase2@r2", "evaluate@r2"]
    shared = lease.folder("C-0") / "models" / "phase1"
    for name in ("D-0", "E-0", "F-0", "G-0"):
        assert (lease.folder(name) / "models" / "phase1").resolve() == shared.resolve()
    assert read_yaml(lease.folder("F-1") / "params.yaml")["seed"] == 1


def test_a_job_that_fails_holds_up_those_after_it_alone_and_goes_on_where_it_was(
    planned, stubbed, tmp_path
):
    work, lines = tmp_path / "work", tmp_path / "lines"
    first = there.Lease(planned, work, Results([lines]), 1)
    broken = first.folder("D-0") / "broken"
    broken.parent.mkdir(parents=True)
    broken.touch()
    assert sorted(first.run()) == ["D-0", "E-0"]
    assert len(lines.read_text().splitlines()) == 12
    broken.unlink()
    second, failed = run(planned, work, lines)
    assert failed == []
    assert said(second, "C-0") == ["phase1", "evaluate@phase1"]  # not run again
    assert len(lines.read_text().splitlines()) == 14
    third, failed = run(planned, work, lines)
    assert failed == [] and third.waiting == []


def test_on_another_machine_only_what_has_no_line_is_scored(planned, stubbed, tmp_path):
    lines = tmp_path / "lines"
    run(planned, tmp_path / "first", lines)
    found = lines.read_text().splitlines()
    kept = [line for line in found if json.loads(line)["case"]["job"] != "E-1"]
    lines.write_text("".join(line + "\n" for line in kept))
    lease, failed = run(planned, tmp_path / "second", lines)
    assert failed == []
    # E goes on from D and that from C, whose figures are known.
    assert {path.name.partition("-")[0] for path in (tmp_path / "second").iterdir()} == {*"CDE"}
    assert said(lease, "C-1") == ["phase1"]
    assert said(lease, "D-1") == ["references@r1", "critic@r1", "phase2@r1"]
    assert said(lease, "E-1")[-1] == "evaluate@r2"


def test_the_table_is_that_of_the_carried_figures(planned, stubbed, tmp_path):
    lines = tmp_path / "lines"
    run(planned, tmp_path / "work", lines)
    page = home.table([lines], tmp_path / "report")
    made = read_json(tmp_path / "report" / "ablation.json")
    assert made["about"]["seeds"] == 2 and made["about"]["scale"] == "micro"
    assert made["groups"]["G"]["score"]["mean"] == 0.5
    assert "| G |" in page and (tmp_path / "report" / "ablation.png").is_file()
    other = [json.loads(line) for line in lines.read_text().splitlines()]
    other[0]["scale"] = "starter"
    lines.write_text("".join(json.dumps(line) + "\n" for line in other))
    with pytest.raises(UserError, match="the files of one plan"):
        home.table([lines], tmp_path / "report")


def test_the_budget_is_what_fits_at_the_rate_after_compiling(tmp_path):
    # 100 s for the first 1000 images, then 50 a second.
    times = {250: 50.0, 500: 100.0, 750: 105.0, 1000: 110.0}
    rows = [{"images": n, "images_per_second": n / s} for n, s in times.items()]
    write_json(tmp_path / "trial.json", {"history": rows})
    params = {"training": {"phase1": {"images": 7, "batch": 16}, "ema": 0.9}, "seed": 3}
    found = there.fitted(params, tmp_path / "trial.json", seconds=60)
    assert found["training"]["phase1"] == {"images": 60 * 50 // 16 * 16, "batch": 16}
    assert found["training"]["ema"] == 0.9 and found["seed"] == 3


@pytest.mark.slow
def test_two_groups_of_real_stages_come_to_figures(planned, tmp_path):
    jobs = [job for job in planned["jobs"] if job["name"] in ("C-0", "F-0")]
    lines = tmp_path / "lines"
    write_json(tmp_path / "plan.json", {"at_once": 1, "jobs": jobs})
    words = [str(tmp_path / "plan.json"), str(tmp_path / "work"), str(lines), "--cores", "1"]
    assert there.main(words) == 0
    found = [line for line in Results([lines]).lines.values()]
    results = [Result(**{n: line[n] for n in Result.__dataclass_fields__}) for line in found]
    assert [(r.group, r.seed) for r in results] == [("C", 0), ("F", 0)]
    assert results[1].images > results[0].images >= 64
    logs = sorted((tmp_path / "work").glob("*/log"))
    told = [log.read_text() for log in logs]
    assert len(logs) == 3  # what they share, C and F
    assert there.main(words) == 0  # everything is there: no stage says anything
    assert [log.read_text() for log in logs] == told
    # Without the lines it is the outputs that tell.
    lines.unlink()
    assert there.main(words) == 0
    assert [log.read_text() for log in logs] == told and len(Results([lines]).lines) == 2
