"""Commits on a branch that is not checked out, in a real repository."""

from pathlib import Path

import pytest

from components.branch import check_branch, commit, go_on_from
from components.errors import UserError
from tests.conftest import Checkout


@pytest.fixture
def here(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    monkeypatch.chdir(checkout.root)
    for name, value in checkout.environment.items():
        monkeypatch.setenv(name, value)
    return checkout


def test_a_commit_takes_the_files_named_and_leaves_checkout_and_index(here: Checkout) -> None:
    Path("params.yaml").write_text("a: 1\n")
    Path("README.md").write_text("half written\n")
    here.ok("git", "add", "README.md")
    before = here.ok("git", "status", "--porcelain")
    head = here.ok("git", "rev-parse", "HEAD").strip()

    made = commit("refresh", [Path("params.yaml")], "Round r2")

    assert here.ok("git", "status", "--porcelain") == before
    assert here.ok("git", "rev-parse", "refresh", "refresh~1").split() == [made, head]
    assert here.ok("git", "show", "refresh:params.yaml") == "a: 1\n"
    assert here.ok("git", "diff", "--name-only", "HEAD", "refresh").split() == ["params.yaml"]


def test_the_next_commit_goes_on_from_the_last_and_nothing_new_makes_none(here: Checkout) -> None:
    Path("params.yaml").write_text("a: 1\n")
    first = commit("refresh", [Path("params.yaml")], "Round r2")
    assert commit("refresh", [Path("params.yaml")], "Round r2 again") == first
    Path("params.yaml").write_text("a: 2\n")
    second = commit("refresh", [Path("params.yaml")], "Round r3")
    assert here.ok("git", "rev-parse", f"{second}~1").strip() == first


def test_a_branch_that_is_checked_out_is_clean_afterwards(here: Checkout) -> None:
    Path("params.yaml").write_text("a: 1\n")
    commit("main", [Path("params.yaml")], "Round r2")
    assert here.ok("git", "status", "--porcelain") == ""


def test_a_branch_that_went_elsewhere_is_refused_before_any_work(here: Checkout) -> None:
    here.ok("git", "switch", "-qc", "refresh")
    here.ok("git", "commit", "-qm", "there", "--allow-empty")
    here.ok("git", "switch", "-q", "main")
    here.ok("git", "commit", "-qm", "here", "--allow-empty")
    with pytest.raises(UserError, match="each gone on"):
        check_branch("refresh")
    with pytest.raises(UserError, match="check-ref-format"):
        check_branch("no such..name")


def test_a_worktree_goes_on_from_the_branch_and_takes_in_what_it_had(
    here: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("params.yaml").write_text("a: 1\n")
    round_two = commit("refresh", [Path("params.yaml")], "Round r2")
    assert not go_on_from("refresh"), "nobody's checkout is moved"
    here.ok("git", "checkout", "-q", "params.yaml")
    here.ok("git", "commit", "-qm", "meanwhile", "--allow-empty")
    here.ok("git", "worktree", "add", "-q", "--detach", ".djepa/linked", "main")
    monkeypatch.chdir(here.root / ".djepa/linked")

    assert go_on_from("refresh")
    assert Path("params.yaml").read_text() == "a: 1\n"
    ours = here.ok("git", "-C", ".djepa/linked", "rev-parse", "HEAD^1", "HEAD^2").split()
    assert ours == [round_two, here.ok("git", "rev-parse", "main").strip()]
    check_branch("refresh")
    assert not go_on_from("refresh"), "it is there already"

    monkeypatch.chdir(here.root)
    Path("params.yaml").write_text("a: 2\n")
    here.ok("git", "commit", "-qam", "the same line")
    head = here.ok("git", "rev-parse", "main").strip()
    here.ok("git", "-C", ".djepa/linked", "checkout", "-q", "--detach", "main")
    monkeypatch.chdir(here.root / ".djepa/linked")
    with pytest.raises(UserError, match="do not merge by themselves"):
        go_on_from("refresh")
    assert here.ok("git", "-C", ".djepa/linked", "rev-parse", "HEAD").strip() == head
    assert here.ok("git", "-C", ".djepa/linked", "status", "--porcelain") == ""
