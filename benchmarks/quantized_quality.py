"""What int8 and int4 cost and save: bytes, bits per byte, KL, first choices, loading and writing by stock transformers.

Exports a model as float32, bfloat16, int8 and int4, loads each folder with transformers as anybody would, and prints a
Markdown table. Times are beside float32 in the same run: the best of some interleaved repeats, one thread. stories260K
and its text come from the shared data folder. Usage: python benchmarks/quantized_quality.py [--models demo_teacher]
"""

import argparse
import gc
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from tokenkit.cli_shared import log_calmly
from tokenkit.data.source import SourceConfig, read_documents
from tokenkit.export.huggingface import export_huggingface
from tokenkit.export.quality import answers_kept
from tokenkit.export.quantized import export_quantized
from tokenkit.export.quantized_verify import load_stock
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.verbs.model import ModelChoice, load_pair

ROOT = Path(__file__).parents[1]
STORIES = {
    "path": str(ROOT / "../shared/data/corpora/tinystories/valid.txt"),
    "separator": r"\n\n(?=Once upon|One day)",
}
MODELS: dict[str, tuple[Path, dict[str, Any], list[str]]] = {  # folder, text, layers whose width no group divides
    "demo_teacher": (ROOT / "tokenkit/assets/demo_teacher", {"stdlib": "held_out"}, []),
    "stories260k": (ROOT / "../shared/data/weights/stories260K", STORIES, ["down_proj"]),
}
REPEATS, NEW_TOKENS = 5, 64


def exports(model: PreTrainedModel, tokenizer: Tokenizer, documents: list[str], skip: list[str]) -> dict[str, Any]:
    """Name of each format: what writes it into a folder."""
    options: dict[str, Any] = {"documents": documents, "max_rise": 1.0}

    def int4(folder: Path, group_size: int) -> None:
        export_quantized(model, tokenizer, folder, scheme="int4", group_size=group_size, skip=skip, **options)

    return {
        "float32": lambda folder: export_huggingface(model, tokenizer, folder),
        "bfloat16": lambda folder: export_huggingface(model, tokenizer, folder, dtype=torch.bfloat16),
        "int8": lambda folder: export_quantized(model, tokenizer, folder, scheme="int8", **options),
        "int4, groups of 32": lambda folder: int4(folder, 32),
        "int4, groups of 64": lambda folder: int4(folder, 64),
    }


def timed(folder: Path, prompt: list[int]) -> tuple[float, float]:
    """Seconds to load the folder, and to write new tokens after the prompt."""
    gc.collect()
    start = time.perf_counter()
    model = load_stock(folder, "cpu")
    loaded = time.perf_counter() - start
    settings = GenerationConfig(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    start = time.perf_counter()
    model.generate(torch.tensor([prompt]), generation_config=settings)
    return loaded, time.perf_counter() - start


def table(name: str, max_bytes: int) -> None:
    """Prints the rows of one model."""
    source, text, skip = MODELS[name]
    documents = read_documents(SourceConfig(**text, max_bytes=max_bytes))
    model, tokenizer = load_pair(ModelChoice(source=str(source)), "cpu")
    prompt = [tokenizer.start_id(), *tokenizer.encode(documents[0]).ids[:16].tolist()]
    with tempfile.TemporaryDirectory() as scratch:
        folders = {}
        for kind, write in exports(model, tokenizer, documents, skip).items():
            folders[kind] = Path(scratch) / kind.replace(" ", "_").replace(",", "")
            write(folders[kind])
        best: dict[str, tuple[float, float]] = {}
        for _ in range(REPEATS):
            for kind, folder in folders.items():
                loading, writing = timed(folder, prompt)
                known = best.get(kind, (float("inf"), float("inf")))
                best[kind] = (min(loading, known[0]), min(writing, known[1]))
        sizes = {kind: sum(f.stat().st_size for f in folder.glob("*.safetensors")) for kind, folder in folders.items()}
        for kind, folder in folders.items():
            kept = answers_kept(model, load_stock(folder, "cpu"), tokenizer, documents)
            rise = kept["bits_per_byte_after"] / kept["bits_per_byte_before"] - 1
            figures = [
                f"{sizes[kind]:,}",
                f"{sizes[kind] / sizes['float32']:.2f}",
                f"{kept['bits_per_byte_after']:.4f}",
                f"{rise:+.2%}",
                f"{kept['kl_nats_per_token']:.2g}",
                f"{kept['same_first_choice']:.1%}",
                f"{best[kind][0] / best['float32'][0]:.2f}",
                f"{best['float32'][1] / best[kind][1]:.2f}",
            ]
            print(f"| {name} | {kind} | {' | '.join(figures)} |", flush=True)


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--max-bytes", type=int, default=24576)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    log_calmly()
    print("| model | format | bytes | of float32 | bits per byte | rise | KL | same first | load time | tokens/s |")
    print("|---|---|" + "---:|" * 8)
    for name in arguments.models:
        table(name, arguments.max_bytes)


if __name__ == "__main__":
    main()
