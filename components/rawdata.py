"""The raw pictures of the embedded world: drawn, recorded in data.dvc, drawn again on a clone.

data.dvc holds DVC's hash of data/ and, under `meta`, the hash of the parameters it was drawn
from and the content hash that was accepted. A plain `dvc repro` would rewrite data.dvc without
a word when data/ changed and train everything again; the second copy under `meta` is what
`check_recorded` notices that by.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from components.errors import UserError
from components.files import atomic_file, hash_of
from components.tracking import Tracker

DATA = Path("data")
RECORD = Path("data.dvc")
ASIDE = Path("data.differs")


def _record() -> dict[str, Any]:
    return yaml.safe_load(RECORD.read_text()) if RECORD.exists() else {}


def _world(params: Mapping[str, Any]) -> str:
    """Hash of what the pictures are drawn from; how they are encoded later is none of it."""
    return hash_of({name: value for name, value in params["data"].items() if name != "encode"})


def _dvc(*arguments: str) -> subprocess.CompletedProcess[str]:
    answer = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments], capture_output=True, text=True
    )
    if answer.returncode:
        raise UserError(f"`dvc {' '.join(arguments)}` failed: {answer.stderr.strip()}")
    return answer


def _add() -> str:
    """Have DVC hash data/ into data.dvc; return the hash."""
    _dvc("add", "--quiet", str(DATA))
    return _record()["outs"][0]["md5"]


def _accept(world: str, digest: str) -> None:
    record = _record() | {"meta": {"world": world, "md5": digest}}
    with atomic_file(RECORD) as temporary:
        temporary.write_text(yaml.safe_dump(record, sort_keys=False))


def draw_data(params: Mapping[str, Any], tracker: Tracker, accept: bool = False) -> None:
    """Make data/ what params.yaml asks for, and say what happened.

    Args:
        params: the whole of params.yaml.
        tracker: told how many pictures were drawn.
        accept: record what is drawn here even where it differs from what data.dvc records.

    Raises:
        UserError: the same parameters drew other pictures than data.dvc records. What was drawn
            is kept in data.differs/, and nothing downstream is touched.
    """
    from components.scenes.raw import write_raw

    world = _world(params)
    before = _record()
    meta = before.get("meta", {})
    if DATA.is_dir() and not accept and meta.get("world") == world:
        _refuse_changed()
        print(f"{DATA}/ is there and is what {RECORD} records", flush=True)
        return
    write_raw(DATA, params, tracker)
    text = RECORD.read_text() if RECORD.exists() else None
    digest = _add()
    if meta.get("world") == world and meta.get("md5") != digest and not accept:
        assert text is not None
        with atomic_file(RECORD) as temporary:
            temporary.write_text(text)
        shutil.rmtree(ASIDE, ignore_errors=True)
        os.replace(DATA, ASIDE)
        raise UserError(
            f"The pictures drawn here are not those that {RECORD} records (hash {digest}, recorded "
            f"{meta.get('md5')}), though the parameters are the same: a library draws differently "
            f"from the one pinned in requirements.lock. Nothing was retrained; they lie in "
            f"{ASIDE}/. Install the pinned versions (`make install`), or run "
            f"`djepa data --accept` to record these and train on them."
        )
    _accept(world, digest)
    if meta.get("world") not in (None, world):
        print(f"{RECORD} recorded another world; it now records the one in params.yaml", flush=True)
    else:
        how = "as recorded" if meta.get("md5") == digest else "now recorded"
        print(f"{DATA}/ drawn: hash {digest}, {how} in {RECORD}", flush=True)


def draw_unrecorded(params: Mapping[str, Any], tracker: Tracker) -> None:
    """Draw data/ on a machine without DVC, and note in data.dvc what it was drawn from.

    The hash that stands there is of the world and not of the bytes: for a folder that is no
    checkout, in which nothing else is drawn.
    """
    from components.scenes.raw import write_raw

    write_raw(DATA, params, tracker)
    world = _world(params)
    record = {"outs": [{"md5": world, "path": str(DATA)}], "meta": {"world": world, "md5": world}}
    with atomic_file(RECORD) as temporary:
        temporary.write_text(yaml.safe_dump(record, sort_keys=False))


def _refuse_changed() -> None:
    answer = _dvc("status", "--json", str(RECORD))
    if answer.stdout.strip() not in ("", "{}"):
        raise UserError(
            f"{DATA}/ was changed since {RECORD} recorded it. Remove {DATA}/ to have it drawn "
            f"again, or run `djepa data --accept` to draw it and record the result."
        )


def check_recorded(params: Mapping[str, Any]) -> None:
    """Refuse to go on from raw pictures that nobody accepted.

    Raises:
        UserError: data.dvc was made from other parameters, or was rewritten since.
    """
    record = _record()
    meta = record.get("meta", {})
    if meta.get("world") != _world(params):
        raise UserError(
            f"{DATA}/ was drawn from other parameters than params.yaml has under `data`: "
            f"run `djepa data` first, then `dvc repro` again."
        )
    if record["outs"][0]["md5"] != meta.get("md5"):
        raise UserError(
            f"{DATA}/ is not what {RECORD} recorded (hash {record['outs'][0]['md5']}, recorded "
            f"{meta.get('md5')}): nothing was retrained. Remove {DATA}/ and run `djepa data` to "
            f"have the recorded pictures again, or `djepa data --accept` to record new ones."
        )
