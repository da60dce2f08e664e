"""A commit on a branch that is not checked out: what a scheduled refresh leaves behind.

Written with git's own plumbing into an index of its own, so that neither the checkout nor what
its user has staged is touched.
"""

import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from components.errors import UserError


def _git(*arguments: str, index: Path | None = None) -> str:
    """What git prints. UserError with git's last words when it fails."""
    extra = {"GIT_INDEX_FILE": str(index)} if index else {}
    answer = subprocess.run(
        ["git", *arguments], capture_output=True, text=True, env=os.environ | extra
    )
    if answer.returncode:
        last = (answer.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"git {arguments[0]} failed ({last}); mend it and run the command again.")
    return answer.stdout.strip()


def _tip(branch: str) -> str | None:
    found = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", f"refs/heads/{branch}^{{commit}}"],
        capture_output=True,
        text=True,
    )
    return found.stdout.strip() or None


def _base(branch: str) -> str:
    """The commit that the next one on the branch goes on from."""
    head, tip = _git("rev-parse", "HEAD"), _tip(branch)
    if tip is None:
        return head
    common = _git("merge-base", head, tip)
    if common not in (head, tip):
        raise UserError(
            f"The branch {branch} and what is checked out have each gone on from {common[:10]}: "
            "merge one into the other, or name another branch."
        )
    return tip if common == head else head


def check_branch(branch: str) -> None:
    """See before hours of work that the commit will be possible.

    Raises:
        UserError: no name for the branch, git knows no author, or the branch has gone elsewhere.
    """
    _git("check-ref-format", "--branch", branch)
    _git("var", "GIT_COMMITTER_IDENT")
    _git("var", "GIT_AUTHOR_IDENT")
    _base(branch)


def go_on_from(branch: str) -> bool:
    """In a linked worktree, check out the branch's tip with what was checked out merged into it.

    Returns whether another commit is checked out now; never in the main checkout, which is its
    user's. Raises UserError where the two do not merge; the worktree is as before then.
    """
    tip, head = _tip(branch), _git("rev-parse", "HEAD")
    main = _git("rev-parse", "--absolute-git-dir") == _git(
        "rev-parse", "--path-format=absolute", "--git-common-dir"
    )
    if main or tip is None or _git("merge-base", head, tip) == tip:
        return False
    _git("var", "GIT_COMMITTER_IDENT")
    _git("checkout", "--quiet", "--detach", tip)
    try:
        _git("merge", "--quiet", "--no-edit", "-m", f"Merge {head[:10]} into {branch}", head)
    except UserError as problem:
        _git("reset", "--quiet", "--hard", head)
        raise UserError(
            f"The branch {branch} and the commit {head[:10]} do not merge by themselves: merge "
            f"that commit into {branch} by hand, or name another branch."
        ) from problem
    return True


def commit(branch: str, paths: Sequence[Path], message: str) -> str:
    """Commit these files as they are now on a branch, made at HEAD if need be; returns its hash.

    Where nothing differs from the branch's last commit, that one's. Raises UserError as
    `check_branch`.
    """
    base, tip = _base(branch), _tip(branch)
    names = [str(path) for path in paths]
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder) / "index"
        _git("read-tree", base, index=index)
        _git("update-index", "--add", "--", *names, index=index)
        tree = _git("write-tree", index=index)
    if tree == _git("rev-parse", f"{base}^{{tree}}"):
        new = base
    else:
        new = _git("commit-tree", tree, "-p", base, "-m", message)
    _git("update-ref", f"refs/heads/{branch}", new, tip or "")
    if _git("rev-parse", "--symbolic-full-name", "HEAD") == f"refs/heads/{branch}":
        _git("add", "--", *names)  # it is checked out after all: its index follows
    return new
