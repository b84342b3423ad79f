"""Several processes of one run on this machine, as `torchrun` would start them, without importing everything again."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 240


def _one(rank: int, count: int, port: int, work: Callable[[], Any], said: Path) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if count:
        os.environ |= {name: str(value) for name, value in place.items()} | {"GLOO_SOCKET_IFNAME": "lo"}
    try:
        work()
    except BaseException as error:
        said.write_text("".join(traceback.format_exception(error)), "utf-8")
        code = error.code if isinstance(error, SystemExit) else 1
        os._exit(code if isinstance(code, int) else 1)
    os._exit(0)


def launched(count: int, work: Callable[[], Any], folder: Path) -> list[str]:
    """Does some work in so many processes; what each died of, "" where it came to its end.

    0: in one that `torchrun` has not started. Nothing may have been computed here before: threads do not survive a fork.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    folder.mkdir(parents=True, exist_ok=True)
    notes = [folder / f"died_{rank}.txt" for rank in range(max(1, count))]
    for note in notes:
        note.unlink(missing_ok=True)
    running = [context.Process(target=_one, args=(rank, count, port, work, note)) for rank, note in enumerate(notes)]
    for process in running:
        process.start()
    for process in running:
        process.join(SECONDS)
    late = [process for process in running if process.is_alive()]
    for process in late:
        process.kill()
        process.join()
    found = [note.read_text("utf-8") if note.is_file() else "" for note in notes]
    return [
        "took too long" if process in late else note or (f"exit {process.exitcode}" if process.exitcode else "")
        for process, note in zip(running, found)
    ]
