"""Work cut in parts, each result a file of its own: a killed run goes on where it was, on any number of cores."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from numpy import ndarray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from tokenkit.align.bias import write_whole_with


@runtime_checkable
class Work(Protocol):
    """Something that turns a task into arrays, the same wherever and whenever it is asked. Can be pickled."""

    def run(self, task: Any) -> dict[str, ndarray]:
        """The arrays of one task, by name."""
        ...


def run_parts(
    folder: Path, name: str, work: Work, tasks: Sequence[Any], workers: int, advance: Callable[[], None]
) -> list[dict[str, ndarray]]:
    """The result of every task, in order; what the folder holds is not done again. `advance` is called for each."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}-{index:05d}.safetensors" for index in range(len(tasks))]
    missing = [index for index, path in enumerate(paths) if not _is_whole(path)]
    for _ in range(len(tasks) - len(missing)):
        advance()
    workers = min(workers, len(missing))
    if workers <= 1:
        for index in missing:
            _run_part(work, tasks[index], paths[index])
            advance()
    else:
        context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks of the libraries
        with ProcessPoolExecutor(workers, context, _prepare, (work,)) as pool:
            futures = [pool.submit(_run_prepared, tasks[index], paths[index]) for index in missing]
            try:
                for future in as_completed(futures):
                    future.result()
                    advance()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return [load_file(path) for path in paths]


def _run_part(work: Work, task: Any, path: Path) -> None:
    result = work.run(task)
    write_whole_with(path, lambda temporary: temporary.write_bytes(save(result)))


def _is_whole(path: Path) -> bool:
    try:
        return bool(path.is_file() and load_file(path))
    except SafetensorError:  # cut by a full disk or a crash of the machine
        return False


_prepared: list[Work] = []  # the work of this process, sent once and not with every task


def _prepare(work: Work) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _prepared[:] = [work]
    parent = multiprocessing.parent_process()
    if parent is not None:  # a killed parent cannot stop its workers, so they watch it
        threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()


def _run_prepared(task: Any, path: Path) -> None:
    _run_part(_prepared[0], task, path)
