"""How much memory a long run takes more at its end than at its beginning: 10,000 steps of a tiny model.

python -m benchmarks.long_run           # minutes on one core
"""

import json
import shutil
import statistics
from pathlib import Path
from typing import Annotated

import typer

from tokenkit.config import load
from tokenkit.verbs.pretrain import PretrainRun, pretrain

RSS = "memory/cpu_rss"


def main(
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 10_000,
    output: Annotated[Path, typer.Option(help="The run folder; emptied first.")] = Path("outputs/long_run"),
) -> None:
    """Prints resident memory at a tenth of the run, and at its end, as medians over a tenth of the lines each."""
    shutil.rmtree(output, ignore_errors=True)
    words = [
        f"output={output}",
        "tokenizer={train: {kind: bpe, vocab_size: 512, max_bytes: 100000}}",
        "model={model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, "
        "num_attention_heads: 2, num_key_value_heads: 2, tie_word_embeddings: true}",
        "data={source: {stdlib: train, max_bytes: 400000}, window_bytes: 96}",
        f"train={{steps: {steps}, batch_size: 2, log_every: 20, save_every: {steps // 10}, eval_every: {steps // 10}}}",
        "train.optimizer.learning_rate=1e-3",
        "eval={source: {stdlib: held_out, max_bytes: 4096}}",
    ]
    pretrain(load(PretrainRun, words), quiet=True)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").open()]
    resident = [(line["step"], line[RSS]) for line in lines if RSS in line]
    early = statistics.median(size for step, size in resident if 0.1 * steps <= step < 0.2 * steps)
    late = statistics.median(size for step, size in resident if step > 0.9 * steps)
    print(f"resident memory, steps 10-20 % of {steps:,} and the last 10 %: {late / early - 1:+.2%}")


if __name__ == "__main__":
    typer.run(main)
