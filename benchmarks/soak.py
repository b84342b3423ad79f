"""Random SIGKILLs of one process of several, until the run is through: its weights beside those of an undisturbed run.

python -m benchmarks.soak              # 200 steps on 2 processes, 6 kills; minutes on two cores
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

HERE = Path(__file__).parents[1]
ASSETS = HERE / "tokenkit" / "assets"
LOST = "another process of this run is gone"
PATIENCE = 300.0  # seconds without a new step


def command(folder: Path, processes: int, steps: int) -> list[str]:
    """A small transfer over several processes, with dropout in its adapters, so that draws matter as well."""
    words = [
        f"output={folder}",
        f"model.source={ASSETS / 'demo_teacher'}",
        f"target_tokenizer={ASSETS / 'demo_unigram'}",
        "losses={alm: {weight: 10}, clm: {}}",
        "data={source: {stdlib: train, max_bytes: 200000}, window_bytes: 128}",
        f"train={{steps: {steps}, batch_size: 4, mode: lora, save_every: 10, log_every: 1}}",
        "train.lora={rank: 4, dropout: 0.1}",
        "train.optimizer={learning_rate: 1e-3, warmup_steps: 10}",
        "eval={source: {stdlib: held_out, max_bytes: 2048}}",
    ]
    binary = Path(sys.executable).parent
    torchrun = [str(binary / "torchrun"), "--nproc-per-node", str(processes), "--no-python"]
    return [*torchrun, str(binary / "tokenkit"), "distill", *words, "--quiet"]


def workers(launcher: int) -> list[int]:
    """The processes that a launcher has started."""
    found = Path(f"/proc/{launcher}/task/{launcher}/children").read_text("ascii").split()
    return [int(pid) for pid in found]


def step_of(folder: Path) -> int:
    """The newest step that was logged."""
    path = folder / "metrics.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (json.JSONDecodeError, KeyError):
            continue
    return 0


def run_until(words: list[str], folder: Path, stop_at: int | None, victim: int) -> tuple[int, str]:
    """Runs, kills one process when a step is reached; the exit code and what was said."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    running = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    seen, since = step_of(folder), time.monotonic()
    while stop_at is not None and running.poll() is None:
        step = step_of(folder)
        if step != seen:
            seen, since = step, time.monotonic()
        if step >= stop_at:
            os.kill(workers(running.pid)[victim], signal.SIGKILL)
            break
        if time.monotonic() - since > PATIENCE:
            running.kill()
            raise RuntimeError(f"no step after {seen} in {PATIENCE:.0f} seconds")
        time.sleep(random.uniform(0.0, 0.02))
    _, said = running.communicate()
    return running.returncode, said


def main(
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 200,
    processes: Annotated[int, typer.Option(help="Processes.")] = 2,
    kills: Annotated[int, typer.Option(help="SIGKILLs.")] = 6,
    seed: Annotated[int, typer.Option(help="Of the moments and the victims.")] = 0,
    output: Annotated[Path, typer.Option(help="Where both runs go.")] = Path("outputs/soak"),
) -> None:
    """Prints after which steps a process was killed, and whether both runs end with the same bits."""
    draws = random.Random(seed)
    calm, rough = output / "calm", output / "rough"
    for folder in (calm, rough):
        shutil.rmtree(folder, ignore_errors=True)
    code, said = run_until(command(calm, processes, steps), calm, None, 0)
    if code:
        raise SystemExit(f"the undisturbed run failed: {said[-2000:]}")
    moments = sorted(draws.sample(range(3, steps - 2), kills))
    told = 0
    for moment in moments:
        resume = ["--resume"] if (rough / "run.yaml").is_file() else []
        victim = draws.randrange(processes)
        code, said = run_until([*command(rough, processes, steps), *resume], rough, moment, victim)
        told += LOST in said
        print(f"killed process {victim} after step {step_of(rough)}: exit {code}, told in a line: {LOST in said}")
    code, said = run_until([*command(rough, processes, steps), "--resume"], rough, None, 0)
    if code:
        raise SystemExit(f"the last part failed: {said[-2000:]}")
    same = all(
        (calm / name).read_bytes() == (rough / name).read_bytes()
        for name in ("model/model.safetensors", "adapter/adapter_model.safetensors")
    )
    losses = [[json.loads(line).get("loss") for line in (f / "metrics.jsonl").open()] for f in (calm, rough)]
    print(f"weights the same bits: {same}; losses the same: {losses[0] == losses[1]}; told {told} of {kills}")
    if not same or losses[0] != losses[1]:
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
