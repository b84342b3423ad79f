"""Label log-probability, boundary mass and the best k without logits, beside log-softmax of dense logits, one thread.

Time: forward and backward, median ratio over interleaved repeats in one run. Memory: peak of the process beyond the
inputs and their gradients, each way in a process of its own (Linux). Prints two Markdown tables.
Usage: python benchmarks/token_scores.py [--vocabularies 131072 151936] [--tokens 512] [--width 64]
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tokenkit.scores import token_scores, token_scores_dense, top_k_scores

REPEATS = 7
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


def measure_time(vocabulary: int, tokens: int, width: int) -> dict[str, float]:
    """Median CPU time of each way over the median of the dense one."""
    problem = Problem(vocabulary, tokens, width)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(REPEATS + 1):
        for way, kept in times.items():
            began = time.process_time()
            problem.run(way)
            kept.append(time.process_time() - began)
    medians = {way: statistics.median(kept[1:]) for way, kept in times.items()}
    return {way: medians[way] / medians[dense] for way, dense in DENSE.items()}


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


def measure_memory(vocabulary: int, tokens: int, width: int) -> dict[str, float]:
    """Extra peak memory of each way over the dense one's."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peaks = {way: pool.apply(extra_memory, (way, vocabulary, tokens, width)) for way in WAYS}
    return {way: peaks[way] / peaks[dense] for way, dense in DENSE.items()}


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[4096, 50257, 128256, 151665])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--width", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for title, measure in (("time", measure_time), ("extra memory", measure_memory)):
        print(f"\n| {title} over dense, vocabulary | {' | '.join(DENSE)} |\n|---:|{'---:|' * len(DENSE)}", flush=True)
        for vocabulary in options.vocabularies:
            ratios = measure(vocabulary, options.tokens, options.width).values()
            print(f"| {vocabulary:,} | {' | '.join(f'{ratio:.3f}' for ratio in ratios)} |", flush=True)


if __name__ == "__main__":
    main()
