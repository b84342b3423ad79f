"""Writes the tables of docs/scale.md: what runs of 7 and of 70 billion weights need, by the estimate of `--dry-run`.

    python scripts/write_scale.py [PART OF A ROW'S NAME ...]
    python scripts/write_scale.py --shapes FOLDER

Models are configurations without weights, beside tokenizers of the shared data folder; `--shapes` leaves them in a
folder, so that a run file can be asked: `tokenkit distill RUN.YAML model.source=FOLDER/7b --dry-run --on h100`.
Named rows are printed, and written over those in the page; without a name all are.
"""

import json
import os
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from tokenkit.config import build
from tokenkit.models.devices import LINKS, MEMORY, PRODUCTS, SHEETS
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.verbs.distill_run import DistillRun
from tokenkit.verbs.estimate import estimate_distill
from tokenkit.verbs.estimate_parts import Estimate, Place

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scale.md"
SHARED = Path(os.environ.get("TOKENKIT_SHARED", ROOT.parent / "shared"))
DEVICE, PRICE = "h100", 2.5
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "7b": ("llama2", {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "heads": (32, 32)}),
    "70b": ("llama3", {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "heads": (64, 8)}),
}
TARGETS = {"bytes": "byte", "128k": "llama3", "256k": "gemma3"}
Row = tuple[str, str, str, tuple[int, int], dict[str, Any]]
ROWS: list[Row] = [  # name, shape, target, data x model, changes
    ("7B, full, bytes, one GPU", "7b", "bytes", (1, 1), {}),
    ("7B, full, bytes", "7b", "bytes", (8, 1), {}),
    ("the same, float32", "7b", "bytes", (8, 1), {"precision": "float32"}),
    ("the same, activations kept", "7b", "bytes", (8, 1), {"gradient_checkpointing": False}),
    ("the same, from a record", "7b", "bytes", (8, 1), {"record": True}),
    ("the same, teacher in int8", "7b", "bytes", (8, 1), {"teacher": "int8"}),
    ("the same, tensor parallel", "7b", "bytes", (1, 8), {}),
    ("the same, two hosts", "7b", "bytes", (16, 1), {}),
    ("the same, eight hosts", "7b", "bytes", (64, 1), {}),
    ("7B, full, 128k", "7b", "128k", (8, 1), {}),
    ("the same, two hosts", "7b", "128k", (16, 1), {}),
    ("7B, full, 256k", "7b", "256k", (8, 1), {}),
    ("7B, LoRA, 128k, one GPU", "7b", "128k", (1, 1), {"mode": "lora"}),
    ("7B, LoRA, 128k", "7b", "128k", (8, 1), {"mode": "lora"}),
    ("7B, embeddings, 128k", "7b", "128k", (8, 1), {"mode": "embeddings"}),
    ("7B, embeddings, new rows, 128k", "7b", "128k", (8, 1), {"mode": "embeddings", "embeddings": "new_rows"}),
    ("70B, full, bytes, two hosts", "70b", "bytes", (16, 1), {}),
    ("the same, eight hosts", "70b", "bytes", (64, 1), {}),
    ("the same, tensor parallel in a host", "70b", "bytes", (8, 8), {}),
    ("70B, LoRA, bytes", "70b", "bytes", (8, 1), {"mode": "lora"}),
    ("the same, activations kept", "70b", "bytes", (8, 1), {"mode": "lora", "gradient_checkpointing": False}),
    ("the same, two hosts", "70b", "bytes", (16, 1), {"mode": "lora"}),
    ("the same, tensor parallel in a host", "70b", "bytes", (2, 8), {"mode": "lora"}),
    ("70B, LoRA, 256k, two hosts", "70b", "256k", (16, 1), {"mode": "lora"}),
    ("the same, eight hosts", "70b", "256k", (64, 1), {"mode": "lora"}),
]


def write_shape(name: str, folder: Path) -> Path:
    """A folder with the configuration of a shape and a tokenizer, and no weight."""
    tokenizer_name, fields = SHAPES[name]
    tokenizer = load_tokenizer(str(SHARED / "data" / "tokenizers" / tokenizer_name))
    heads, shared_heads = fields["heads"]
    config = AutoConfig.for_model(
        "llama",
        **{key: value for key, value in fields.items() if key != "heads"},
        num_attention_heads=heads,
        num_key_value_heads=shared_heads,
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=None,
    )
    config.save_pretrained(folder / name)
    tokenizer.save(folder / name)
    return folder / name


def run_of(row: Row, folder: Path) -> DistillRun:
    """The run of a row: 64 rows of 8,192 bytes a step, one of them at a time in each group of processes."""
    _, shape, target, (data, model), changes = row
    changes = dict(changes)
    source = str(folder / shape)
    train: dict[str, Any] = {
        "steps": 20_000,
        "batch_size": 64,
        "accumulation": 64 // data,
        "mode": "full",
        "lora": {"rank": 64, "alpha": 64},
        "precision": "bfloat16",
        "gradient_checkpointing": True,
        "parallel": {"data": data, "model": model},
    }
    more: dict[str, Any] = {}
    if changes.pop("record", False):
        more["record"] = str(folder / "record")
    if "teacher" in changes:
        more["teacher"] = {"source": source, "quantize": changes.pop("teacher")}
    kind = TARGETS[target]
    values = {
        "output": str(folder / "run"),
        "model": {"source": source},
        "target_tokenizer": kind if kind == "byte" else str(SHARED / "data" / "tokenizers" / kind),
        "losses": {"alm": {"weight": 10}, "clm": {}},
        "data": {"source": {"stdlib": "train"}, "window_bytes": 8192},
        "train": train | changes,
        "eval": {"source": {"stdlib": "held_out", "max_bytes": 1000}},
    }
    return build(DistillRun, values | more)


def estimated(row: Row, folder: Path) -> tuple[str, str]:
    """A row of each table."""
    run = run_of(row, folder)
    found = estimate_distill(run, place=Place("cpu", DEVICE, SHEETS[DEVICE], PRICE), other_way=False)
    return memory_row(row, found), time_row(row, found, run.train.steps)


def _named(row: Row) -> str:
    data, model = row[3]
    gpus = str(data) if model == 1 else f"{data} x {model}"
    return f"| {ROWS.index(row) + 1} | {row[0]} | {gpus} |"


def memory_row(row: Row, found: Estimate) -> str:
    """Gigabytes of a process, and of its share of its host's memory."""
    parts = (found.weights, found.gradients, found.optimizer, found.teacher, found.activations, found.copies)
    cells = " | ".join(f"{value / 1e9:.1f}" for value in (*parts, found.gathered))
    fits = "" if found.peak <= SHEETS[DEVICE].memory else " (too much)"
    return f"{_named(row)} {cells} | **{found.peak / 1e9:.1f}**{fits} | {found.host / 1e9:.0f} |"


def time_row(row: Row, found: Estimate, steps: int) -> str:
    """Seconds and gigabytes of a step, speed of all processes together, and what 20,000 steps come to."""
    hours = found.processes * (found.seconds + found.waiting) * steps / 3600
    return (
        f"{_named(row)} {found.seconds:.1f} | {found.traffic.total / 1e9:.0f} | {found.waiting:.1f} | "
        f"{found.tokens_per_second:,.0f} | {hours:,.0f} | {hours * PRICE:,.0f} |"
    )


def put(text: str, name: str, lines: list[str]) -> str:
    """The page with rows in the place of those of the same numbers in a table, or all of them where it has none."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, _, rest = text.partition(begin)
    inside, _, after = rest.partition(end)
    held = {line.split("|")[1].strip(): line for line in inside.splitlines() if line.startswith("|")}
    held |= {line.split("|")[1].strip(): line for line in lines}
    rows = sorted((key for key in held if key.isdigit()), key=int)
    heads = [line for line in inside.splitlines() if line.startswith("|")][:2]
    return before + begin + "\n" + "\n".join([*heads, *(held[key] for key in rows)]) + "\n\n" + end + after


def main(*parts: str) -> None:
    """Writes the rows of these numbers or names; all where none is named."""
    if parts and parts[0] == "--shapes":
        for name in SHAPES:
            print(write_shape(name, Path(parts[1])))
        return
    chosen = [row for n, row in enumerate(ROWS, 1) if not parts or str(n) in parts or row[0] in parts]
    with tempfile.TemporaryDirectory() as name:
        for shape in SHAPES:
            write_shape(shape, Path(name))
        for row in chosen:
            memory, time = estimated(row, Path(name))
            print(memory, time, sep="\n", flush=True)
            text = put(put(PAGE.read_text("utf-8"), "memory", [memory]), "time", [time])
            PAGE.write_text(text, "utf-8")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps({"peak_GB_of_this_process": round(most, 2), "assumed": [PRODUCTS, MEMORY, LINKS]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
