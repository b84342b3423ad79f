"""`make bench`: every claim side by side with its peer, one after the other, one thread each; under half an hour.

    python -m benchmarks.run [--results FOLDER] [--only CLAIM ...]

Every claim is one command that writes RESULTS/CLAIM.json (benchmarks/results by default; then, once all have run,
docs/results.md and its pictures are written too). A claim that fails does not stop the others; the exit code is 1 in
the end. Without the shared data folder most claims cannot be measured: each says so in one line.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.peers import mergekit, node_llama_cpp
from benchmarks.write_results import write_results

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
SHARED = Path(os.environ.get("TOKENKIT_SHARED", ROOT.parent / "shared"))
WORK = "outputs/bench"
COMMANDS = {
    "alignment": "benchmarks/alignment_throughput.py --kilobytes 300 --repeats 5",
    "transplant": "benchmarks/tokensurgeon.py llama2:mistral_v1 --width 64 --repeats 3 "
    "--commands tokenkit-fvt mergekit-subword tokenkit-omp mergekit-omp",
    "losses": f"benchmarks/losses_quality.py --output {WORK}/losses --steps 60 --seeds 0 1 --eval-at --methods",
    "training": "-m benchmarks.trl_training --settings small --repeats 3 --steps 2 --ways",
    "memory": "-m benchmarks.token_scores --vocabularies 151665 --tokens 128",
    "learned_tokenizer": f"benchmarks/learned_tokenizer_lm.py {WORK}/corpora {WORK}/learned_tokenizer --steps 120 "
    "--only learned bpe word",
    "ternary": "benchmarks/ternary_llama_cpp.py --steps 60 --architectures llama --generated 48 --repeats 5 "
    "--types f16 q8_0 tq1_0 tq2_0",
    "evaluation": "benchmarks/lm_eval_parity.py --shared {shared} --limit 20 --repeats 3 "
    "--tasks arc_easy piqa boolq gsm8k",
}
ROWS_OF = {  # the last option's words, which have spaces
    "losses": ["CLM", "GOLD + CLM", "ULD + CLM", "ALM", "ALM + CLM", "TRL ULDLoss + CE", "TRL ULDLoss hybrid + CE"],
    "training": [
        *("CLM", "JSD", "ULD", "GOLD", "ALM"),
        *("SFTTrainer", "GKDTrainer", "GOLDTrainer, ULD", "GOLDTrainer, hybrid"),
    ],
}
NEEDS_NO_DATA = ("ternary",)
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
QUIET = {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TRANSFORMERS_VERBOSITY": "error"}


def words_of(claim: str) -> list[str]:
    """The words behind `python` that measure a claim."""
    shared = os.path.relpath(SHARED, ROOT)
    words = COMMANDS[claim].format(shared=shared).split()
    return [*words, *ROWS_OF.get(claim, [])]


def missing(claim: str, environment: dict[str, str]) -> str | None:
    """Why a claim cannot be measured here at all."""
    if claim not in NEEDS_NO_DATA and not (SHARED / "data").is_dir():
        return "the shared data folder is not there; name it in TOKENKIT_SHARED"
    if claim == "ternary":
        folder, why = node_llama_cpp()
        environment["TOKENKIT_NODE_LLAMA_CPP"] = str(folder)
        return None if folder is not None else f"llama.cpp could not be installed: {why}"
    if claim == "training" and importlib.util.find_spec("trl") is None:
        return "trl is not installed; it is among the packages of the extra `dev`"
    if claim == "transplant" and (why := mergekit()) is not None:
        print(f"transplant: goes on without mergekit, which could not be installed: {why}", flush=True)
    return None


def measure(claim: str, folder: Path, logs: Path) -> str:
    """`done`, `not run: why` or `failed: where it is said`."""
    environment = {**os.environ, **THREADS, **QUIET, "PYTHONPATH": str(ROOT)}
    why = missing(claim, environment)
    if why is not None:
        return f"not run: {why}"
    log, half = logs / f"{claim}.log", logs / f"{claim}.json"
    half.unlink(missing_ok=True)
    shutil.rmtree(ROOT / WORK / claim, ignore_errors=True)  # what an earlier run left would be taken for measured
    command = [sys.executable, *words_of(claim), "--json", str(half)]
    with log.open("w", encoding="utf-8") as output:
        done = subprocess.run(command, check=False, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
    if done.returncode != 0 or not half.exists():
        last = (log.read_text("utf-8").strip().splitlines() or ["without a word"])[-1]
        return f"failed, exit code {done.returncode}: {last} ({os.path.relpath(log, ROOT)})"
    half.replace(folder / f"{claim}.json")
    return "done"


def main() -> None:
    """Runs what is asked for, says how each went, and writes the page where everything is in its place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    options = parser.parse_args()
    folder = options.results.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    logs = ROOT / WORK / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    states = {}
    for claim in options.only:
        began, busy = time.perf_counter(), sum(os.times()[2:4])
        states[claim] = measure(claim, folder, logs)
        took = f"{time.perf_counter() - began:.0f} s, {sum(os.times()[2:4]) - busy:.0f} CPU s"
        print(f"{claim}: {states[claim]} ({took})", flush=True)
    if folder == RESULTS and any(state == "done" for state in states.values()):
        write_results(folder)
    if any(state.startswith("failed") for state in states.values()) or "done" not in states.values():
        sys.exit(1)


if __name__ == "__main__":
    main()
