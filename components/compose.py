"""The parameter tree params/ and the one file that stages read, params.yaml.

`djepa compose scale=small model.depth=12` keeps the choice in params/selected.yaml, the last
of the tree's defaults, so that every recomposition (ours, or the one DVC does before each
experiment) gives the same params.yaml.
"""

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from components.errors import UserError
from components.files import atomic_file, hash_of, read_yaml
from components.limits import check, numbers

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

TREE = Path("params")
CONFIG = "config.yaml"
SELECTED = TREE / "selected.yaml"
ROUNDS = TREE / "rounds.yaml"  # what refreshes added; `djepa compose` leaves it alone
PARAMS = Path("params.yaml")
CHECKED = Path(".dvc/tmp/params-checked")  # hash of what was last found not stale
NAMED = 4  # parameters that a refusal lists
INSTALLED = Path(__file__).resolve().parent.parent / TREE  # in a checkout or beside the package
HEADER = (
    "# @package _global_\n"
    "# Written by `djepa compose`: the choice that params.yaml was composed with.\n"
)


def _composed(tree: Path, overrides: Sequence[str]) -> str:
    """The text that DVC itself would write for these overrides of the tree."""
    from dvc.utils.hydra import compose_and_dump

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "params.yaml"
        try:
            compose_and_dump(
                str(target), str(tree.resolve()), None, "config", folder, list(overrides)
            )
        except Exception as error:
            # Hydra has no common base class for its own errors; the first line says what is
            # wrong, and below a group's unknown option stand those there are.
            first, *rest = str(error).strip().splitlines()
            known = ""
            lines = [line.strip() for line in rest if line.strip()]
            if lines and lines[0].startswith("Available options"):
                known = f" (there are {', '.join(lines[1:])})"
            raise UserError(
                f"The parameters in {TREE}/ do not compose with {list(overrides)}: "
                f"{first.rstrip('.')}{known}. Look the names up in {TREE}/ and give them as "
                "NAME=VALUE."
            ) from error
        return target.read_text()


def _leaf(tree: Any, path: Sequence[str]) -> Any:
    for part in path:
        tree = tree[part] if isinstance(tree, Mapping) and part in tree else None
    return tree


def _check_type(name: str, before: Any, after: Any) -> None:
    """Refuse a word where the tree has a number, and the like."""
    kinds: list[tuple[type, ...]] = [(bool,), (int, float), (str,), (list,), (dict,)]
    for kind in kinds:
        if isinstance(before, kind):
            fits = isinstance(after, kind) and isinstance(after, bool) == isinstance(before, bool)
            if not fits:
                raise UserError(
                    f"{name}={after!r} does not fit: {TREE}/ has {before!r} there. "
                    f"Give a value of the same kind."
                )
            return


def compose(root: Path = Path(), overrides: Sequence[str] = ()) -> None:
    """Write params/selected.yaml (only when `overrides` are given) and params.yaml.

    The overrides given are the whole choice: what an earlier call chose is forgotten. With
    none, the standing choice is composed again. A round whose labels people give gets an empty
    file for them.

    Raises:
        UserError: an override names no parameter, no option, or has a value that cannot be meant.
    """
    if overrides:
        _select(root, overrides)
    text = _composed(root / TREE, [])
    params = yaml.safe_load(text)
    check(params)
    if not (root / PARAMS).exists() or (root / PARAMS).read_text() != text:
        with atomic_file(root / PARAMS) as temporary:
            temporary.write_text(text)
    _make_label_files(root, params)


def _make_label_files(root: Path, params: Mapping[str, Any]) -> None:
    """An empty file for each round's labels that are not there: where people's will go.

    DVC does not run a stage that lacks an input, and says no more than that. An empty one makes
    the critic stage itself say how labels are made.
    """
    for line in params["feedback"]["rounds"].values():
        file = root / "labels" / f"{line['labels']}.jsonl"
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            file.touch()
            print(f"{file}: empty, for what people say of the round's pictures (docs/critic.md)")


def _parsed(tree: Path, overrides: Sequence[str]) -> tuple[list["Override"], list["Override"]]:
    """The overrides of whole groups, and those of single values.

    UserError for what is none, and for `~NAME`, which takes out what a command or stage reads.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except OverrideParseException as error:
        raise UserError(f"{error} Write overrides as NAME=VALUE.") from error
    for override in parsed:
        if override.is_delete():
            raise UserError(
                f"{override.input_line!r} takes out what is read: every parameter of {TREE}/ is "
                "needed. Give it another value, as NAME=VALUE."
            )
    groups = {item.name for item in tree.iterdir() if item.is_dir()}
    return (
        [o for o in parsed if o.key_or_group in groups],
        [o for o in parsed if o.key_or_group not in groups],
    )


def _checked(tree: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The tree with these overrides, their values held against the kinds that the tree has there.

    UserError for a word in a number's place, and the like.
    """
    wanted: dict[str, Any] = yaml.safe_load(_composed(tree, overrides))
    chosen_groups, chosen_values = _parsed(tree, overrides)
    if chosen_values:
        base = yaml.safe_load(_composed(tree, [str(o.input_line) for o in chosen_groups]))
        for override in chosen_values:
            path = override.key_or_group.split(".")
            _check_type(override.key_or_group, _leaf(base, path), _leaf(wanted, path))
    check(wanted)
    return wanted


def _select(root: Path, overrides: Sequence[str]) -> None:
    chosen_groups, chosen_values = _parsed(root / TREE, overrides)
    values: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        # With the standing choice out of the way, Hydra itself checks names and options.
        tree = Path(folder) / TREE
        shutil.copytree(root / TREE, tree)
        (tree / SELECTED.name).write_text(HEADER)
        wanted = _checked(tree, overrides)
    for override in chosen_values:
        path = override.key_or_group.split(".")
        branch = values
        for part in path[:-1]:
            branch = branch.setdefault(part, {})
        branch[path[-1]] = _leaf(wanted, path)
    chosen: dict[str, Any] = {}
    if chosen_groups:
        chosen["defaults"] = [{f"override /{o.key_or_group}": o.value()} for o in chosen_groups]
    chosen |= values
    body = yaml.safe_dump(chosen, sort_keys=False) if chosen else ""
    with atomic_file(root / SELECTED) as temporary:
        temporary.write_text(HEADER + body)


def append_round(labels: str, root: Path = Path()) -> str:
    """Add a round after the newest to the standing choice and compose; returns its key.

    It goes on from the newest round's model and critic, with the same numbers of phase 2; what
    DPO goes on from moves along if it was the newest. `labels`: auto, or people, whose labels are
    in labels/KEY.jsonl then.

    Raises:
        UserError: there is no round yet, or the parameters do not compose.
    """
    params = yaml.safe_load(_composed(root / TREE, []))
    rounds = params["feedback"]["rounds"]
    if not rounds:
        raise UserError(f"feedback.rounds in {TREE}/ is empty: give a first round there.")
    newest = list(rounds)[-1]
    number = len(rounds) + 1
    while f"r{number}" in rounds:
        number += 1
    key = f"r{number}"
    line = rounds[newest] | {"model": newest, "critic": newest}
    line["labels"] = key if labels == "people" else labels
    added = yaml.safe_load((root / ROUNDS).read_text()) or {}
    added.setdefault("feedback", {}).setdefault("rounds", {})[key] = line
    if params["dpo"]["from"] == newest:
        added["dpo"] = {"from": key}
    comments = [x for x in (root / ROUNDS).read_text().splitlines(True) if x.startswith("#")]
    body = yaml.safe_dump(added, sort_keys=False, default_flow_style=None, width=100)
    text = "".join(comments) + body
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / TREE
        shutil.copytree(root / TREE, tree)
        (tree / ROUNDS.name).write_text(text)
        check(yaml.safe_load(_composed(tree, [])))
    with atomic_file(root / ROUNDS) as temporary:
        temporary.write_text(text)
    compose(root)
    return key


def composed(overrides: Sequence[str], root: Path = Path()) -> dict[str, Any]:
    """The parameters with these overrides on top of the standing choice; nothing is written.

    Raises:
        UserError: as `compose`.
    """
    return _checked(root / TREE, overrides)


def defaults(overrides: Sequence[str]) -> dict[str, Any]:
    """The parameters of the tree that this program came with, with these overrides.

    No scale and no standing choice of a checkout counts, so that a command which works on any
    folder does the same everywhere; nothing is written.

    Raises:
        UserError: as `compose`.
    """
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / TREE
        shutil.copytree(INSTALLED, tree)
        (tree / SELECTED.name).write_text(HEADER)
        if not any(override.startswith("scale=") for override in overrides):
            config = yaml.safe_load((tree / CONFIG).read_text())
            config["defaults"] = [d for d in config["defaults"] if "scale" not in d]
            (tree / CONFIG).write_text(yaml.safe_dump(config))
        return _checked(tree, overrides)


def _differing(ours: str, composed: str) -> str:
    """The first names that two texts of parameters differ in; empty if only their layout differs.

    ours: params.yaml, which a user may have edited into no YAML at all.
    """
    try:
        there, wanted = numbers(yaml.safe_load(ours)), numbers(yaml.safe_load(composed))
    except (yaml.YAMLError, AttributeError):
        return ""
    missing = object()
    names = [n for n in there | wanted if there.get(n, missing) != wanted.get(n, missing)]
    return ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")


def is_stale(root: Path = Path()) -> bool:
    """Whether params.yaml is not what params/ composes to.

    Composing takes half a second, which every stage would pay: what was found alike once is known
    again by its hash.
    """
    known, text = root / CHECKED, (root / PARAMS).read_text()
    tree = {str(file): file.read_text() for file in sorted((root / TREE).rglob("*.yaml"))}
    key = hash_of([text, tree])
    if known.is_file() and known.read_text() == key:
        return False
    stale = _composed(root / TREE, []) != text
    if not stale and known.parent.is_dir():
        with atomic_file(known) as temporary:
            temporary.write_text(key)
    return stale


def load(root: Path = Path()) -> dict[str, Any]:
    """Read params.yaml; refuse it when it is stale.

    Inside `dvc exp run` DVC has just composed the file itself, with the experiment's own
    overrides, so there it is taken as it is. Where Hydra or DVC is not installed (a bare GPU
    machine) it cannot be checked and is taken as it is too.

    Raises:
        UserError: params.yaml is missing or stale, or a value in it cannot be meant.
    """
    path = root / PARAMS
    if not path.exists():
        raise UserError(
            f"{path} is missing: run this in the top folder of a checkout, "
            f"after `djepa compose` where it was removed."
        )
    if "DVC_EXP_BASELINE_REV" not in os.environ and (root / TREE).is_dir():
        try:
            stale = is_stale(root)
        except ModuleNotFoundError:
            stale = False
        if stale:
            names = _differing(path.read_text(), _composed(root / TREE, []))
            raise UserError(
                f"{PARAMS} is stale: it differs from what {TREE}/ composes to"
                f"{f' ({names})' if names else ''}. Run `djepa compose` to compose it again (or "
                f"`djepa compose NAME=VALUE …` with all that you choose)."
            )
    params = read_yaml(path)
    check(params)
    return params
