"""`tokenkit architectures`: every shape of so many weights, trained on the same text; which ones nothing else beats."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from transformers import AutoConfig, PreTrainedConfig

from tokenkit.config import UserError, build
from tokenkit.data.source import read_documents
from tokenkit.eval.bits_per_byte import EvalConfig, scored_batches
from tokenkit.eval.harness import Evaluation
from tokenkit.eval.summary import Direction
from tokenkit.models.architecture import Shape, ShapesConfig, shapes_of
from tokenkit.models.shape import new_config
from tokenkit.models.view import ModelView
from tokenkit.report.sweep import shown
from tokenkit.report.tables import markdown_table
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.train.folder import write_json, write_text
from tokenkit.verbs.figures import read_readings
from tokenkit.verbs.model import ModelChoice, load_pair
from tokenkit.verbs.points import read_base
from tokenkit.verbs.runner import Outcome
from tokenkit.verbs.sweep import Comparison, compare, points_of, summary, tabulated, write_tables

SPEED_ROUNDS = 5
BITS, KL = "bits_per_byte", "kl_to_teacher"


class ArchitecturesRun(Comparison):
    """A run file of `tokenkit architectures`: with `verb: distill`, shapes of students that begin at random."""

    shapes: ShapesConfig
    """Sizes that replace those of the base run's model, or with `verb: pretrain` those of its `model` section."""
    metrics: dict[str, Direction] = {BITS: "min"}
    """Keys of metrics.jsonl or results.json, and which direction is better; `bits_per_byte` must be one."""
    speed_tokens: int = Field(4096, ge=64)
    """Held-out tokens that every trained model reads, in turn, to tell how fast it is."""

    @model_validator(mode="after")
    def _has_bits(self) -> "ArchitecturesRun":
        if BITS not in self.metrics:
            raise UserError(f"metrics: without {BITS}, which the frontier is made of; write it there too")
        return self


@dataclass(frozen=True)
class Measured:
    """A shape, trained."""

    name: str
    parameters: int
    bytes: int
    """Of the exported weights."""
    speed: float
    """Tokens per second on this machine, as a ratio to the fastest shape."""
    kl: float | None
    """Nats per token from the teacher, of the first seed; None without a teacher of the same tokenizer."""
    bits_per_byte: float
    frontier: bool = False


def architectures(run: ArchitecturesRun, *, quiet: bool = False) -> dict[str, Any]:
    """Does what is missing, writes the tables of a sweep and `frontier.md`; what is printed of them."""
    base = read_base(run.base)
    shapes = shapes_of(template_of(run, base), run.shapes)
    points, _ = points_of(run.verb, base, [entry_of(run, base, shape) for shape in shapes], run.seeds)
    outcomes = compare(run, points, quiet=quiet)
    table, runs = tabulated(run, outcomes)
    write_tables(run.output, run.output.name, table, runs)
    by_name = {row.name: row.values for row in table.rows}
    firsts = {o.point.name: o for o in reversed(outcomes) if o.status == "done"}
    found = _measure(run, base, [(shape, firsts[shape.name]) for shape in shapes if shape.name in firsts])
    spreads = {m.name: shown(by_name[m.name][BITS].get("final")) for m in found}
    write_json(run.output / "frontier.json", {"device": _device(), "shapes": [asdict(m) for m in found]})
    write_text(run.output / "frontier.md", _page(run, found, spreads))
    best = [m.name for m in found if m.frontier]
    return summary(run.output, table, runs) | {"frontier": best, "frontier_table": str(run.output / "frontier.md")}


def template_of(run: ArchitecturesRun, base: dict[str, Any]) -> PreTrainedConfig:
    """The configuration whose sizes are replaced: the base run's model, with its vocabulary."""
    if run.verb == "distill":
        choice = build(ModelChoice, base.get("model") or {})
        return AutoConfig.from_pretrained(choice.source, revision=choice.revision)
    model = dict(base.get("model") or {})
    if "model_type" not in model:
        raise UserError("base: no model.model_type; shapes are those of a family, such as llama")
    model.setdefault("vocab_size", _vocabulary(base))
    return new_config(model.pop("model_type"), model, "base.model")


def _vocabulary(base: dict[str, Any]) -> int:
    choice = base.get("tokenizer") or {}
    if choice.get("train"):
        return choice["train"]["vocab_size"]
    return load_tokenizer(choice.get("load") or "").vocab_size


def entry_of(run: ArchitecturesRun, base: dict[str, Any], shape: Shape) -> dict[str, Any]:
    """What makes a run one of this shape."""
    if run.verb == "pretrain":
        return {"name": shape.name, **{f"model.{key}": value for key, value in shape.keys.items()}}
    config = {**((base.get("student") or {}).get("config") or {}), **shape.keys}
    return {"name": shape.name, "student.start": "random", "student.config": config}


def _measure(run: ArchitecturesRun, base: dict[str, Any], trained: Sequence[tuple[Shape, Outcome]]) -> list[Measured]:
    """Weights, bytes, speed, and what was measured last, of the first seed's models; and who is on the frontier."""
    if not trained:
        return []
    config = build(Evaluation, base["eval"])
    pairs = [load_pair(ModelChoice(source=str(outcome.folder / "model")), _device()) for _, outcome in trained]
    views = [ModelView(model) for model, _ in pairs]
    speeds = _speeds(views, pairs[0][1], read_documents(config.source), config, run.speed_tokens)
    found = []
    for (shape, outcome), speed in zip(trained, speeds):
        readings = read_readings(outcome.folder, [BITS, KL], run.equal)
        size = sum(path.stat().st_size for path in (outcome.folder / "model").glob("*.safetensors"))
        kl = readings[KL][-1].value if readings[KL] else None
        found.append(Measured(shape.name, shape.parameters, size, speed / max(speeds), kl, readings[BITS][-1].value))
    return on_frontier(found)


def on_frontier(shapes: Sequence[Measured]) -> list[Measured]:
    """The shapes, marked: one is on the frontier if no other is at least as fast and as good, and better in one."""

    def beaten(own: Measured) -> bool:
        return any(
            other.speed >= own.speed
            and other.bits_per_byte <= own.bits_per_byte
            and (other.speed > own.speed or other.bits_per_byte < own.bits_per_byte)
            for other in shapes
        )

    return [Measured(**{**asdict(own), "frontier": not beaten(own)}) for own in shapes]


@torch.no_grad()
def _speeds(
    views: Sequence[ModelView], tokenizer: Tokenizer, documents: list[str], config: EvalConfig, tokens: int
) -> list[float]:
    """Tokens per second of each model on the same batches: medians of rounds in which all take turns."""
    batches, total = [], 0
    for inputs, _ in scored_batches(views[0], tokenizer, documents, config):
        batches.append(inputs)
        total += inputs.numel()
        if total >= tokens:
            break
    times: list[list[float]] = [[] for _ in views]
    for number in range(SPEED_ROUNDS + 1):
        for place, view in enumerate(views):
            began = time.perf_counter()
            for inputs in batches:
                view.hidden(inputs)[:, -1].sum().item()
            if number:  # the first one warms up
                times[place].append(time.perf_counter() - began)
    return [total / statistics.median(each) for each in times]


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _page(run: ArchitecturesRun, found: Sequence[Measured], spreads: dict[str, str]) -> str:
    rows = [["shape", "weights", "bytes", "speed", "KL, nats per token", "bits per byte", "frontier"]]
    for m in sorted(found, key=lambda m: m.bits_per_byte):
        kl = "–" if m.kl is None else f"{m.kl:.4f}"
        mark = "yes" if m.frontier else ""
        rows.append([m.name, f"{m.parameters:,}", f"{m.bytes:,}", f"{m.speed:.2f}", kl, spreads[m.name], mark])
    about = (
        f"Shapes within {run.shapes.tolerance:.0%} of {run.shapes.parameters:,} weights, each trained on the same "
        f"text. Speed: tokens per second beside the fastest, {_device()}. Frontier: no other shape is both as fast and "
        "as good. KL and speed are of the first seed.\n"
    )
    return "\n".join([f"# {Path(run.output).name}: the frontier\n", about, markdown_table(rows)])
