"""Label log-probability, boundary mass and the best k without logits, beside log-softmax of dense logits, one thread.

Time: forward and backward, median ratio over interleaved repeats in one run. Memory: peak of the process beyond the
inputs and their gradients, each way in a process of its own (Linux). Prints two Markdown tables.
With --json the claim is written: the last of the vocabularies, and ALM beside TRL's losses over Llama-3 and Qwen2.
Usage: python -m benchmarks.token_scores [--vocabularies 131072 151936] [--tokens 512] [--width 64] [--json FILE]
"""

import argparse
import importlib.metadata
import importlib.util
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tokenkit.report.claims import Row, absent, make_claim, measured, own_command, save_claim
from tokenkit.scores import token_scores, token_scores_dense, top_k_scores

REPEATS = 7
SHARED = Path(os.environ.get("TOKENKIT_SHARED", Path(__file__).resolve().parents[2] / "shared"))
WAYS = ("dense cross-entropy", "label", "dense label and boundary", "label and boundary", "dense top 16", "top 16")
DENSE = {way: f"dense {way}" for way in WAYS if not way.startswith("dense")} | {"label": "dense cross-entropy"}


class Problem:
    """Hidden states and a head, and every way to score them."""

    def __init__(self, vocabulary: int, tokens: int, width: int):
        generator = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(tokens, width, generator=generator, requires_grad=True)
        self.head = torch.randn(vocabulary, width, generator=generator, requires_grad=True)
        self.labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
        self.boundary = torch.rand(vocabulary, generator=generator) < 0.35

    def run(self, way: str) -> None:
        """Forward and backward, from no gradients."""
        self.hidden.grad = self.head.grad = None
        ways: dict[str, Callable[[], Tensor]] = {
            "dense cross-entropy": lambda: torch.nn.functional.cross_entropy(self.hidden @ self.head.T, self.labels),
            "label": lambda: -token_scores(self.hidden, self.head, self.labels)[0].mean(),
            "dense label and boundary": lambda: _sum(
                *token_scores_dense(self.hidden @ self.head.T, self.labels, self.boundary)
            ),
            "label and boundary": lambda: _sum(*token_scores(self.hidden, self.head, self.labels, self.boundary)),
            "dense top 16": lambda: _dense_top(self.hidden @ self.head.T),
            "top 16": lambda: _sum(*top_k_scores(self.hidden, self.head, 16)[::2]),
        }
        ways[way]().backward()


def _sum(*scores: Tensor) -> Tensor:
    return -torch.stack([score.mean() for score in scores]).sum()


def _dense_top(logits: Tensor) -> Tensor:
    logp = logits.log_softmax(-1)
    best = logp.topk(16)
    return _sum(best.values, logp.scatter(-1, best.indices, -torch.inf).logsumexp(-1))


def measure_time(vocabulary: int, tokens: int, width: int) -> dict[str, list[float]]:
    """CPU time of each way, in turn."""
    problem = Problem(vocabulary, tokens, width)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(REPEATS + 1):
        for way, kept in times.items():
            began = time.process_time()
            problem.run(way)
            kept.append(time.process_time() - began)
    return {way: kept[1:] for way, kept in times.items()}


def extra_memory(way: str, vocabulary: int, tokens: int, width: int) -> int:
    """Peak KiB of a fresh process beyond the inputs and their gradients."""
    torch.set_num_threads(1)
    Problem(64, 8, width).run(way)  # loads what the first call loads
    problem = Problem(vocabulary, tokens, width)
    gradients = (vocabulary + tokens) * width * 4 // 1024
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _peak_kib()
    problem.run(way)
    return _peak_kib() - before - gradients


def _peak_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measure_memory(vocabulary: int, tokens: int, width: int) -> dict[str, list[float]]:
    """Extra peak memory of each way, in KiB."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return {way: [pool.apply(extra_memory, (way, vocabulary, tokens, width))] for way in WAYS}


def loss_memory(way: str, tokens: int) -> int:
    """Peak KiB of a fresh process while one loss over Llama-3 and Qwen2 is computed, both ways, beyond its inputs."""
    from benchmarks.loss_cost import sides_of, ways_of

    loss, leaf = ways_of(*sides_of(("llama3", "qwen2"), tokens, 64))[way]
    leaf.grad = torch.zeros_like(leaf)  # not counted on any side
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak_kib()
    loss(leaf).backward()
    return _peak_kib() - before


def beside_trl(tokens: int) -> list[Row]:
    """ALM beside TRL's two losses: time and memory."""
    why = None
    if importlib.util.find_spec("trl") is None:
        why = "trl is not installed"
    elif not SHARED.is_dir():
        why = "the shared data folder is not there"
    if why is not None:
        return [absent("ALM, from logits", "TRL ULD, from logits", "CPU seconds", why)]
    from benchmarks.loss_cost import measure, sides_of

    seconds = measure(*sides_of(("llama3", "qwen2"), tokens, 64), repeats=3)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        memory = {way: [pool.apply(loss_memory, (way, tokens)) / 1024] for way in seconds}
    found = []
    for peer in ("TRL: ULD, from logits", "TRL: hybrid, from logits"):
        for own in ("ALM, from logits", "ALM, from hidden states, the head learns too"):
            found.append(measured(own, peer, "CPU seconds", seconds[own], seconds[peer]))
            found.append(measured(own, peer, "extra peak MB", memory[own], memory[peer]))
    return found


def write_claim(path: Path, times: dict[str, list[float]], memory: dict[str, list[float]], vocabulary: int) -> None:
    """What was found, in the common form."""
    rows = []
    for way, dense in DENSE.items():
        what, beside = f"{way}, without logits", f"torch, {dense.removeprefix('dense ')} of dense logits"
        rows.append(measured(what, beside, "extra peak MB", [memory[way][0] / 1024], [memory[dense][0] / 1024]))
        rows.append(measured(what, beside, "CPU seconds", times[way], times[dense]))
    sentence = (
        f"Forward and backward over a vocabulary of {vocabulary:,}: label log-probabilities, boundary mass and the "
        "best 16 beside torch's dense way, and ALM beside TRL's losses over Llama-3 and Qwen2. Memory is what is "
        "taken beyond the inputs."
    )
    there = importlib.util.find_spec("trl") is not None
    peers = {"trl": importlib.metadata.version("trl") if there else "absent: not installed"}
    save_claim(path, make_claim("memory", sentence, own_command(), rows + beside_trl(64), peers))


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[4096, 50257, 128256, 151665])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--json", type=Path, help="write the claim there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, list[float]]] = {}
    for title, measure in (("time", measure_time), ("extra memory", measure_memory)):
        print(f"\n| {title} over dense, vocabulary | {' | '.join(DENSE)} |\n|---:|{'---:|' * len(DENSE)}", flush=True)
        for vocabulary in options.vocabularies:
            found[title] = measure(vocabulary, options.tokens, options.width)
            medians = {way: statistics.median(values) for way, values in found[title].items()}
            ratios = [medians[way] / medians[dense] for way, dense in DENSE.items()]
            print(f"| {vocabulary:,} | {' | '.join(f'{ratio:.3f}' for ratio in ratios)} |", flush=True)
    if options.json is not None:
        write_claim(options.json, found["time"], found["extra memory"], options.vocabularies[-1])


if __name__ == "__main__":
    main()
