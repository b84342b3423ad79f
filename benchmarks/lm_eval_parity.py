"""Our class for lm-evaluation-harness beside its own one for transformers: the same answers, and how long they take.

    OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 python benchmarks/lm_eval_parity.py --shared FOLDER [--limit 100] [--repeats 3]
        [--json FILE]

FOLDER holds `data/evals` and `data/weights/stories260K`. Every task runs interleaved, one thread, with both classes on
the same folder, data and limit: `hf` reading one request at a time (its default) and sixteen, `ours` with its default
of 4,096 tokens. Prints a Markdown table. `--float64` computes in float64 on both sides, where rounding hides nothing.
"""

import argparse
import logging
import statistics
import time
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM

from tokenkit.eval.lm_eval_model import HowRead, TokenkitLM
from tokenkit.eval.lm_eval_tasks import TaskFolders
from tokenkit.models.load import load_model
from tokenkit.models.view import ModelView
from tokenkit.report.claims import Row, make_claim, measured, own_command, save_claim
from tokenkit.tokenizers.load import load_tokenizer

SCORED = "hellaswag arc_easy piqa winogrande lambada_openai boolq blimp_adjunct_island arithmetic xcopa_et web_text"
WRITTEN = "gsm8k mgsm_direct_de bbh_boolean"
BESIDE = ("hf 1", "hf 16")


def models(source: str, dtype: str, rolling: bool) -> dict[str, Any]:
    """The three that are asked. A rolling text is begun by one start token: `hf` is told not to add its second."""
    begin = False if rolling else None
    view = ModelView(load_model(source, dtype=getattr(torch, dtype)))
    found: dict[str, Any] = {
        f"hf {size}": HFLM(source, device="cpu", dtype=dtype, batch_size=size, add_bos_token=begin) for size in (1, 16)
    }
    return found | {"ours": TokenkitLM(view, load_tokenizer(source), HowRead(add_bos=None))}


def answers(result: dict[str, Any]) -> list[Any]:
    """What a model said to every request, in order."""
    rows = [row for samples in result["samples"].values() for row in samples]
    return [said for row in rows for several in row["resps"] for said in several]


def figures(result: dict[str, Any]) -> dict[str, float]:
    """The metrics of all tasks of a result."""
    return {
        key: value
        for task in result["results"].values()
        for key, value in task.items()
        if "," in key and "_stderr" not in key
    }


def other_cuts(hf: HFLM, ours: TokenkitLM, result: dict[str, Any]) -> int:
    """Requests whose ids, or whose border between them, differ between the two."""
    rows = [row for samples in result["samples"].values() for row in samples]
    pairs = [tuple(one) for row in rows for one in row["arguments"] if len(one) == 2 and isinstance(one[1], str)]
    found = ours.pairs.encode(pairs)
    theirs = [
        hf._encode_pair(*pair) if pair[0] else ([hf.prefix_token_id], hf.tok_encode(pair[1], add_special_tokens=False))
        for pair in pairs
    ]
    return sum(tuple(map(list, a)) != tuple(map(list, b)) for a, b in zip(found, theirs, strict=True))


def compare(
    name: str, folders: TaskFolders, asked: dict[str, Any], limit: int, repeats: int
) -> tuple[list[str], list[Row]]:
    """One row of the table, and the rows of the claim."""
    found: dict[str, Any] = {}
    took: dict[str, list[float]] = {who: [] for who in asked}
    cpu: dict[str, list[float]] = {who: [] for who in asked}
    for _ in range(repeats):
        for who, model in asked.items():
            tasks = folders.load(f"local_{name}")
            for task in tasks["tasks"].values():
                task.set_config("num_fewshot", task.get_config("num_fewshot") or 0)
                task.set_fewshot_seed(seed=1234)
            begun, busy = time.perf_counter(), time.process_time()
            found[who] = lm_eval.evaluate(model, tasks, limit=limit, bootstrap_iters=0, log_samples=True)
            took[who].append(time.perf_counter() - begun)
            cpu[who].append(time.process_time() - busy)
    own, theirs = answers(found["ours"]), answers(found["hf 1"])
    shown = {who: {key: f"{value:.4f}" for key, value in figures(result).items()} for who, result in found.items()}
    metrics = " · ".join(f"{key.removesuffix(',none')} {value}" for key, value in shown["ours"].items())
    if isinstance(own[0], str):
        same = sum(a == b for a, b in zip(own, theirs, strict=True))
        difference = f"{same} of {len(own)} texts"
        cuts = greedy = "–"
    else:
        values = [[one[0] if isinstance(one, tuple) else one for one in said] for said in (own, theirs)]
        difference = f"{max(abs(float(a) - float(b)) for a, b in zip(*values, strict=True)):.1e}"
        pairs = [(a, b) for a, b in zip(own, theirs, strict=True) if isinstance(a, tuple)]
        greedy = f"{sum(a[1] == b[1] for a, b in pairs)} of {len(pairs)}" if pairs else "–"
        cuts = str(other_cuts(asked["hf 1"], asked["ours"], found["ours"])) if pairs else "–"
    median, used = ({who: statistics.median(t) for who, t in times.items()} for times in (took, cpu))
    ratios = [f"{times['ours'] / times[who]:.2f}" for times in (median, used) for who in BESIDE]
    equal = "yes" if shown["ours"] == shown["hf 1"] else "no: " + str(shown["hf 1"])
    seconds = [f"{median[who]:.2f}" for who in (*BESIDE, "ours")]
    rows = [measured(name, f"lm-eval {who}", "CPU seconds", cpu["ours"], cpu[who]) for who in BESIDE]
    for key, value in figures(found["ours"]).items():
        beside = figures(found["hf 1"])[key]
        rows.append(measured(name, "lm-eval hf 1", key.removesuffix(",none"), [value], [beside], better="equal"))
    return [name, metrics, equal, difference, greedy, cuts, *seconds, *ratios], rows


def write_claim(path: Path, rows: list[Row]) -> None:
    """What was found, in the common form."""
    sentence = (
        "The same requests of lm-evaluation-harness answered by tokenkit and by the harness's own class for "
        "transformers, reading one request at a time (its default) and sixteen: the metrics, and the time."
    )
    save_claim(path, make_claim("evaluation", sentence, own_command(), rows, {"lm_eval": lm_eval.__version__}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--model", default=None)
    parser.add_argument("--tasks", nargs="*", default=[*SCORED.split(), *WRITTEN.split()])
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--float64", action="store_true")
    parser.add_argument("--json", type=Path, help="write the claim there")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    source = asked.model or str(asked.shared / "data/weights/stories260K")
    dtype = "float64" if asked.float64 else "float32"
    folders = TaskFolders([Path(__file__).parent / "tasks"], {"data": str(asked.shared / "data")})
    what = f"limit {asked.limit}, medians of {asked.repeats}, lm_eval {lm_eval.__version__}"
    print(f"{Path(source).name}, {dtype}, {what}\n")
    head = ["task", "metrics (ours)", "equal", "largest difference", "greedy equal", "other cuts"]
    head += ["hf 1, s", "hf 16, s", "ours, s", "ours / hf 1", "ours / hf 16", "CPU: / hf 1", "CPU: / hf 16"]
    print("| " + " | ".join(head) + " |\n|" + " --- |" * len(head), flush=True)
    rows: list[Row] = []
    for name in asked.tasks:
        both = models(source, dtype, name == "web_text")
        line, more = compare(name, folders, both, asked.limit, asked.repeats)
        rows += more
        print("| " + " | ".join(line) + " |", flush=True)
    if asked.json is not None:
        write_claim(asked.json, rows)


if __name__ == "__main__":
    main()
