"""stories260K moved to other vocabularies: bits per byte over steps for FVT+CLM, FVT+ALM and mean+ALM.

A real pretrained model and real tokenizers, from the shared data folder. Runs what is not there yet and prints a
Markdown table. Usage: python benchmarks/stories260k.py [--steps 1000] [--output FOLDER] [--targets gpt2 byte]
"""

import argparse
import json
from pathlib import Path
from typing import Any

from tokenkit.config import load
from tokenkit.train.folder import RUN_FILE
from tokenkit.verbs.distill import distill
from tokenkit.verbs.distill_run import DistillRun

RUN = Path(__file__).parents[1] / "runs" / "distill" / "stories260k_to_gpt2.yaml"
TARGETS = {name: f"../shared/data/tokenizers/{name}" for name in ("gpt2", "llama3", "qwen2")} | {"byte": "byte"}
METHODS = {
    "FVT + CLM": ["losses.alm=null", "losses.clm={}"],
    "FVT + ALM": [],
    "mean + ALM": ["transfer.initializer=mean"],
}


def one(target: str, method: str, steps: int, folder: Path) -> dict[str, Any]:
    """The results of one run, made now or found finished."""
    output = folder / f"{target}-{method.replace(' + ', '-').lower()}"
    if not (output / "results.json").is_file():
        words = [str(RUN), f"output={output}", f"target_tokenizer={TARGETS[target]}", f"train.steps={steps}"]
        run = load(DistillRun, [*words, *METHODS[method]])
        distill(run, resume=(output / RUN_FILE).is_file(), quiet=True)
    return json.loads((output / "results.json").read_text("utf-8"))


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=Path("outputs/stories260k"))
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    arguments = parser.parse_args()
    marks = [0, 50, 200]
    print(f"| target | method | {' | '.join(map(str, marks))} | {arguments.steps} | student tokens | teacher |")
    print("|---|---|" + "---:|" * (len(marks) + 3))
    for target in arguments.targets:
        for method in METHODS:
            found = one(target, method, arguments.steps, arguments.output)
            values = [found["bits_per_byte_at"][str(mark)] for mark in marks] + [found["trained_bits_per_byte"]]
            figures = " | ".join(f"{value:.3f}" for value in values)
            row = f"| {target} | {method} | {figures} | {found['tokens']:,} | {found['teacher_bits_per_byte']:.3f} |"
            print(row, flush=True)


if __name__ == "__main__":
    main()
