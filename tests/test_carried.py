"""A stage's outputs made on one machine and taken into DVC on another."""

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import Checkout, make_checkout


def with_inputs(checkout: Checkout) -> Checkout:
    """A checkout that has what `contract` reads, in DVC's record."""
    root = checkout.root
    checkout.djepa("compose", "scale=micro")
    (root / "curated").mkdir()
    (root / "curated/manifest.txt").write_text("what was curated")
    (root / "metrics").mkdir(exist_ok=True)
    (root / "metrics/curate.json").write_text("{}")
    return checkout


@pytest.fixture
def two(tmp_path: Path) -> tuple[Checkout, Checkout]:
    """There, where the stage ran, and here; the same inputs in both."""
    there, here = (with_inputs(make_checkout(tmp_path / name)) for name in ("there", "here"))
    made = there.root / "reports/contract"
    made.mkdir(parents=True)
    (made / "index.html").write_text("<p>" + 300_000 * "kept ")  # two parts of 1 MiB
    (there.root / "metrics/contract.json").write_text('{"success": true}')
    return there, here


def exported(there: Checkout, tmp_path: Path) -> Path:
    there.djepa("export-stage", "contract", str(tmp_path / "packed"), "--most", "1")
    return tmp_path / "packed"


def test_outputs_come_into_dvcs_record_as_if_the_stage_had_run(two, tmp_path):
    there, here = two
    packed = exported(there, tmp_path)
    assert len(list(packed.glob("part-*"))) == 2
    here.djepa("import-stage", str(packed))
    for path in ("reports/contract/index.html", "metrics/contract.json"):
        assert (here.root / path).read_bytes() == (there.root / path).read_bytes()
    # DVC has nothing to run, and has the outputs in its cache.
    assert json.loads(here.dvc("status", "--json", "contract")) == {}
    shutil.rmtree(here.root / "reports/contract")
    here.dvc("checkout", "reports/contract")
    assert (here.root / "reports/contract/index.html").is_file()


def refused(here: Checkout, packed: Path) -> str:
    import sys

    answer = here.call(sys.executable, "-m", "components.cli", "import-stage", str(packed))
    assert answer.returncode == 2
    assert not (here.root / "reports/contract").exists()
    return answer.stderr


def test_what_was_made_from_something_else_is_refused(two, tmp_path):
    there, here = two
    packed = exported(there, tmp_path)
    manifest = here.root / "curated/manifest.txt"
    manifest.write_text("something else")
    assert "other inputs of contract than those here: curated" in refused(here, packed)
    manifest.write_text("what was curated")
    (packed / "part-001").write_bytes(b"cut off")
    assert "part-001" in refused(here, packed)
    here.djepa("compose", "scale=micro", "curation.contract.rows=21")
    assert "other parameters of contract" in refused(here, packed)
