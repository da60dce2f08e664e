"""The parameter tree: what is chosen is kept, what is wrong is said."""

import sys
from pathlib import Path

import pytest
import yaml

from components.compose import append_round, compose, is_stale, load
from components.errors import UserError
from tests.conftest import ROOT, Checkout


@pytest.fixture
def tree(checkout: Checkout) -> Path:
    return checkout.root


def test_committed_params_are_what_the_tree_composes_to() -> None:
    assert not is_stale(ROOT)


def test_choice_is_kept_by_later_compositions(tree: Path) -> None:
    compose(tree, ["scale=micro", "seed=5"])
    chosen = (tree / "params.yaml").read_text()
    assert yaml.safe_load(chosen)["seed"] == 5
    assert yaml.safe_load(chosen)["scale"] == "micro"
    compose(tree)
    assert (tree / "params.yaml").read_text() == chosen


def test_new_choice_replaces_the_old_one(tree: Path) -> None:
    compose(tree, ["scale=micro", "seed=5"])
    compose(tree, ["seed=6"])
    params = load(tree)
    assert (params["scale"], params["seed"]) == ("demo", 6)


def test_a_round_can_be_added(tree: Path) -> None:
    compose(tree, ["+feedback.rounds.r2={model: r1, critic: r1, labels: auto}"])
    assert list(load(tree)["feedback"]["rounds"]) == ["r1", "r2"]


def test_a_refresh_adds_a_round_that_later_choices_keep(tree: Path) -> None:
    compose(tree, ["+feedback.rounds.r1.phase2={images: 500}"])
    assert append_round("auto", tree) == "r2"
    rounds = load(tree)["feedback"]["rounds"]
    assert rounds["r2"] == {"model": "r1", "critic": "r1", "labels": "auto"} | {
        "phase2": {"images": 500}
    }
    assert load(tree)["dpo"]["from"] == "r2"

    assert append_round("people", tree) == "r3"
    compose(tree, ["seed=4", "dpo.from=phase1"])
    params = load(tree)
    assert list(params["feedback"]["rounds"]) == ["r1", "r2", "r3"]
    assert params["feedback"]["rounds"]["r3"]["labels"] == "r3"
    assert params["dpo"]["from"] == "phase1"

    append_round("auto", tree)
    assert load(tree)["dpo"]["from"] == "phase1", "a choice of the user's stays"
    assert (tree / "params/rounds.yaml").read_text().startswith("# @package _global_")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sed=3", "sed"),
        ("training.phase1.imagse=3", "imagse"),
        ("scale=enormous", "enormous"),
        ("seed=three", "seed='three'"),
        ("no override", "NAME=VALUE"),
    ],
)
def test_wrong_overrides_are_one_sentence_and_change_nothing(
    tree: Path, override: str, said: str
) -> None:
    before = (tree / "params.yaml").read_text(), (tree / "params/selected.yaml").read_text()
    with pytest.raises(UserError, match=said):
        compose(tree, [override])
    assert before == (
        (tree / "params.yaml").read_text(),
        (tree / "params/selected.yaml").read_text(),
    )


def test_what_was_found_alike_is_not_composed_again_until_something_changes(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tree / ".dvc/tmp").mkdir()  # DVC makes it
    load(tree)
    with monkeypatch.context() as known:
        known.setattr("components.compose._composed", lambda *_: pytest.fail("composed again"))
        load(tree)
    config = tree / "params/config.yaml"
    before = config.read_text()
    config.write_text(before.replace("seed: 0", "seed: 1"))
    for _ in range(2):  # a refusal is not remembered as an answer
        with pytest.raises(UserError, match=r"stale: .* \(seed\).* `djepa compose`"):
            load(tree)
    config.write_text(before)
    load(tree)
    (tree / "params/more.yaml").write_text("a file of its own\n")
    monkeypatch.setattr("components.compose._composed", lambda *_: "seed: 2\n")
    with pytest.raises(UserError, match="stale"):
        load(tree)


def test_stale_params_are_refused_with_the_command_that_mends_them(checkout: Checkout) -> None:
    with (checkout.root / "params.yaml").open("a") as file:
        file.write("extra: 1\n")
    answer = checkout.call(sys.executable, "-m", "components.cli", "stage", "curate")
    assert answer.returncode == 2
    assert "djepa compose" in answer.stderr and "(extra)" in answer.stderr
    assert "Traceback" not in answer.stderr
