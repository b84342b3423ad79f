"""The command line in several processes, as `torchrun` would start them, without importing everything each time."""

import multiprocessing
import os
import socket
import sys
from pathlib import Path

SECONDS = 300
CONTEXT = multiprocessing.get_context("forkserver")  # its processes have computed nothing: threads survive no fork
CONTEXT.set_forkserver_preload(["tokenkit.verbs.distill", "tokenkit.verbs.stages", "tokenkit.cli"])


def _one(rank: int, count: int, port: int, words: list[str], said: Path) -> None:
    with said.open("w") as file:
        os.dup2(file.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if count:
        os.environ |= {name: str(value) for name, value in place.items()} | {"GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    import torch

    from tokenkit.cli import main

    torch.set_num_threads(1)
    sys.argv = ["tokenkit", *words]
    main()


class Started:
    """Processes of one run that are under way."""

    def __init__(self, count: int, words: list[str], folder: Path):
        """0: one that `torchrun` has not started."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        folder.mkdir(parents=True, exist_ok=True)
        self.notes = [folder / f"said_{rank}.txt" for rank in range(max(1, count))]
        arguments = [(rank, count, port, words, note) for rank, note in enumerate(self.notes)]
        self.processes = [CONTEXT.Process(target=_one, args=one) for one in arguments]
        for process in self.processes:
            process.start()

    def wait(self) -> list[tuple[int | None, str]]:
        """Exit code of each, and what it said on stderr."""
        for process in self.processes:
            process.join(SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
        return [(p.exitcode, note.read_text("utf-8")) for p, note in zip(self.processes, self.notes)]


def run(count: int, words: list[str], folder: Path) -> None:
    """Runs a command to its end in so many processes, 0 for one without torchrun; fails with what was said."""
    found = Started(count, words, folder).wait()
    assert all(code == 0 for code, _ in found), "\n".join(said[-3000:] for _, said in found)
