"""Label log-probability and boundary mass without logits, beside `F.cross_entropy` on dense logits, one thread.

Prints a Markdown table of median ratios over interleaved repeats in one run. Usage: python benchmarks/token_scores.py
"""

import statistics
import time
from collections.abc import Callable

import torch

from tokenkit.quantities import token_scores

ROWS, WIDTH, REPEATS = 256, 64, 9


def measure(vocabulary: int) -> dict[str, float]:
    """Median CPU time of forward and backward over the median of the dense way."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator, requires_grad=True)
    head = torch.randn(vocabulary, WIDTH, generator=generator, requires_grad=True)
    labels = torch.randint(0, vocabulary, (ROWS,), generator=generator)
    boundary = torch.rand(vocabulary, generator=generator) < 0.35
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "dense cross-entropy": lambda: torch.nn.functional.cross_entropy(hidden @ head.T, labels),
        "label": lambda: -token_scores(hidden, head, labels)[0].mean(),
        "label and boundary": lambda: -sum(s.mean() for s in token_scores(hidden, head, labels, boundary)),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPEATS + 1):
        for name, way in ways.items():
            hidden.grad = head.grad = None
            began = time.process_time()
            way().backward()
            times[name].append(time.process_time() - began)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    return {name: value / medians["dense cross-entropy"] for name, value in medians.items()}


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    print("| vocabulary | dense cross-entropy | label | label and boundary |\n|---:|---:|---:|---:|")
    for vocabulary in (4096, 50257, 128256, 151665):
        print(f"| {vocabulary:,} | {' | '.join(f'{ratio:.2f}' for ratio in measure(vocabulary).values())} |")


if __name__ == "__main__":
    main()
