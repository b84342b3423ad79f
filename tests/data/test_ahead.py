"""Workers: the same batches, errors in one line, the run's random numbers untouched, and no process left behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from tokenkit.config import UserError
from tokenkit.data.ahead import READY, made_ahead
from tokenkit.data.batch import Batches
from tokenkit.data.example import cut
from tokenkit.data.mixture import WeightedSource
from tokenkit.data.order import MixedRows


def same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert (a.rows, a.num_bytes, a.num_tokens) == (b.rows, b.num_bytes, b.num_tokens)
        assert list(a.tensors) == list(b.tensors)
        assert all(tensor.equal(b.tensors[name]) for name, tensor in a.tensors.items())


@pytest.fixture
def batches(bpe, unigram, documents):
    sources = [WeightedSource(path="a", weight=2), WeightedSource(path="b", weight=1)]
    rows = MixedRows([cut(documents[:30], 200), cut(documents[30:], 200)], sources, mix_languages=True)
    return Batches(rows, bpe, unigram, batch_size=6, seed=1, pack_bytes=200)


@pytest.mark.parametrize("workers", [1, 3])
def test_processes_make_the_same_batches_and_begin_anywhere(batches, workers):
    state = torch.random.get_rng_state()
    with made_ahead(batches, workers) as ahead:
        for step in (0, 1, 2, 3, 7, 8, 2):
            same(ahead.at(step, 2), batches.at(step, 2))
        same(ahead.at(3, 1, 1, 2), batches.at(3, 1, 1, 2))
        assert ahead.place(5) == batches.place(5)
        assert ahead.rows_read(9) == batches.rows_read(9)
        assert len(multiprocessing.active_children()) == workers
    assert multiprocessing.active_children() == []
    assert torch.random.get_rng_state().equal(state)


class Counting:
    """Batches that count on disk which steps were asked of them, and end at one of them."""

    def __init__(self, folder, last):
        self.folder, self.last = folder, last

    def at(self, step, num_microbatches=1, rank=0, ranks=1):
        (self.folder / str(step)).touch()
        if step == self.last:
            raise UserError(f"step {step}: cannot be read")
        return []

    def place(self, step):
        return "nowhere"

    def rows_read(self, steps):
        return {}

    def state(self):
        return {}

    def load_state(self, tensors):
        pass


def test_no_more_is_made_than_is_asked_for_and_a_little_ahead(tmp_path):
    with made_ahead(Counting(tmp_path, 10_000), 2) as ahead:
        for step in range(4):
            assert ahead.at(step) == []
        time.sleep(0.3)
        assert len(list(tmp_path.iterdir())) <= 4 + 2 * READY


def test_what_goes_wrong_in_a_process_is_said_in_one_line(tmp_path):
    with made_ahead(Counting(tmp_path, 2), 2) as ahead:
        ahead.at(0)
        ahead.at(1)
        with pytest.raises(UserError, match=r"^step 2: cannot be read$"):
            ahead.at(2)
    assert multiprocessing.active_children() == []


def test_processes_end_with_whatever_ends_the_run(tmp_path):
    def interrupted():
        with made_ahead(Counting(tmp_path, 100), 2) as ahead:
            ahead.at(0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert multiprocessing.active_children() == []


def test_a_signal_to_all_processes_leaves_those_that_tokenise_alone(tmp_path):
    with made_ahead(Counting(tmp_path, 100), 2) as ahead:
        for step in range(2):  # one of each, so both are there
            ahead.at(step)
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGTERM)
        for step in range(2, 12):
            ahead.at(step)
    assert multiprocessing.active_children() == []


SCRIPT = """
import multiprocessing, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from tests.data.test_ahead import Counting
from tokenkit.data.ahead import made_ahead
with made_ahead(Counting(Path({folder!r}), 10**6), 2) as ahead:
    ahead.at(0)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["terminated", "killed"])
def test_a_killed_run_leaves_no_process(tmp_path, number):
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    (tmp_path / "steps").mkdir()
    script = SCRIPT.format(tests=root, folder=str(tmp_path / "steps"))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=root) as run:
        children = [int(word) for word in run.stdout.readline().split()]
        assert len(children) == 2
        run.send_signal(number)
        run.wait(20)
    deadline = time.monotonic() + 30  # a loader's process looks for its parent every few seconds
    while any(os.path.exists(f"/proc/{child}") for child in children) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not [child for child in children if os.path.exists(f"/proc/{child}")]
