"""Some steps of a run under torch's profiler: a trace for chrome://tracing or Perfetto, and a table of operations."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from tokenkit.train.folder import write_text
from tokenkit.train.schema import ProfileConfig

TRACE, TABLE = "trace.json", "top.txt"


@contextmanager
def profiled(folder: Path, config: ProfileConfig | None, device: torch.device) -> Iterator[Callable[[], None]]:
    """Yields what has to be called after every step; writes `folder/trace.json` and `folder/top.txt`."""
    if config is None:
        yield lambda: None
        return
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"

    def write(finished: profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f".{TRACE}.tmp"
        finished.export_chrome_trace(str(unfinished))
        unfinished.rename(folder / TRACE)
        table = finished.key_averages().table(sort_by=order, row_limit=config.top)
        write_text(folder / TABLE, table + "\n")

    course = schedule(wait=config.wait, warmup=config.warmup, active=config.active, repeat=1)
    with profile(activities=activities, schedule=course, on_trace_ready=write, profile_memory=True) as running:
        yield running.step
