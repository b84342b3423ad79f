"""Orthogonal matching pursuit beside that of mergekit-tokensurgeon 0.1.5, one thread, the same rows in one run.

Rows near a subspace with noise stand for embeddings: shared tokens (atoms of length one, for which both judge alike)
and new tokens. Prints a Markdown table: CPU seconds in all, the share of each row's length that is left on average,
and on how many rows the same atoms were taken as by the peer; and writes it as JSON where --json names a file.
Both take turns, 512 rows each. Our seconds contain the inner products of the shared tokens.
Usage: python benchmarks/omp_speed.py --peer PYTHON [--atoms 26600] [--rows 4096] [--width 2048] [--k 64]
       [--screens 256 ...] [--json FILE]     where PYTHON is that of an environment with mergekit 0.1.5
"""

import os

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import argparse
import json
import resource
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from tokenkit.transfer.solver import Atoms, Pursuit

TURN = 512  # rows


def tables(count: int, rows: int, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Atoms of length one, and rows; all near a subspace of an eighth of the dimensions."""
    generator, rank = torch.Generator().manual_seed(seed), width // 8
    subspace = torch.randn(rank, width, generator=generator) / rank**0.5
    made = torch.randn(count + rows, rank, generator=generator) @ subspace
    made += 0.3 * torch.randn(count + rows, width, generator=generator)
    return torch.nn.functional.normalize(made[:count], dim=1), made[count:]


def left(atoms: torch.Tensor, targets: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> float:
    """The mean share of a row's length that its sum leaves."""
    shares = [
        float((row - one.double() @ atoms[taken].double()).norm() / row.norm())
        for row, taken, one in zip(targets.double(), ids, weights, strict=True)
    ]
    return sum(shares) / len(shares)


class Ours:
    """Our search, and the seconds it took."""

    def __init__(self, atoms: torch.Tensor, rows: int, k: int, screens: list[int | None]) -> None:
        begin = time.process_time()
        self.atoms, self.k, self.screens = Atoms.of(atoms, rows=rows, k=k), k, screens
        self.setup = time.process_time() - begin
        self.seconds = dict.fromkeys(screens, self.setup)
        self.found: dict[int | None, list[Pursuit]] = {screen: [] for screen in screens}

    def turn(self, targets: torch.Tensor) -> None:
        """Every search for these rows."""
        for screen in self.screens:
            begin = time.process_time()
            self.found[screen].append(self.atoms.pursue(targets, self.k, screen=screen))
            self.seconds[screen] += time.process_time() - begin


def measured(args: argparse.Namespace, folder: Path) -> list[dict[str, str | float]]:
    """A row of the table per search."""
    atoms, targets = tables(args.atoms, args.rows, args.width, args.seed)
    np.save(folder / "atoms.npy", atoms.numpy())
    np.save(folder / "targets.npy", targets.numpy())
    command = [args.peer, str(Path(__file__).with_name("omp_worker.py")), str(folder), str(args.k)]
    ours, seconds = Ours(atoms, args.rows, args.k, [None, *args.screens]), 0.0
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as peer:
        assert peer.stdin is not None
        assert peer.stdout is not None
        for first in range(0, args.rows, TURN):
            last = min(first + TURN, args.rows)
            peer.stdin.write(f"{first} {last}\n")
            peer.stdin.flush()
            seconds += float(peer.stdout.readline())
            ours.turn(targets[first:last])
            print(f"{last} rows: peer {seconds:.0f} s, ours {list(map(round, ours.seconds.values()))} s", flush=True)
    peer_found = np.load(folder / "peer.npz")
    ids, weights = torch.from_numpy(peer_found["ids"]), torch.from_numpy(peer_found["weights"])
    peer_row = {"search": "mergekit", "seconds": seconds, "ratio": 1.0, "same": 1.0}
    table: list[dict[str, str | float]] = [{**peer_row, "left": left(atoms, targets, ids, weights)}]
    for screen, found in ours.found.items():
        our_ids, our_weights = torch.cat([one.ids for one in found]), torch.cat([one.weights for one in found])
        same = (our_ids.sort(1).values == ids.sort(1).values).all(1).double().mean()
        name = "all" if screen is None else f"screen={screen}"
        table.append(
            {
                "search": f"{name} (inner products: {ours.setup:.1f} s)",
                "seconds": ours.seconds[screen],
                "ratio": seconds / ours.seconds[screen],
                "left": left(atoms, targets, our_ids, our_weights),
                "same": float(same),
            }
        )
    return table


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True)
    for name, value in (("atoms", 26600), ("rows", 4096), ("width", 2048), ("k", 64), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--screens", type=int, nargs="*", default=[256])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        table = measured(args, Path(folder))
    print(f"\n{args.rows} rows of width {args.width}, {args.atoms} shared tokens, k = {args.k}\n")
    print("| search | CPU s | times as fast | left of a row | same atoms |\n|---|---:|---:|---:|---:|")
    for row in table:
        print("| {search} | {seconds:.1f} | {ratio:.1f} | {left:.5f} | {same:.1%} |".format(**row))
    print(f"\npeak memory of ours: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")
    if args.json is not None:
        args.json.write_text(json.dumps(table, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
