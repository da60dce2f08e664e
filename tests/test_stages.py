"""What dvc.yaml makes depend on what, asked of DVC itself."""

import json
import shutil

from tests.conftest import Checkout


def status(checkout: Checkout, *stages: str) -> dict[str, list]:
    """What DVC finds changed, by stage; in a tree where nothing was run much is missing."""
    return json.loads(checkout.dvc("status", "--json", *stages))


def test_another_seed_trains_again_but_curates_and_encodes_nothing_again(
    checkout: Checkout,
) -> None:
    stages = ("curate", "contract", "encode", "phase1")
    before = status(checkout, *stages)
    checkout.djepa("compose", "seed=1")
    after = status(checkout, *stages)
    for stage in ("curate", "contract", "encode"):
        assert after.get(stage) == before.get(stage)
    assert '"seed": "modified"' in json.dumps(after["phase1"])
    assert '"seed": "modified"' not in json.dumps(before["phase1"])


def test_pictures_drawn_for_the_first_time_are_not_said_to_be_as_recorded(
    checkout: Checkout,
) -> None:
    checkout.djepa("compose", "scale=micro", "data.raw.pictures=20")
    (checkout.root / "data.dvc").unlink()
    assert "now recorded in data.dvc" in checkout.djepa("data")
    shutil.rmtree(checkout.root / "data")
    assert "as recorded in data.dvc" in checkout.djepa("data")
