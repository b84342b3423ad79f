"""Times mergekit's own batched matching pursuit for `omp_speed.py`, in a process of its own with its own Python.

`PEER_PYTHON omp_worker.py FOLDER K`: for each line on standard input, the numbers of the first and the last row, fits
these rows of FOLDER/targets.npy to FOLDER/atoms.npy and prints the CPU seconds; all sums are in FOLDER/peer.npz after
the last. Rows go in batches of 512, its default.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from mergekit.tokensurgeon.omp import batch_omp


def main() -> None:
    """One measurement per line."""
    torch.set_num_threads(1)
    folder, k = Path(sys.argv[1]), int(sys.argv[2])
    atoms, targets = (torch.from_numpy(np.load(folder / f"{name}.npy")) for name in ("atoms", "targets"))
    ids, weights = [], []
    for line in sys.stdin:
        first, last = map(int, line.split())
        begin = time.process_time()
        found = batch_omp(targets[first:last], atoms, k)
        print(time.process_time() - begin, flush=True)
        ids.append(found[0].numpy())
        weights.append(found[1].numpy())
    np.savez(folder / "peer.npz", ids=np.concatenate(ids), weights=np.concatenate(weights))


if __name__ == "__main__":
    main()
