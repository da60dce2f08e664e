"""Work spread over processes: order, errors, deaths."""

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from components import cli, stages
from components.errors import BUSY, Busy, UserError
from components.processes import only_one, spread

ROOT = Path(__file__).parents[1]


def adder(more):
    def add(number):
        if number < 0:
            raise UserError(f"{number} is below 0")
        time.sleep(0.2 if number == 1 else 0)
        return number + more, os.getpid()

    return add


def dying():
    return lambda number: os._exit(number)


def test_results_come_in_order_from_other_processes():
    results = list(spread(partial(adder, 10), [1, 2, 3], 2, "died"))
    assert [value for value, _ in results] == [11, 12, 13]
    assert os.getpid() not in {process for _, process in results}


@pytest.mark.parametrize("parts, workers", [([1, 2], 1), ([1], 4), ([], 4)])
def test_one_worker_or_part_stays_in_this_process(parts, workers):
    results = list(spread(partial(adder, 10), parts, workers, "died"))
    assert results == [(10 + part, os.getpid()) for part in parts]


def test_an_error_comes_through_and_a_death_is_put_in_words():
    with pytest.raises(UserError, match="-1 is below 0"):
        list(spread(partial(adder, 0), [2, -1, 3], 2, "died"))
    with pytest.raises(UserError, match=r"^It died\.$"):
        list(spread(dying, [1, 1], 2, "It died."))


def test_a_killed_parent_leaves_no_process_behind(tmp_path):
    code = """
import time
from components.processes import only_one, spread

def slow():
    return lambda part: time.sleep(60)

if __name__ == "__main__":
    list(spread(slow, [1, 2], 2, "died"))
"""
    (tmp_path / "parent.py").write_text(code)
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "parent.py"], env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    children: list[psutil.Process] = []
    deadline = time.monotonic() + 60
    # Two workers, and the helper of multiprocessing that ends by itself.
    while len(children) < 3 and time.monotonic() < deadline:
        time.sleep(0.2)
        children = psutil.Process(parent.pid).children(recursive=True)
    parent.kill()
    parent.wait()
    assert len(children) == 3
    assert not psutil.wait_procs(children, timeout=20)[1]


HOLD = """
import sys, time
from pathlib import Path
from components.processes import only_one
with only_one(Path(sys.argv[1]), "The stage phase1"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_only_one_process_is_at_a_stage_until_it_ends_or_is_killed(tmp_path: Path) -> None:
    lock = tmp_path / "resume" / "hash.lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)], cwd=ROOT, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline()
        said = rf"phase1 is being run by process {holder.pid} in {ROOT}"
        with pytest.raises(Busy, match=said), only_one(lock, "The stage phase1"):
            pass
    finally:
        holder.kill()
        holder.wait()
    with only_one(lock, "The stage phase1"):
        assert lock.exists()
    assert not lock.exists()


def test_a_stage_that_another_process_is_at_ends_with_the_code_to_try_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def busy(name: str) -> None:
        raise Busy(f"The stage {name} is being run by process 7")

    monkeypatch.setattr(stages, "run_stage", busy)
    monkeypatch.setattr(sys, "argv", ["djepa", "stage", "phase1"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == BUSY
    assert capsys.readouterr().err == "djepa: The stage phase1 is being run by process 7\n"
