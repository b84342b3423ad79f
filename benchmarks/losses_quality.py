"""What each objective teaches a small student across tokenizers, at equal steps and at equal time.

    tokenkit pretrain runs/pretrain/small_student.yaml
    python benchmarks/losses_quality.py --output outputs/losses_quality [--methods alm clm] [--seeds 0 1 2]
    python benchmarks/losses_quality.py --output outputs/losses_quality --equal-time
    python benchmarks/losses_quality.py --output outputs/losses_quality --table --plot docs/losses_quality.png
    python benchmarks/losses_quality.py --output outputs/losses_quality --json FILE    # all of it, and the claim

Teacher: the embedded model (4.26 million weights, byte-level BPE, Python). Student: a seventh of it, another tokenizer,
trained on web text. Both read the same Python sources in the same order. Two peers are called directly: TRL's ULDLoss,
with its defaults and as a hybrid. Every run has one thread; its time is processor time of batches, forward and backward
passes and optimizer steps, measuring left out. `--equal-time` runs again with as many steps as fit into CLM's time.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch

from tokenkit.config import build
from tokenkit.data.batch import Batches, reading_of
from tokenkit.data.corpus import read_training_rows
from tokenkit.data.source import read_documents
from tokenkit.report.claims import Row, absent, make_claim, measured, own_command, save_claim
from tokenkit.train.balance import build_balance
from tokenkit.train.optimizer import build_optimizer, learning_rate_factor, set_learning_rate
from tokenkit.train.step import accumulate_gradients
from tokenkit.train.tasks.distill import TextTask
from tokenkit.verbs.distill import measurement
from tokenkit.verbs.distill_run import DistillRun
from tokenkit.verbs.prepare import prepare
from tokenkit.verbs.sides import objective_of, pair_of

METHODS = {  # losses of a run file, and how they share a step
    "CLM": ({"clm": {}}, "none"),
    "ULD + CLM": ({"uld": {"positions": "positional", "weight": 1.5}, "clm": {}}, "none"),
    "ULD aligned + CLM": ({"uld": {"weight": 1.5}, "clm": {}}, "none"),
    "GOLD + CLM": ({"gold": {}, "clm": {}}, "none"),
    "MinED": ({"mined": {}}, "none"),
    "DSKD + CLM": ({"dskd": {}, "clm": {}}, "none"),
    "P-KL + 0.1 CLM": ({"p_kl": {}, "clm": {"weight": 0.1}}, "none"),
    "ALM": ({"alm": {}}, "none"),
    "ALM + CLM": ({"alm": {}, "clm": {}}, "none"),
    "ALM + CLM, GradMag": ({"alm": {}, "clm": {}}, "approx_gradmag_preserve_mag"),
}
PEERS = {"TRL ULDLoss + CE": {}, "TRL ULDLoss hybrid + CE": {"uld_use_hybrid_loss": True}}
TIMES, HIGHEST = (0.25, 0.5, 1, 2, 4), 2.85  # of the picture; what is above is in the table
STEPS, EVAL_AT = 250, (0, 50, 100, 175, 250)


def run_of(student: str, losses: dict, balance: str, seed: int, steps: int, text_bytes: int) -> DistillRun:
    """The same run for all but the losses."""
    source = {"stdlib": "train", "max_bytes": text_bytes}
    return build(
        DistillRun,
        {
            "output": "unused",
            "model": {"source": student},
            "teacher": {"source": "tokenkit/assets/demo_teacher"},
            "losses": losses,
            "data": {"source": source, "window_bytes": 512},
            "train": {
                "steps": steps,
                "batch_size": 4,
                "seed": seed,
                "mode": "full",
                "balance": balance,
                # no clip: it would meet losses of different size differently
                "optimizer": {"learning_rate": 1e-3, "schedule": "linear", "warmup_steps": 20, "max_grad_norm": None},
            },
            "eval": {"source": {"stdlib": "held_out", "max_bytes": 24_576}},
        },
    )


class TrlStep:
    """Gradients of TRL's loss called directly on both models' logits, its cross-entropy added as its trainer does."""

    def __init__(self, sides, student, options):
        from transformers import AutoTokenizer
        from trl.experimental.gold import GOLDConfig
        from trl.experimental.gold.gold_trainer import ULDLoss

        config = GOLDConfig(
            output_dir="unused",
            use_uld_loss=True,
            bf16=False,
            use_cpu=True,
            report_to=[],
            uld_crossentropy_weight=1.0,
            **options,
        )
        folders = (student, "tokenkit/assets/demo_teacher")
        self.loss = ULDLoss(config, *(AutoTokenizer.from_pretrained(folder) for folder in folders))
        self.sides = sides

    def __call__(self, rows):
        inputs, labels, offsets, logits = {}, {}, {}, {}
        for side, view, tokenizer in (
            ("student", self.sides.student, self.sides.student_tokenizer),
            ("teacher", self.sides.teacher, self.sides.teacher_tokenizer),
        ):
            encodings = tokenizer.encode_batch([row.text for row in rows])
            width = 1 + max(len(e) for e in encodings)
            inputs[side] = torch.zeros(len(rows), width, dtype=torch.long)
            labels[side], offsets[side] = (
                torch.full_like(inputs[side], -100),
                torch.zeros(len(rows), width, 2, dtype=torch.long),
            )
            inputs[side][:, 0] = tokenizer.start_id()
            for i, e in enumerate(encodings):
                ids = torch.from_numpy(e.ids.astype("int64"))
                inputs[side][i, 1 : len(e) + 1] = labels[side][i, 1 : len(e) + 1] = ids
                offsets[side][i, 1 : len(e) + 1, 0] = torch.from_numpy(e.starts)
                offsets[side][i, 1 : len(e) + 1, 1] = torch.from_numpy(e.ends)
            with torch.set_grad_enabled(side == "student"):
                logits[side] = view.form()(view.hidden(inputs[side]) @ view.head().T)
        self.loss(
            logits["student"], logits["teacher"], labels["student"], labels["teacher"], inputs["student"],
            inputs["teacher"], student_byte_offsets=offsets["student"], teacher_byte_offsets=offsets["teacher"],
        ).backward()  # fmt: skip


def train(method: str, student: str, seed: int, steps: int, text_bytes: int, eval_at: list[int]) -> dict:
    """Bits per byte at some steps, and processor seconds up to each of them."""
    losses, balance_name = METHODS.get(method, ({"clm": {}}, "none"))
    run = run_of(student, losses, balance_name, seed, steps, text_bytes)
    torch.manual_seed(seed)
    sides = prepare(run)
    objective = objective_of(run.losses, sides)
    reading = reading_of(run.data, sides.student_tokenizer, sides.teacher_tokenizer, objective.shared_needs())
    rows = read_training_rows(run.data)
    pair = pair_of(run.data, sides).tensors(objective.pair_needs())
    tokenizers = sides.student_tokenizer, sides.teacher_tokenizer
    task = TextTask(objective, sides.student, tokenizers[0], sides.teacher, tokenizers[1], pair=pair, seed=seed)
    batches = Batches(rows, *tokenizers, batch_size=run.train.batch_size, seed=seed, reading=reading)
    optimizer = build_optimizer(task.trainable(), run.train.optimizer)
    balance = build_balance(
        run.train.balance, list(objective.weights()), task.last_layer, list(task.trainable().values())
    )
    measure = measurement(run.eval, sides.student, tokenizers[0], read_documents(run.eval.source))
    peer = TrlStep(sides, student, PEERS[method]) if method in PEERS else None
    seconds, curve = 0.0, {}
    task.train_mode(True)
    for step in range(steps + 1):
        if step in eval_at or step == steps:
            task.train_mode(False)
            curve[step] = [measure()["bits_per_byte"], seconds]
            task.train_mode(True)
        if step == steps:
            break
        began = time.process_time()
        optimizer.zero_grad(set_to_none=True)
        if peer:
            peer([rows[i] for i in batches.rows(step)])
        else:
            accumulate_gradients(task, batches.at(step), seed * 1000 + step, balance)
        set_learning_rate(optimizer, 1e-3 * learning_rate_factor(step, steps=steps, config=run.train.optimizer))
        optimizer.step()
        seconds += time.process_time() - began
    return {"method": method, "seed": seed, "steps": steps, "curve": curve, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/losses_quality"))
    parser.add_argument("--student", default="outputs/small_student/model")
    parser.add_argument("--methods", nargs="+", default=[*METHODS, *PEERS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--text-bytes", type=int, default=1_000_000, help="a step reads 2,048 of them")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--eval-at", nargs="*", type=int, default=EVAL_AT, help="and after the last one")
    parser.add_argument("--equal-time", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path, help="equal steps, then equal time, then write the claim there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    if importlib.util.find_spec("trl") is None:
        options.methods = [name for name in options.methods if name not in PEERS]
    if options.json is not None:
        make_student(Path(options.student))
        run_all(options, equal_time=False)
        run_all(options, equal_time=True)
        write_claim(options)
        print(table(options.output))
        return
    if options.plot:
        plot(options.output, options.plot)
    if options.table:
        print(table(options.output))
    if options.table or options.plot:
        return
    run_all(options, options.equal_time)


def make_student(folder: Path) -> None:
    """The student, by its run file, where it is not there."""
    if not folder.is_dir():
        run_file = "runs/pretrain/small_student.yaml"
        command = [sys.executable, "-m", "tokenkit.cli", "pretrain", run_file, f"output={folder.parent}", "--quiet"]
        subprocess.run(command, check=True)


def run_all(options: argparse.Namespace, equal_time: bool) -> None:
    """Every method and seed that is not there yet, the seeds in turn."""
    for seed in options.seeds:
        for method in options.methods:
            steps = steps_in_time(options.output, method, options.steps) if equal_time else options.steps
            kind = "time" if equal_time else "steps"
            path = options.output / f"{kind}_{method.replace(' ', '_')}_{seed}.json"
            if path.exists():
                continue
            if equal_time and steps >= options.steps:
                continue  # as fast as CLM: the run of equal steps is the answer
            found = train(method, options.student, seed, steps, options.text_bytes, options.eval_at)
            path.with_suffix(".tmp").write_text(json.dumps(found))
            path.with_suffix(".tmp").rename(path)
            print(
                method,
                seed,
                steps,
                {k: round(v[0], 4) for k, v in found["curve"].items()},
                round(found["seconds"]),
                flush=True,
            )


def read(folder: Path, kind: str, method: str) -> list[dict]:
    paths = sorted(folder.glob(f"{kind}_{method.replace(' ', '_')}_*.json"))
    return [found for path in paths if (found := json.loads(path.read_text()))["method"] == method]


def per_step(folder: Path, method: str) -> float:
    """Median processor seconds of a step, over the seeds."""
    return statistics.median(run["seconds"] / run["steps"] for run in read(folder, "steps", method))


def steps_in_time(folder: Path, method: str, most: int) -> int:
    """Steps that take as long as all of CLM's."""
    return max(1, min(most, round(most * per_step(folder, "CLM") / per_step(folder, method))))


BESIDE = (
    ("GOLD + CLM", "TRL ULDLoss hybrid + CE"),
    ("ULD + CLM", "TRL ULDLoss + CE"),
    ("ALM + CLM", "TRL ULDLoss + CE"),
    ("ALM + CLM", "TRL ULDLoss hybrid + CE"),
)


def claim_rows(folder: Path, methods: list[str]) -> list[Row]:
    """Ours beside TRL's by cost, at equal steps and in equal time; ours beside CLM."""

    def last(kind: str, method: str) -> list[float]:
        runs = read(folder, kind, method) or read(folder, "steps", method)
        return [run["curve"][str(run["steps"])][0] for run in runs]

    def cost(method: str) -> list[float]:
        return [run["seconds"] / run["steps"] for run in read(folder, "steps", method)]

    rows = []
    pairs = BESIDE + tuple((method, "CLM") for method in methods if method in METHODS and method != "CLM")
    for ours, peer in pairs:
        if ours not in methods:
            continue
        if peer not in methods:
            rows.append(absent(ours, peer, "bits per byte, equal steps", "trl is not installed", last("steps", ours)))
            continue
        rows.append(measured(ours, peer, "CPU seconds of a step", cost(ours), cost(peer)))
        for kind, words in (("steps", "equal steps"), ("time", "in CLM's time")):
            rows.append(measured(ours, peer, f"bits per byte, {words}", last(kind, ours), last(kind, peer)))
    return rows


def write_claim(options: argparse.Namespace) -> None:
    """What was found, in the common form."""
    sentence = (
        "A small student learns under a teacher of another tokenizer: held-out bits per byte after equal steps, "
        "and after as many steps as fit into the processor time of plain cross-entropy (CLM). CLM is ours too; "
        "TRL's loss is called directly."
    )
    there = any(name in PEERS for name in options.methods)
    peers = {"trl": importlib.metadata.version("trl") if there else "absent: not installed"}
    rows = claim_rows(options.output, options.methods)
    save_claim(options.json, make_claim("losses", sentence, own_command(), rows, peers))


def table(folder: Path) -> str:
    """Bits per byte, mean and standard deviation over the seeds, at equal steps and at equal time."""
    longest = max(run["steps"] for run in read(folder, "steps", "CLM"))
    marks = sorted({int(step) for step in read(folder, "steps", "CLM")[0]["curve"]} - {0})
    lines = [
        "| objective | "
        + " | ".join(f"step {step}" for step in marks)
        + " | cost of a step / CLM | steps in CLM's time | bpb |"
    ]
    lines.append("|---|" + "---:|" * (len(marks) + 3))
    for method in [*METHODS, *PEERS]:
        runs = read(folder, "steps", method)
        if not runs:
            continue
        cells = [spread([run["curve"][str(step)][0] for run in runs]) for step in marks]
        ratio = per_step(folder, method) / per_step(folder, "CLM")
        again = read(folder, "time", method)
        last = [run["curve"][str(run["steps"])][0] for run in again or runs]
        steps = again[0]["steps"] if again else longest
        lines.append(f"| {method} | " + " | ".join(cells) + f" | {ratio:.2f} | {steps} | {spread(last)} |")
    return "\n".join(lines)


def plot(folder: Path, path: Path) -> None:
    """Mean curves over steps, and over processor time in units of CLM's whole run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    whole = statistics.mean(run["seconds"] for run in read(folder, "steps", "CLM"))
    colours = pyplot.get_cmap("tab20").colors
    for number, method in enumerate([*METHODS, *PEERS]):
        runs = read(folder, "steps", method)
        if not runs:
            continue
        marks = [step for step in EVAL_AT if step]
        values = [statistics.mean(run["curve"][str(step)][0] for run in runs) for step in marks]
        times = [statistics.mean(run["curve"][str(step)][1] for run in runs) / whole for step in marks]
        style = {"label": method, "color": colours[number], "linestyle": ":" if method in PEERS else "-", "marker": "."}
        panels[0].plot(marks, values, **style)
        panels[1].plot(times, values, **style)
    panels[0].set(
        xlabel="optimizer steps", ylabel="bits per byte, held out", title="equal steps (MinED is above the picture)"
    )
    panels[1].set(xlabel="processor time / CLM's whole run", title="equal time", xscale="log")
    panels[1].axvline(1, color="0.7", linewidth=0.8)
    panels[1].set_xticks(TIMES, [f"{t:g}" for t in TIMES])
    panels[1].minorticks_off()
    panels[0].set_ylim(top=HIGHEST)
    for panel in panels:
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=9)
    figure.savefig(path, dpi=110)


def spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {deviation:.3f}"


if __name__ == "__main__":
    main()
