"""Bad input and a bad machine: one sentence, an exit code, and what was done so far is kept."""

import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import yaml

from components.compose import composed, defaults
from components.curation.shards import write_shard
from components.errors import FULL_WORDS, UserError, explain
from components.files import write_json
from components.limits import CHOICES, LIMITS, check, numbers
from components.lockfile import check_lock, forget_lost
from tests.conftest import ROOT, Answer, Checkout, make_checkout
from tests.test_curation import sound

DJEPA = (sys.executable, "-m", "components.cli")
FLOW = (sys.executable, "-m", "flows.pipeline")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout at scale micro in which nothing was run; the tests leave it as it is."""
    made = make_checkout(tmp_path_factory.mktemp("tree"))
    made.djepa("compose", "scale=micro")
    made.ok("git", "commit", "-qam", "micro")
    return made


def refused(answer: Answer, *words: str, by: tuple[str, ...] = ("djepa", "pipeline")) -> None:
    """The answer is one sentence of such a program with these words, and exit code 2."""
    assert answer.returncode == 2, f"{answer.stdout}\n{answer.stderr}"
    said = [line for line in answer.stderr.splitlines() if line.strip()]
    assert len(said) == 1, answer.stderr
    assert said[0].startswith(tuple(f"{each}: " for each in by)) and said[0].endswith("."), said
    for word in words:
        assert word in said[0]


# For pictures as small as those drawn here.
SMALL = ("curation.resolution.shorter_side=96", "curation.sharpness.ratio=0.25")


def raw_shards(folder: Path) -> Path:
    """Two shards of three sound pictures."""
    folder.mkdir()
    for shard in range(2):
        samples = [(f"{shard:05d}{i:04d}", sound(10 * shard + i)) for i in range(3)]
        write_shard(folder / f"{shard:05d}.tar", samples)
    return folder


# ---- a wrong parameter


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("nonsense=1", ("nonsense", "params/")),
        ("model.network.heads=abc", ("model.network.heads", "'abc'", "4")),
        ("model.network.heads=0", ("model.network.heads", "from 1 on")),
        ("seed=null", ("seed=None", "0")),
        ("dpo.from=r7", ("dpo.from", "'r7'", "phase1 or r1")),
        ("scale=tiny", ("'scale/tiny'", "(there are ", "micro", "paper")),
        ("~model", ("'~model'", "NAME=VALUE")),
    ],
)
def test_a_wrong_parameter_is_refused_and_nothing_changes(
    tree: Checkout, override: str, words: tuple[str, ...]
) -> None:
    refused(tree.call(*DJEPA, "compose", override), *words)
    assert tree.ok("git", "status", "--porcelain") == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", -1),
        ("training.phase1.batch", 0),
        ("training.phase1.images", 2.5),
        ("training.text_drop", 1.5),
        ("evaluation.images", "two"),
        ("dpo.lr", float("nan")),
        ("feedback.rounds.r1.model", "r1"),
        ("feedback.rounds.r1.labels", "labels/r1.jsonl"),
        ("feedback.rounds.r1.labels", ""),
    ],
)
def test_impossible_values_in_the_file_are_named(name: str, value: object) -> None:
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    check(params)
    *path, last = name.split(".")
    place = params
    for step in path:
        place = place[step]
    place[last] = value
    with pytest.raises(UserError, match=name):
        check(params)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "curation.resolution.shorter_side=abc",
            r"shorter_side='abc' does not fit.* has [0-9]+ there",
        ),
        ("curation.resolution.shorter_side=-5", "shorter_side is -5: .* from 0 on"),
        ("curation.skip=text", r"skip='text' does not fit.* \[\] "),
        ("~curation", "'~curation' takes out"),
    ],
)
def test_commands_that_compose_for_themselves_refuse_what_compose_does(
    override: str, words: str
) -> None:
    for asked in (defaults, lambda overrides: composed(overrides, ROOT)):
        with pytest.raises(UserError, match=words):
            asked([override])


@pytest.mark.parametrize("key", ["my.round", "a/b", "", "-r", "phase1", "dpo", "none", 2])
def test_a_name_that_no_round_can_have_is_refused(key: object) -> None:
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    rounds = params["feedback"]["rounds"]
    rounds["My_other-round2"] = rounds["r1"]
    check(params)
    rounds[key] = rounds["r1"]
    with pytest.raises(UserError, match=r"feedback\.rounds\..* name it in params/"):
        check(params)


def test_every_limit_is_of_a_parameter_there_is() -> None:
    from fnmatch import fnmatchcase

    names = numbers(yaml.safe_load((ROOT / "params.yaml").read_text()))
    for scale in ("paper", "small"):  # other parts have other numbers
        names |= numbers(composed([f"scale={scale}"], ROOT))
    for pattern in [*LIMITS, *CHOICES]:
        assert any(fnmatchcase(name, pattern) for name in names), pattern


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("phase9", ("phase9", "phase1")),
        ("critic", ("critic@ROUND",)),
        ("critic@r7", ("r7", "feedback.rounds")),
        ("curate", ("data", "djepa data")),
        ("evaluate@dpo", ("models/dpo", "dvc repro evaluate-dpo")),
        ("phase2@r1", ("states/phase1", "dvc repro phase2@r1")),
    ],
)
def test_a_stage_that_cannot_run_says_what_comes_first(
    tree: Checkout, stage: str, words: tuple[str, ...]
) -> None:
    refused(tree.call(*DJEPA, "stage", stage), *words)


def test_a_prefect_server_that_is_away_is_said(tree: Checkout) -> None:
    extra = {"PREFECT_API_URL": "http://me:secret@127.0.0.1:9/api"}
    answer = tree.call(sys.executable, "-m", "flows.pipeline", **extra)
    refused(answer, "server at http://127.0.0.1:9/api does not answer", "make serve")
    assert "secret" not in answer.stdout + answer.stderr


def test_the_flow_refuses_a_wrong_parameter_before_it_starts(tree: Checkout) -> None:
    params = (tree.root / "params.yaml").read_text()
    try:
        (tree.root / "params.yaml").write_text(params.replace("seed: 0", "seed: -1"))
        refused(tree.call(*FLOW), "params.yaml", "djepa compose")
    finally:
        (tree.root / "params.yaml").write_text(params)


# ---- a missing package


def without(package: str, folder: Path) -> dict[str, str]:
    """Environment in which `package` is not installed, in child processes too."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] == {package!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Hidden())\n"
    )
    return {"PYTHONPATH": str(folder)}


def test_curation_without_a_package_keeps_the_shards_it_had_scanned(
    tree: Checkout, tmp_path: Path
) -> None:
    command = (*DJEPA, "curate", str(raw_shards(tmp_path / "raw")), str(tmp_path / "out"), *SMALL)
    answer = tree.call(*command, **without("rapidocr", tmp_path / "hidden"))
    refused(answer, "'rapidocr'", "make -B install")
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.glob("out.tmp-*/passes/*.scan.parquet"))) == 2


@pytest.mark.parametrize(
    ("module", "program", "package"),
    [
        ("components.cli", "djepa", "typer"),
        ("flows.pipeline", "pipeline", "prefect"),
        ("flows.ablation", "ablation", "prefect"),
        ("flows.evaluation", "evaluation", "pydantic"),
        ("flows.cleanup", "cleanup", "psutil"),
        ("flows.serve", "serve", "yaml"),
    ],
)
def test_another_python_than_the_one_installed_into(
    tree: Checkout, tmp_path: Path, module: str, program: str, package: str
) -> None:
    answer = tree.call(sys.executable, "-m", module, **without(package, tmp_path / "hidden"))
    refused(answer, repr(package), "make -B install", sys.executable, by=(program,))


# ---- a damaged shard


def test_a_damaged_shard_costs_what_is_damaged_and_is_listed(
    tree: Checkout, tmp_path: Path
) -> None:
    raw = raw_shards(tmp_path / "raw")
    whole = (raw / "00001.tar").read_bytes()
    (raw / "00001.tar").write_bytes(whole[: len(whole) // 2])
    said = tree.djepa("curate", str(raw), str(tmp_path / "out"), *SMALL)
    assert "report.html" in said
    kept = pd.read_parquet(tmp_path / "out/manifest.parquet")
    rejects = pd.read_parquet(tmp_path / "out/rejects.parquet")
    assert "000010000" in set(kept["key"]) | set(rejects["key"])
    assert set(kept["shard"]) == {"00000", "00001"}
    damaged = rejects[rejects["filter"] == "damaged"]
    assert list(damaged["shard"]) == ["00001"]
    assert "cut off by the shard's end" in damaged["reason"].item()


# ---- a full disk


@dataclass
class Disk:
    """A folder that takes little, the limit for a command that writes there, and more room."""

    folder: Path
    limit: Callable[[], None] | None
    make_room: Callable[[], None]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A file system of a few kB where we may mount one; else the system's limit on a file's size,
    which the same code of the system refuses, under another number."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
        return shutil.which("mount") is not None and not subprocess.run(command).returncode

    if os.geteuid() == 0 and mount("size=24k"):
        try:
            yield Disk(folder, None, lambda: assert_true(mount("remount", "size=8m")))
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
    else:
        size = 24 * 1024
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # noqa: E731
        yield Disk(folder, limit, lambda: None)


def assert_true(value: bool) -> None:
    assert value


def test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_room(
    tree: Checkout, tmp_path: Path, disk: Disk
) -> None:
    command = (
        *DJEPA,
        "curate",
        str(raw_shards(tmp_path / "raw")),
        str(disk.folder / "out"),
        *SMALL,
    )
    answer = subprocess.run(
        command,
        cwd=tree.root,
        env=tree.environment,
        preexec_fn=disk.limit,
        capture_output=True,
        text=True,
    )
    refused(answer, "The disk is full", "make room", str(disk.folder))
    assert not (disk.folder / "out").exists()
    assert list(disk.folder.glob("out.tmp-*/passes/00000.scan.parquet")), "what was done is kept"
    assert not list(disk.folder.glob("out.tmp-*/*/*.tmp-*")), "nothing half written is left"
    disk.make_room()
    assert "found finished" in tree.ok(*command)
    assert (disk.folder / "out/report.html").is_file()


def test_a_full_disk_is_told_from_what_libraries_make_of_it() -> None:
    for words in FULL_WORDS:
        error = RuntimeError("closing the run failed too")
        error.__context__ = ValueError(f"I/O error: {words.capitalize()} (os error 28)")
        assert "The disk is full" in str(explain(error))
    assert explain(OSError(5, "Input/output error")) is None
    assert explain(KeyError("a bug")) is None


def test_what_stands_in_the_way_of_a_file_or_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for attempt, name in (
        (lambda: (tmp_path / "file" / "out").mkdir(parents=True), "file"),
        (lambda: (tmp_path / "file").mkdir(), "file"),
        (lambda: write_json(tmp_path / "folder", {}), "folder"),
    ):
        with pytest.raises(OSError) as error:
            attempt()
        assert re.search(rf"/{name}\S* cannot be written or read \(", str(explain(error.value)))
    assert "tmp-" not in str(explain(error.value))
    assert explain(FileNotFoundError(2, "no such file", "a")) is None


@pytest.mark.parametrize("text", ["", "schema: '2.0'\nstages:\n  cur", "schema: '2.0'\n"])
def test_a_lock_file_that_was_cut_off_is_said(tmp_path: Path, text: str) -> None:
    check_lock(tmp_path)  # there is none
    (tmp_path / "dvc.lock").write_text(text)
    with pytest.raises(UserError, match=r"run `git checkout dvc\.lock` there"):
        check_lock(tmp_path)
    (tmp_path / "dvc.lock").write_text("schema: '2.0'\nstages: {curate: {cmd: x}}\n")
    check_lock(tmp_path)


@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("dvc.lock", (*DJEPA, "data")),
        ("dvc.lock", (*DJEPA, "stage", "report")),
        ("data.dvc", (*DJEPA, "data")),
        ("data.dvc", FLOW),
    ],
)
def test_a_record_that_was_cut_off_is_said_by_each_command(
    tree: Checkout, file: str, command: tuple[str, ...]
) -> None:
    record = tree.root / file
    before = record.read_text()
    try:
        record.write_text(before[: before.index(":") + 1] + " [")
        refused(tree.call(*command), f"git checkout {file}", "same command again")
    finally:
        record.write_text(before)


def test_a_pipeline_that_dvc_cannot_read_is_said(
    tree: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree.root)
    before = Path("dvc.yaml").read_text()
    try:
        Path("dvc.yaml").write_text("stages: {curate: [")
        with pytest.raises(UserError, match=r"'dvc\.yaml'.* same command again"):
            forget_lost()
    finally:
        Path("dvc.yaml").write_text(before)


# ---- no git


@pytest.mark.parametrize("command", [(*DJEPA, "data"), (*DJEPA, "stage", "report"), FLOW])
def test_without_git_each_way_in_says_so(
    tree: Checkout, tmp_path: Path, command: tuple[str, ...]
) -> None:
    for name in ("metrics", "samples"):
        (tree.root / name).mkdir(exist_ok=True)
    answer = tree.call(*command, PATH=str(tmp_path), DJEPA_HOME="")
    refused(answer, "git is not installed", "install it")


def test_outside_a_checkout_the_flow_says_so(tree: Checkout, tmp_path: Path) -> None:
    bare = Checkout(tmp_path, tree.environment)
    refused(bare.call(*FLOW, PYTHONPATH=str(ROOT)), str(tmp_path), "git checkout")
