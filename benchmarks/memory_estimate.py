"""Is the estimate of `tokenkit distill --dry-run` true? Against what runs take on a CPU: bytes, and seconds of a step.

    OMP_NUM_THREADS=1 python benchmarks/memory_estimate.py outputs/memory_estimate

Every run is a process of its own. Its memory is the highest resident size while it trains, less that of the process
when everything is imported and nothing is loaded; its time is the mean of all steps but the first. Models: the embedded
one (4.3 million weights), and a random Llama and a random GPT-2 of 33 and 34 million.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from tokenkit.config import build
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.verbs.distill_run import DistillRun
from tokenkit.verbs.estimate import estimate_distill

DEMO = "tokenkit/assets/demo_teacher"
STEPS = 4
SHAPES = {
    "llama": {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
    "gpt2": {"n_embd": 512, "n_layer": 8, "n_head": 8},
}
KL, ALM = {"forward_kl": {}}, {"alm": {}}
CASES: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("demo, full", DEMO, {"mode": "full"}, {"losses": KL}),
    ("demo, full, bfloat16", DEMO, {"mode": "full", "precision": "bfloat16"}, {"losses": KL}),
    ("demo, full, checkpointing", DEMO, {"mode": "full", "gradient_checkpointing": True}, {"losses": KL}),
    ("demo, full, no logits", DEMO, {"mode": "full"}, {"losses": ALM}),
    ("demo, bytes, lora", DEMO, {"mode": "lora", "lora": {"rank": 16}}, {"losses": ALM, "target_tokenizer": "byte"}),
    ("demo, full, 2 microbatches", DEMO, {"mode": "full", "accumulation": 2}, {"losses": KL}),
    *(
        (f"{kind}, {mode}{more}", kind, {"mode": mode, **train}, {"losses": ALM})
        for kind in SHAPES
        for mode in ("full", "lora")
        for more, train in (
            ("", {}),
            (", bfloat16", {"precision": "bfloat16"}),
            (", checkpointing", {"gradient_checkpointing": True}),
        )
    ),
    ("llama, full, int4 teacher", "llama", {"mode": "full"}, {"losses": ALM, "teacher": "int4"}),
    ("llama, full, logits", "llama", {"mode": "full"}, {"losses": KL}),
]
CHILD = """
import json, sys
import torch, transformers.models.llama.modeling_llama, transformers.models.gpt2.modeling_gpt2
from tokenkit.config import build
from tokenkit.train.audit import resident_bytes
from tokenkit.verbs.distill import distill
from tokenkit.verbs.distill_run import DistillRun
run = build(DistillRun, json.loads(sys.argv[1]))
torch.ones(64, 64) @ torch.ones(64, 64)
before = resident_bytes()
distill(run, quiet=True)
print(before)
"""


def make_model(kind: str, folder: Path) -> str:
    """A random model with the embedded one's tokenizer and more rows than it has ids."""
    target = folder / kind
    if not target.is_dir():
        torch.manual_seed(0)
        tokenizer = load_tokenizer(DEMO)
        ids = {"bos_token_id": tokenizer.start_id(), "eos_token_id": tokenizer.eos_id, "pad_token_id": None}
        config = AutoConfig.for_model(kind, vocab_size=16384, tie_word_embeddings=True, **ids, **SHAPES[kind])
        AutoModelForCausalLM.from_config(config).save_pretrained(target)
        tokenizer.save(target)
    return str(target)


def run_of(folder: Path, number: int, source: str, train: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """The run file of a case."""
    found = {
        "output": str(folder / "runs" / str(number)),
        "model": {"source": source},
        "data": {"source": {"stdlib": "train", "max_bytes": 400_000}, "window_bytes": 384},
        "train": {
            "steps": STEPS,
            "batch_size": 8,
            "log_every": 1,
            "save_every": 1000,
            "device": "cpu",
            "optimizer": {"learning_rate": 1e-4},
            **train,
        },
        "eval": {"source": {"stdlib": "held_out", "max_bytes": 512}, "context_tokens": 64},
        "card": {"write": False},
        **more,
    }
    if "teacher" in more:
        found["teacher"] = {"source": source, "quantize": more["teacher"]}
    return found


def measured(values: dict[str, Any]) -> tuple[int, float]:
    """Bytes above what is imported, and seconds of a step."""
    done = subprocess.run([sys.executable, "-c", CHILD, json.dumps(values)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    before = int(done.stdout.split()[-1])
    lines = (Path(values["output"]) / "metrics.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    steps = [row for row in rows if "time/step" in row]
    peak = max(row["memory/cpu_peak"] for row in steps)
    later = [row["time/step"] for row in steps[1:]]
    return peak - before, sum(later) / len(later)


def main(folder: Path) -> None:
    """Prints the table, and writes it as JSON lines."""
    table = Table("run", "MB", "estimated", "", "s a step", "estimated", "")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "table.jsonl").open("w", encoding="utf-8") as file:
        for number, (name, model, train, more) in enumerate(CASES):
            source = make_model(model, folder) if model in SHAPES else model
            values = run_of(folder, number, source, train, more)
            found = estimate_distill(build(DistillRun, values))
            size, seconds = measured(values)
            row = {"run": name, "bytes": size, "estimated_bytes": found.peak}
            row |= {"seconds": seconds, "estimated_seconds": found.seconds}
            file.write(json.dumps(row) + "\n")
            file.flush()
            ratios = [f"{found.peak / size - 1:+.0%}", f"{found.seconds / seconds - 1:+.0%}"]
            sizes = [f"{size / 1e6:,.0f}", f"{found.peak / 1e6:,.0f}", ratios[0]]
            table.add_row(name, *sizes, f"{seconds:.2f}", f"{found.seconds:.2f}", ratios[1])
            print(name, *sizes, f"{seconds:.2f}", f"{found.seconds:.2f}", ratios[1], file=sys.stderr, flush=True)
    Console().print(table)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
