"""What one full ALM step costs beside plain cross-entropy training and a teacher's forward pass, one thread, CPU time.

Student: SmolLM2's tokenizer; teacher: GPT-2's; both of one size, random weights, web text. Beside it stands plain
Transformers code over the same padded ids: `model(ids, labels).loss.backward()` and the teacher's logits. Optimizer
steps and the making of batches are left out on both sides; a record's values are in the batch. Medians over
interleaved repeats. `--lengths` measures one row of so many tokens instead, and draws docs/step_cost.png.
Usage: python benchmarks/step_cost.py [--shape small smollm2_135m] [--batch 2] [--tokens 512] [--repeats 5] [--lengths]
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from alignment_throughput import SHARED, read_texts
from transformers import LlamaConfig, LlamaForCausalLM

from tokenkit.data.batch import Batch, collate
from tokenkit.data.example import Window, make_examples
from tokenkit.losses import LOSSES
from tokenkit.models.view import ModelView
from tokenkit.objective import LossesConfig, Objective
from tokenkit.quantities import Quantities
from tokenkit.scores import token_scores
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.train.step import accumulate_gradients
from tokenkit.train.tasks.distill import TextTask, boundary_mask

SHAPES = {  # hidden, intermediate, layers, heads, key-value heads
    "small": (256, 688, 8, 4, 4),
    "smollm2_135m": (576, 1536, 30, 9, 3),
}
LENGTHS = (256, 512, 1024, 2048, 4096)
LIMITS = {"live teacher": 1.15, "from a record": 1.10}
ALM_INPUTS = [f"{side}_chunk_{name}" for name in ("logp", "boundary_logp", "tokens") for side in ("student", "teacher")]
Job = Callable[[], object]


class Bench:
    """Both models, and rows of text of a given length."""

    def __init__(self, shape: str, longest: int):
        torch.manual_seed(0)
        self.tokenizers = [load_tokenizer(str(SHARED / "data/tokenizers" / name)) for name in ("smollm2", "gpt2")]
        self.models = [_model(SHAPES[shape], tokenizer.vocab_size, longest) for tokenizer in self.tokenizers]
        self.views = [ModelView(model) for model in self.models]
        self.text = "\n\n".join(read_texts(600))

    def batch(self, rows: int, tokens: int) -> Batch:
        """Rows of so many student tokens, the start token among them."""
        student, teacher = self.tokenizers
        windows, start, data = [], 0, self.text.encode()
        for row in range(rows):
            text = data[start : start + 16 * tokens].decode(errors="ignore")
            ends = student.encode(text).ends
            end = int(ends[tokens - 2])
            windows.append(Window(row, start, text.encode()[:end].decode(), False))
            start += end
        return collate(make_examples(windows, student, teacher), list(range(rows)))

    def task(self, losses: dict, teacher: bool) -> TextTask:
        objective = Objective.of(LossesConfig.model_validate(losses))
        (student, other), (own, its) = self.views, self.tokenizers
        return TextTask(objective, student, own, *((other, its) if teacher else ()))

    def recorded(self, batch: Batch) -> Batch:
        """The batch with what a record would say of the teacher."""
        said = self.task({"alm": {}}, True).teacher_tensors(batch)
        return Batch(batch.tensors | said, batch.rows, batch.num_bytes, batch.num_tokens)

    def step(self, task: TextTask, batch: Batch) -> Job:
        return lambda: accumulate_gradients(task, [batch], 0)

    def plain(self, batch: Batch) -> Job:
        """Cross-entropy as Transformers has it, which shifts the labels itself."""
        inputs = batch.tensors["student_inputs"]
        labels = inputs.masked_fill(~batch.tensors["student_label_mask"].roll(1, 1), -100)
        return lambda: self.models[0](input_ids=inputs, labels=labels, use_cache=False).loss.backward()

    def teacher(self, batch: Batch) -> Job:
        def run() -> None:
            with torch.no_grad():
                self.models[1](input_ids=batch.tensors["teacher_inputs"], use_cache=False)

        return run

    def loss_alone(self, batch: Batch) -> Job:
        """Scores of both sides and ALM, forward and backward to the student's hidden states and head."""
        tensors, (student, teacher) = batch.tensors, self.views
        hidden = torch.randn(*tensors["student_inputs"].shape, student.head().shape[1], requires_grad=True)
        theirs = torch.randn(*tensors["teacher_inputs"].shape, teacher.head().shape[1])
        sets = [boundary_mask(view, tokenizer) for view, tokenizer in zip(self.views, self.tokenizers)]

        def run() -> None:
            with torch.no_grad():
                fixed = token_scores(theirs, teacher.head(), tensors["teacher_labels"], sets[1])
            own = token_scores(hidden, student.head(), tensors["student_labels"], sets[0])
            leaves = {f"{s}_{n}": t for s, p in (("student", own), ("teacher", fixed)) for n, t in zip(_NAMES, p)}
            known = Quantities(tensors, leaves)
            LOSSES["alm"].fn(*(known[name] for name in ALM_INPUTS)).mean().backward()

        return run

    def clear(self) -> None:
        self.models[0].zero_grad(set_to_none=True)


_NAMES = ("label_logp", "boundary_logp")


def _model(shape: tuple[int, ...], rows: int, longest: int) -> LlamaForCausalLM:
    hidden, intermediate, layers, heads, key_value_heads = shape
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=longest + 64,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def medians(bench: Bench, jobs: Mapping[str, Job], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each job, all in turn; the first round warms caches."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for repeat in range(repeats + 1):
        for name, job in jobs.items():
            bench.clear()
            begin = time.process_time()
            job()
            if repeat:
                seconds[name].append(time.process_time() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def against_plain_training(shape: str, rows: int, tokens: int, repeats: int) -> None:
    """Prints the table of a shape."""
    bench = Bench(shape, tokens)
    batch = bench.batch(rows, tokens)
    jobs = {
        "plain CLM": bench.plain(batch),
        "teacher forward": bench.teacher(batch),
        "live teacher": bench.step(bench.task({"alm": {}}, True), batch),
        "from a record": bench.step(bench.task({"alm": {}}, False), bench.recorded(batch)),
        "CLM": bench.step(bench.task({"clm": {}}, False), batch),
        "loss alone": bench.loss_alone(batch),
    }
    found = medians(bench, jobs, repeats)
    clm, both = found["plain CLM"], found["plain CLM"] + found["teacher forward"]
    student, teacher = (sum(p.numel() for p in model.parameters()) for model in bench.models)
    shapes = [tuple(batch.tensors[f"{side}_inputs"].shape) for side in ("student", "teacher")]
    print(f"\n{shape}: {student:,} weights, teacher {teacher:,}; ids {shapes[0]} and {shapes[1]}\n")
    print("| step | CPU-s | beside | ratio | limit |\n| --- | ---: | --- | ---: | ---: |")
    print(f"| plain CLM, forward + backward | {clm:.2f} | | | |")
    print(f"| plain teacher, forward | {found['teacher forward']:.2f} | | | |")
    for name, label, beside, divisor in (
        ("live teacher", "ALM, live teacher", "plain CLM + teacher", both),
        ("from a record", "ALM, from a record", "plain CLM", clm),
        ("CLM", "tokenkit's CLM", "plain CLM", clm),
        ("loss alone", "scores of both heads and ALM alone", "ALM, live teacher", found["live teacher"]),
    ):
        limit = f"{LIMITS[name]:.2f}" if name in LIMITS else ""
        print(f"| {label} | {found[name]:.2f} | {beside} | {found[name] / divisor:.3f} | {limit} |", flush=True)


def against_length(shape: str, repeats: int, plot: Path) -> None:
    """Prints and draws the cost per token of one row by its length."""
    bench = Bench(shape, max(LENGTHS))
    task = bench.task({"alm": {}}, True)
    jobs: dict[tuple[str, int], Job] = {}
    for length in LENGTHS:
        batch = bench.batch(1, length)
        jobs |= {("scores + ALM", length): bench.loss_alone(batch), ("ALM step", length): bench.step(task, batch)}
        jobs |= {("plain CLM", length): bench.plain(batch), ("teacher forward", length): bench.teacher(batch)}
    found = medians(bench, {f"{kind} {length}": job for (kind, length), job in jobs.items()}, repeats)
    costs = {kind: [found[f"{kind} {n}"] for n in LENGTHS] for kind in dict.fromkeys(kind for kind, _ in jobs)}
    both = [a + b for a, b in zip(costs["plain CLM"], costs.pop("teacher forward"))]
    ratios = [step / plain for step, plain in zip(costs["ALM step"], both)]
    costs["plain CLM + teacher"] = both
    del costs["plain CLM"]
    curves = {kind: [s / n / (own[0] / LENGTHS[0]) for s, n in zip(own, LENGTHS)] for kind, own in costs.items()}
    print(f"\n| {shape}: cost per token / at {LENGTHS[0]} | {' | '.join(f'{n:,}' for n in LENGTHS)} |")
    print(f"| --- |{' ---: |' * len(LENGTHS)}")
    for kind, curve in curves.items():
        print(f"| {kind} | {' | '.join(f'{value:.3f}' for value in curve)} |")
    print(f"| ALM step / (plain CLM + teacher) | {' | '.join(f'{value:.3f}' for value in ratios)} |")
    _draw(curves, plot)


def _draw(curves: dict[str, list[float]], plot: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    for (kind, curve), style in zip(curves.items(), ("o-", "s-", "^--")):
        axes.plot(LENGTHS, curve, style, label=kind)
    axes.set(xscale="log", xlabel="tokens of a row", ylabel=f"CPU time per token / at {LENGTHS[0]}", ylim=(0, None))
    axes.set_xticks(LENGTHS, [f"{n:,}" for n in LENGTHS])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(plot, dpi=130)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=["small"])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--lengths", action="store_true")
    parser.add_argument("--plot", type=Path, default=Path(__file__).parents[1] / "docs/step_cost.png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for shape in options.shape:
        if options.lengths:
            against_length(shape, options.repeats, options.plot)
        else:
            against_plain_training(shape, options.batch, options.tokens, options.repeats)


if __name__ == "__main__":
    main()
