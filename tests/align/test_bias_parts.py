"""A killed run leaves whole parts and no process behind, and is continued to the same bytes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from numpy import ndarray

from tokenkit.align.parts import run_parts

SCRIPT = """
import os, sys, time
from pathlib import Path
import numpy as np
from tokenkit.align.parts import run_parts

class Slow:
    def run(self, task):
        (Path(sys.argv[1]) / f"pid-{os.getpid()}").touch()
        time.sleep(0.2)
        return {"square": np.full(50_000, task * task)}

if __name__ == "__main__":
    run_parts(Path(sys.argv[1]), "part", Slow(), range(12), 2, lambda: None)
"""


class Squares:
    def __init__(self) -> None:
        self.asked: list[int] = []

    def run(self, task: int) -> dict[str, ndarray]:
        self.asked.append(task)
        return {"square": np.full(50_000, task * task)}


def parts(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("part-*"))}


def test_killed_and_continued(tmp_path):
    script, folder = tmp_path / "script.py", tmp_path / "parts"
    script.write_text(SCRIPT, "utf-8")
    folder.mkdir()
    process = subprocess.Popen([sys.executable, str(script), str(folder)])
    deadline = time.monotonic() + 60
    while len(parts(folder)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(parts(folder))
    assert 3 <= done < 12
    workers = [int(path.name.removeprefix("pid-")) for path in folder.glob("pid-*")]
    assert len(workers) == 2
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    done = len(parts(folder))  # a worker may have finished what it was at

    work, other, steps = Squares(), tmp_path / "uninterrupted", []
    results = run_parts(folder, "part", work, range(12), 1, lambda: steps.append(1))
    assert len(work.asked) == 12 - done
    assert len(steps) == 12
    run_parts(other, "part", Squares(), range(12), 1, lambda: None)
    assert parts(folder) == parts(other)
    assert [int(result["square"][0]) for result in results] == [task * task for task in range(12)]


def test_a_part_cut_short_is_done_again(tmp_path):
    run_parts(tmp_path, "part", Squares(), range(3), 1, lambda: None)
    whole = parts(tmp_path)
    path = tmp_path / "part-00001.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    work = Squares()
    run_parts(tmp_path, "part", work, range(3), 1, lambda: None)
    assert work.asked == [1]
    assert parts(tmp_path) == whole


class Failing(Squares):
    def run(self, task: int) -> dict[str, ndarray]:
        raise OSError(28, os.strerror(28))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failure_is_heard(tmp_path, workers):
    with pytest.raises(OSError, match="No space left"):
        run_parts(tmp_path, "part", Failing(), range(3), workers, lambda: None)
    assert not parts(tmp_path)
