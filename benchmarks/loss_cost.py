"""ALM's loss beside TRL's ULD and hybrid loss over the same text, forward and backward, one thread, CPU time.

Llama-3 (128,256 rows) and Qwen2 (151,665 rows), web text. TRL is given logits. ALM is timed from the same logits, and
from hidden states and heads, so that the products which TRL is spared are part of its time. Both align within the time
and get ids with byte spans. Prints a Markdown table of medians over interleaved repeats. Needs the shared data folder.
Usage: python -m benchmarks.loss_cost [--tokens 128] [--width 64] [--repeats 5] [--swap]
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from trl.experimental.gold import GOLDConfig
from trl.experimental.gold.gold_trainer import ULDLoss

from benchmarks.alignment_throughput import SHARED, bare, read_texts
from tokenkit.align.boundary import boundary_tokens
from tokenkit.align.spans import align
from tokenkit.data.batch import collate
from tokenkit.data.example import Example
from tokenkit.data.example import Side as Row
from tokenkit.losses.alm import alm
from tokenkit.quantities import Quantities
from tokenkit.scores import token_scores, token_scores_of_logits
from tokenkit.tokenizers.base import Encoding, framed
from tokenkit.tokenizers.load import load_tokenizer

ALM_INPUTS = [f"{side}_chunk_{name}" for name in ("logp", "boundary_logp", "tokens") for side in ("student", "teacher")]


@dataclass
class Side:
    """One tokenizer's reading of the text, and what a model with that vocabulary computes."""

    name: str
    encoding: Encoding
    hidden: Tensor
    head: Tensor
    logits: Tensor
    boundary: Tensor

    @classmethod
    def of(cls, name: str, text: str, width: int) -> "Side":
        tokenizer = load_tokenizer(str(SHARED / "data/tokenizers" / name))
        encoding = framed(tokenizer.encode(text), tokenizer.start_id(), None)
        hidden = torch.randn(1, len(encoding), width)
        head = torch.randn(tokenizer.vocab_size, width) / width**0.5 * 2
        return cls(name, encoding, hidden, head, hidden @ head.T, torch.from_numpy(boundary_tokens(tokenizer)))

    def ids(self) -> Tensor:
        return torch.from_numpy(self.encoding.ids).long().unsqueeze(0)

    def labels(self) -> Tensor:
        """TRL's: the start token is the prompt."""
        labels = self.ids()
        labels[0, 0] = -100
        return labels

    def offsets(self) -> Tensor:
        return torch.from_numpy(np.stack([self.encoding.starts, self.encoding.ends], 1)).unsqueeze(0)


def trl_loss(student: Side, teacher: Side, hybrid: bool) -> Callable[[Tensor], Tensor]:
    """TRL's loss with its defaults, of the student's logits."""
    config = GOLDConfig("unused", use_uld_loss=True, uld_use_hybrid_loss=hybrid, bf16=False, use_cpu=True)
    loss = ULDLoss(config, bare(student.name), bare(teacher.name))
    fixed = [[side.labels() for side in (student, teacher)], [side.ids() for side in (student, teacher)]]
    offsets = {"student_byte_offsets": student.offsets(), "teacher_byte_offsets": teacher.offsets()}
    return lambda logits: loss(logits, teacher.logits, *fixed[0], *fixed[1], **offsets)


def batch_of(student: Side, teacher: Side) -> dict[str, Tensor]:
    """Both sides aligned, as the training loop has them."""
    found = align(teacher.encoding, student.encoding)
    rows = [
        Row(side.encoding.ids, chunk, np.ones(len(chunk), np.bool_))
        for side, chunk in ((student, found.chunk_b), (teacher, found.chunk_a))
    ]
    return collate([Example(*rows, len(found), int(student.encoding.ends[-1]))], [0]).tensors


def alm_of(batch: dict[str, Tensor], scores: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
    """ALM with its defaults, from the scores of both sides."""
    leaves = {}
    for side, pair in scores.items():
        padded = batch[f"{side}_labels"].shape[1]
        for name, score in zip(("label_logp", "boundary_logp"), pair):
            leaves[f"{side}_{name}"] = torch.nn.functional.pad(score, (0, padded - score.shape[1]))
    known = Quantities(batch, leaves)
    return alm(*(known[name] for name in ALM_INPUTS)).mean()


def from_logits(student: Side, teacher: Side) -> Callable[[Tensor], Tensor]:
    def loss(logits: Tensor) -> Tensor:
        batch = batch_of(student, teacher)
        labels = {side: batch[f"{side}_labels"][:, : len(of.encoding)] for side, of in sides.items()}
        with torch.no_grad():
            fixed = token_scores_of_logits(teacher.logits, labels["teacher"], teacher.boundary)
        own = token_scores_of_logits(logits, labels["student"], student.boundary)
        return alm_of(batch, {"student": own, "teacher": fixed})

    sides = {"student": student, "teacher": teacher}
    return loss


def from_hidden(student: Side, teacher: Side, head: Tensor) -> Callable[[Tensor], Tensor]:
    def loss(hidden: Tensor) -> Tensor:
        batch = batch_of(student, teacher)
        labels = {side: batch[f"{side}_labels"][:, : len(of.encoding)] for side, of in sides.items()}
        with torch.no_grad():
            fixed = token_scores(teacher.hidden, teacher.head, labels["teacher"], teacher.boundary)
        own = token_scores(hidden, head, labels["student"], student.boundary)
        return alm_of(batch, {"student": own, "teacher": fixed})

    sides = {"student": student, "teacher": teacher}
    return loss


def ways_of(student: Side, teacher: Side) -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    """Every loss, and the tensor that gets gradients."""
    logits = student.logits.clone().requires_grad_()
    hidden = student.hidden.clone().requires_grad_()
    head = student.head.clone().requires_grad_()
    return {
        "TRL: ULD, from logits": (trl_loss(student, teacher, False), logits),
        "TRL: hybrid, from logits": (trl_loss(student, teacher, True), logits),
        "ALM, from logits": (from_logits(student, teacher), logits),
        "ALM, from hidden states": (from_hidden(student, teacher, student.head), hidden),
        "ALM, from hidden states, the head learns too": (from_hidden(student, teacher, head), hidden),
    }


def measure(student: Side, teacher: Side, repeats: int) -> dict[str, list[float]]:
    """CPU seconds of each way, in turn."""
    ways = ways_of(student, teacher)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, (loss, leaf) in ways.items():
            for _, other in ways.values():
                other.grad = None
            begin = time.process_time()
            loss(leaf).backward()
            if repeat:  # the first round warms caches
                seconds[name].append(time.process_time() - begin)
            assert leaf.grad is not None
            assert leaf.grad.any()
    return seconds


def sides_of(names: tuple[str, str], tokens: int, width: int) -> tuple[Side, Side]:
    """Student and teacher over the first so many student tokens of a web text."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    document = next(text for text in read_texts(600) if len(text) > 16 * tokens)
    whole = load_tokenizer(str(SHARED / "data/tokenizers" / names[0])).encode(document)
    text = document.encode()[: whole.ends[tokens - 1]].decode()
    student, teacher = (Side.of(name, text, width) for name in names)
    return student, teacher


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128, help="of the student, the start token left out")
    parser.add_argument("--width", type=int, default=64, help="of the hidden states")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--swap", action="store_true", help="Qwen2 learns from Llama-3, not Llama-3 from Qwen2")
    options = parser.parse_args()
    names = ("qwen2", "llama3") if options.swap else ("llama3", "qwen2")
    student, teacher = sides_of(names, options.tokens, options.width)
    seconds = measure(student, teacher, options.repeats)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for side, role in ((student, "student"), (teacher, "teacher")):
        print(f"{role} {side.name}: {len(side.encoding) - 1} tokens, {len(side.head):,} rows")
    print("\n| loss, forward + backward | CPU-s | TRL's ULD / it | TRL's hybrid / it |\n| --- | ---: | ---: | ---: |")
    uld, hybrid = list(medians.values())[:2]
    for name, median in medians.items():
        print(f"| {name} | {median:.3f} | {uld / median:.1f} | {hybrid / median:.1f} |")


if __name__ == "__main__":
    main()
