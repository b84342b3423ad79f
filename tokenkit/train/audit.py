"""Where the time and the memory of a run go: seconds by part of a step, bytes by phase, and garbage between phases.

On a GPU a part is timed by two events in the stream, which are read when a line is logged: the host waits for nothing
that it would not have waited for.
"""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import record_function

PARTS = ("data", "teacher", "student_forward", "losses", "backward", "optimizer")
STATM, STATUS, CLEAR_REFS = (Path("/proc/self") / name for name in ("statm", "status", "clear_refs"))
RESET_PEAK = "5"  # what makes Linux forget the highest resident size so far


class Clock:
    """Seconds by part of a step. A part inside another one counts for itself alone, not for the one around it."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._spans: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._part: str | None = None
        self._since = self._now()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Counts what happens inside as this part."""
        before = self._part
        self._turn_to(part)
        try:
            with record_function(part):
                yield
        finally:
            self._turn_to(before)

    def read(self) -> dict[str, float]:
        """Seconds of each part since the last reading."""
        if self._spans:
            self._spans[-1][2].synchronize()
        for part, began, ended in self._spans:
            self._seconds[part] += began.elapsed_time(ended) / 1000
        found = self._seconds
        self._seconds, self._spans = dict.fromkeys(PARTS, 0.0), []
        return found

    def _turn_to(self, part: str | None) -> None:
        now = self._now()
        if self._part is not None:
            if isinstance(now, float):
                assert isinstance(self._since, float)
                self._seconds[self._part] += now - self._since
            else:
                assert not isinstance(self._since, float)
                self._spans.append((self._part, self._since, now))
        self._part, self._since = part, now

    def _now(self) -> "float | torch.cuda.Event":
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


class Audit:
    """What a run spends between two lines of metrics.jsonl; values are averages over the steps in between."""

    def __init__(self, device: torch.device, collect_every: int | None):
        self.device, self.collect_every = device, collect_every
        self.clock = Clock(device)
        self.speed = 0.0
        """Tokens per second of the last step."""
        self._steps = self._tokens = self._measurements = 0
        self._wall = 0.0
        self._evaluation: dict[str, float | int] = {}

    @contextmanager
    def run(self) -> Iterator[None]:
        """Around a whole run: later collections look only through what the run itself has made."""
        ours = self.collect_every is not None and gc.get_freeze_count() == 0
        if ours:  # a collection through all that torch and transformers hold takes half a second
            gc.freeze()
        reset_peaks(self.device)
        try:
            yield
        finally:
            if ours:
                gc.unfreeze()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around an optimizer step."""
        began = time.perf_counter()
        yield
        self._last = time.perf_counter() - began
        self._wall += self._last
        self._steps += 1

    def count(self, num_tokens: int) -> None:
        """The step that has just ended read so many tokens."""
        self._tokens += num_tokens
        self.speed = num_tokens / self._last

    def values(self) -> dict[str, float | int]:
        """Seconds of a step and of its parts, tokens per second, and memory; counting begins anew."""
        steps = max(1, self._steps)
        parts = {f"time/{part}": round(seconds / steps, 6) for part, seconds in self.clock.read().items()}
        found = {
            "tokens_per_second": round(self._tokens / self._wall, 1) if self._wall else 0.0,
            "time/step": round(self._wall / steps, 6),
            **parts,
            **memory(self.device, "memory"),
        }
        self._steps = self._tokens = 0
        self._wall = 0.0
        return found

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Around a measurement: a phase of its own, with a collection of garbage at both ends."""
        collecting = self.collect_every is not None and self._measurements % self.collect_every == 0
        self._measurements += 1
        spent = collect_garbage(self.device) if collecting else 0.0
        reset_peaks(self.device)
        began = time.perf_counter()
        yield
        taken = time.perf_counter() - began
        self._evaluation = {"time/eval": round(taken, 6), **memory(self.device, "memory/eval")}
        if collecting:
            self._evaluation["time/garbage"] = round(spent + collect_garbage(self.device), 6)
        reset_peaks(self.device)

    def evaluation_values(self) -> dict[str, float | int]:
        """Seconds and memory of the last measurement, and seconds of the collections around it."""
        return self._evaluation


def memory(device: torch.device, name: str) -> dict[str, float | int]:
    """Bytes by `name/...`: resident and its peak, and on a GPU allocated, reserved and the peak of what was allocated.

    What cannot be known here is left out.
    """
    found: dict[str, float | int] = {}
    if STATM.is_file():
        found[f"{name}/cpu_rss"] = resident_bytes()
        found[f"{name}/cpu_peak"] = peak_bytes()
    if device.type == "cuda":
        found[f"{name}/cuda_allocated"] = torch.cuda.memory_allocated(device)
        found[f"{name}/cuda_reserved"] = torch.cuda.memory_reserved(device)
        found[f"{name}/cuda_peak"] = torch.cuda.max_memory_allocated(device)
    return found


def resident_bytes() -> int:
    """Resident bytes of this process now (Linux)."""
    import resource  # not on every system that the rest of this file is imported on

    return int(STATM.read_text("ascii").split()[1]) * resource.getpagesize()


def peak_bytes() -> int:
    """The most resident bytes of this process since `reset_peaks` (Linux); never below those it has now."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text("utf-8").splitlines() if ":" in line)
    peak = int(lines["VmHWM"].split()[0]) * 1024 if "VmHWM" in lines else 0
    return max(peak, resident_bytes())


def reset_peaks(device: torch.device) -> None:
    """Peaks are counted from here on; where the system does not allow it, a CPU's stays that of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        CLEAR_REFS.write_text(RESET_PEAK, "ascii")
    except OSError:
        return


def collect_garbage(device: torch.device) -> float:
    """Frees what only cycles hold, and a GPU's cached blocks; the seconds that it took."""
    began = time.perf_counter()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return time.perf_counter() - began
