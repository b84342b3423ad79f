"""Is the estimate of `tokenkit distill --dry-run` true? Against what runs take on a CPU: bytes, and seconds of a step.

    OMP_NUM_THREADS=1 python benchmarks/memory_estimate.py outputs/memory_estimate [PART OF A RUN'S NAME ...]

Every run is a process of its own, on one thread, or two that share it. Its memory is the highest resident size while it
trains, less that of the process it is forked from, after runs of a tiny model, also to bytes, when everything is
imported; and less what the program itself takes (`program`): what is left of a run of the tiny model, in as many
processes, when its own estimate is taken off. The C library is told to give back what is freed: by itself it keeps
it, so that what a process takes depends on what it did before (`--keep` leaves it so). A run's time is the CPU time of
a step, the median of all but the first.
Models: the embedded one (4.3 million weights), a random Llama and a random GPT-2 of 34 million, and Llamas of four
layers of growing width.
"""

import ctypes
import gc
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from tokenkit.config import build
from tokenkit.models.rates import Rates, measure_rates
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.train import loop
from tokenkit.train.audit import resident_bytes
from tokenkit.verbs.distill import distill
from tokenkit.verbs.distill_run import DistillRun
from tokenkit.verbs.estimate import estimate_distill
from tokenkit.verbs.estimate_parts import HALVES

DEMO = "tokenkit/assets/demo_teacher"
STEPS = 3
SHAPES = {
    "llama": {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
    "gpt2": {"n_embd": 512, "n_layer": 8, "n_head": 8},
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    },
}
WIDTHS = {256: 4, 512: 4, 1024: 4, 2048: 4}  # of a hidden state, and how many layers
SHAPES |= {
    f"width {width}": {
        "hidden_size": width,
        "intermediate_size": width * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
    }
    for width, layers in WIDTHS.items()
}
SHAPES["large"] = {**SHAPES["width 2048"], "num_hidden_layers": 8}
KEPT = "--keep" in sys.argv
TRIM_THRESHOLD, MAP_THRESHOLD = -1, -3  # of mallopt
LARGE = 1024  # a width from which two steps are enough
KL, ALM = {"forward_kl": {}}, {"alm": {}}
NO_RATES = Rates({4: 1.0, 2: 1.0}, 1.0, 1.0, 1.0)  # where only bytes are asked for
CASES: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("demo, full", DEMO, {"mode": "full"}, {"losses": KL}),
    ("demo, full, bfloat16", DEMO, {"mode": "full", "precision": "bfloat16"}, {"losses": KL}),
    ("demo, bytes, lora", DEMO, {"mode": "lora", "lora": {"rank": 16}}, {"losses": ALM, "target_tokenizer": "byte"}),
    ("demo, full, 2 microbatches", DEMO, {"mode": "full", "accumulation": 2}, {"losses": KL}),
    *(
        (f"{kind}, {mode}{more}", kind, {"mode": mode, **train}, {"losses": ALM})
        for mode, more, train in (
            ("full", "", {}),
            ("lora", "", {}),
            ("full", ", checkpointing", {"gradient_checkpointing": True}),
            ("full", ", bfloat16", {"precision": "bfloat16"}),
        )
        for kind in ("llama", "gpt2")
    ),
    ("llama, full, logits", "llama", {"mode": "full"}, {"losses": KL}),
    ("llama, full, int4 teacher", "llama", {"mode": "full"}, {"losses": ALM, "teacher": "int4"}),
    *((f"width {width}, full", f"width {width}", {"mode": "full"}, {"losses": ALM}) for width in WIDTHS),
    ("large, full, checkpointing", "large", {"mode": "full", "gradient_checkpointing": True}, {"losses": ALM}),
    ("large, lora", "large", {"mode": "lora"}, {"losses": ALM}),
    ("2 processes: llama, full", "llama", {"mode": "full", "parallel": {"data": 2}}, {"losses": ALM}),
    ("2 processes: llama, lora", "llama", {"mode": "lora", "parallel": {"data": 2}}, {"losses": ALM}),
    (
        "2 processes: width 1024, full",
        "width 1024",
        {"mode": "full", "parallel": {"data": 2}},
        {"losses": ALM},
    ),
    (
        "2 processes: width 1024, bfloat16, checkpointing",
        "width 1024",
        {"mode": "full", "parallel": {"data": 2}, "precision": "bfloat16", "gradient_checkpointing": True},
        {"losses": ALM},
    ),
    (
        "2 processes: width 1024, tensor parallel",
        "width 1024",
        {"mode": "full", "parallel": {"model": 2}},
        {"losses": ALM},
    ),
]


def make_model(kind: str, folder: Path) -> str:
    """A random model with the embedded one's tokenizer and more rows than it has ids."""
    target = folder / kind
    if not target.is_dir():
        torch.manual_seed(0)
        tokenizer = load_tokenizer(DEMO)
        ids = {"bos_token_id": tokenizer.start_id(), "eos_token_id": tokenizer.eos_id, "pad_token_id": None}
        config = AutoConfig.for_model(
            "gpt2" if kind == "gpt2" else "llama", vocab_size=16384, tie_word_embeddings=True, **ids, **SHAPES[kind]
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(target)
        tokenizer.save(target)
    return str(target)


def run_of(folder: Path, name: int | str, source: str, train: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """The run file of a case."""
    found = {
        "output": str(folder / "runs" / str(name)),
        "model": {"source": source},
        "data": {"source": {"stdlib": "train", "max_bytes": 100_000}, "window_bytes": 256},
        "train": {
            "steps": STEPS,
            "batch_size": 4,
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


def give_back() -> None:
    """From here on every block of 64 KiB or more is a mapping of its own, which goes when it is freed (glibc)."""
    library, size = ctypes.CDLL(None), 1 << 16
    for option in (TRIM_THRESHOLD, MAP_THRESHOLD):
        library.mallopt(option, size)
    library.malloc_trim(0)


def measured(values: dict[str, Any], count: int = 1) -> tuple[int, float]:
    """Bytes above what is imported, and CPU seconds of a step, of a run in a process; of several, the first."""
    reader, writer = os.pipe()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        children.append(os.fork())
        if children[-1] == 0:
            os.close(reader)
            if count > 1:
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
                os.environ |= {name: str(value) for name, value in place.items()}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
            found = _run(values)
            if rank == 0:
                os.write(writer, json.dumps(found).encode())
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        text = answer.read()
    for child in children:
        os.waitpid(child, 0)
    before, seconds = json.loads(text)
    lines = (Path(values["output"]) / "metrics.jsonl").read_text("utf-8").splitlines()
    peak = max(row["memory/cpu_peak"] for row in map(json.loads, lines) if "time/step" in row)
    return peak - before, seconds[len(seconds) // 2]


def program_bytes(folder: Path, count: int) -> int:
    """What a run in so many processes takes in each beside what is estimated, seen in a run of the tiny model."""
    train = {"steps": 2, "mode": "full", "parallel": {"data": count}}
    values = run_of(folder, f"program_{count}", make_model("tiny", folder), train, {"losses": ALM})
    return measured(values, count)[0] - estimate_distill(build(DistillRun, values), NO_RATES, other_way=False).peak


def _run(values: dict[str, Any]) -> tuple[int, list[float]]:
    """Resident bytes before a run, and the CPU seconds of its steps but the first, in rising order."""
    seconds: list[float] = []
    untimed = loop._step

    def timed(run: Any, step: int) -> Any:
        began = time.process_time()
        found = untimed(run, step)
        seconds.append(time.process_time() - began)
        return found

    loop._step = timed
    gc.collect()
    if not KEPT:
        give_back()
    before = resident_bytes()
    distill(build(DistillRun, values), quiet=True)
    return before, sorted(seconds[1:])


def main(folder: Path, *parts: str) -> None:
    """Prints the table, and writes it as JSON lines."""
    table = Table("run", "MB", "estimated", "", "s a step", "estimated", "")
    folder.mkdir(parents=True, exist_ok=True)
    time.perf_counter = time.process_time  # what other programs take of this machine shall not count
    torch.set_num_threads(1)
    for name, more in (("tiny", {}), ("tiny_bytes", {"target_tokenizer": "byte"})):
        train = {"steps": 2, "mode": "lora" if more else "full"}
        _run(run_of(folder, name, make_model("tiny", folder), train, {"losses": ALM, **more}))
    speeds = {name: measure_rates("cpu", half) for name, half in HALVES.items() if name != "float16"}
    program: dict[int, int] = {}
    with (folder / "table.jsonl").open("w", encoding="utf-8") as file:
        for number, (name, model, train, more) in enumerate(CASES):
            if parts and not any(part in name for part in parts):
                continue
            source = make_model(model, folder) if model in SHAPES else model
            train = train | ({"steps": 2} if model in SHAPES and SHAPES[model].get("hidden_size", 0) >= LARGE else {})
            values = run_of(folder, number, source, train, more)
            rates = speeds[str(train.get("precision", "float32"))]
            found = estimate_distill(build(DistillRun, values), rates, other_way=False)
            if found.processes not in program:
                program[found.processes] = program_bytes(folder, found.processes)
            size, seconds = measured(values, found.processes)
            size -= program[found.processes]
            row = {"run": name, "bytes": size, "estimated_bytes": found.peak, "program": program[found.processes]}
            row |= {"seconds": seconds, "estimated_seconds": found.seconds}
            file.write(json.dumps(row) + "\n")
            file.flush()
            ratios = [f"{found.peak / size - 1:+.0%}", f"{found.seconds / seconds - 1:+.0%}"]
            sizes = [f"{size / 1e6:,.0f}", f"{found.peak / 1e6:,.0f}", ratios[0]]
            table.add_row(name, *sizes, f"{seconds:.2f}", f"{found.seconds:.2f}", ratios[1])
            print(name, *sizes, f"{seconds:.2f}", f"{found.seconds:.2f}", ratios[1], file=sys.stderr, flush=True)
    Console().print(table)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(word for word in sys.argv[2:] if word != "--keep"))
