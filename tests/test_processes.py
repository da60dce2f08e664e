"""Work spread over processes: order, errors, deaths."""

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from components.errors import UserError
from components.processes import spread

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
from components.processes import spread

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
