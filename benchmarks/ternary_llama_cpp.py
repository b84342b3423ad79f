"""GGUF files of small ternary models in llama.cpp: its ids, its next-token distributions, sizes and speed.

Trains a model of each architecture for a while on this Python's standard library, exports it, and lets llama.cpp (the
prebuilt library of node-llama-cpp, in a process of its own) read the same prompts. Prints Markdown tables. Needs node,
and in TOKENKIT_NODE_LLAMA_CPP the folder in which `npm install node-llama-cpp` was run. Speed is that of one larger
model with random weights, every type in this one run, one thread, generating token by token.
Usage: python benchmarks/ternary_llama_cpp.py [--steps 150] [--generated 48] [--tokenizers] [--check] [--json FILE]
"""

import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from tokenkit.config import UserError
from tokenkit.data.source import SourceConfig, read_documents
from tokenkit.export.gguf_file import export_gguf
from tokenkit.export.gguf_tokenizer import PROBES
from tokenkit.models.bitlinear import ternary_layers
from tokenkit.models.ternary import TernaryConfig, attach_ternary
from tokenkit.report.claims import Row, make_claim, measured, own_command, save_claim
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.tokenizers.train import train_tokenizer

SHARED = Path(os.environ.get("TOKENKIT_SHARED", Path(__file__).resolve().parents[2] / "shared"))
WORKER = Path(__file__).with_name("llama_cpp_worker.mjs")
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
LARGE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6, "num_attention_heads": 16}
TYPES = ("f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0")
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PROMPTS = [
    "Return the number of items in the list",
    "This module provides a class that reads 1024 bytes; if the file does not exist,",
    'def close(self):\n    """Flush and close the stream.\n\n    It\'s an error to',
    "Größe: 12 × 3.5 = 42, naïve café — 日本語",
]
MOST_KL = 1e-3  # nats per token that are allowed with --check


def ask(path: Path, **asked: Any) -> dict[str, Any]:
    """What llama.cpp makes of a file, in a process of its own."""
    folder = os.environ["TOKENKIT_NODE_LLAMA_CPP"]
    question = {"folder": folder, "model": str(path), "threads": 1, "rows": [], "texts": [], "generated": 0, **asked}
    done = subprocess.run(
        ["node", str(WORKER)], check=False, input=json.dumps(question), capture_output=True, text=True
    )
    if done.returncode != 0 or not done.stdout:
        raise SystemExit(f"llama.cpp cannot read {path.name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


def models(vocab_size: int) -> dict[str, PreTrainedModel]:
    """One ternary model per architecture; the first with biases and Llama 3's frequencies, the last with SubLN."""
    sizes = {**SIZES, "vocab_size": vocab_size, "num_key_value_heads": 2, "max_position_embeddings": 256}
    torch.manual_seed(0)
    frequencies = {**LLAMA3, "original_max_position_embeddings": 64}
    found: dict[str, PreTrainedModel] = {
        "llama": LlamaForCausalLM(LlamaConfig(**sizes, attention_bias=True, rope_parameters=frequencies)),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=True)),
        "bitnet": LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)),
    }
    for name, model in found.items():
        attach_ternary(model, TernaryConfig(sub_norm="o_down" if name == "bitnet" else "none", calibrate=False))
    return found


def train(model: PreTrainedModel, stream: Tensor, steps: int) -> float:
    """The last loss of so many steps, in nats per token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator, loss = torch.Generator().manual_seed(0), torch.zeros(())
    model.train()
    for _ in range(steps):
        starts = torch.randint(0, len(stream) - 96, (8,), generator=generator).tolist()
        batch = torch.stack([stream[start : start + 96] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    return float(loss.detach())


@torch.no_grad()
def divergence(model: PreTrainedModel, rows: list[list[int]], logits: list[list[list[float]]]) -> Float[Tensor, "T"]:
    """KL(the model in torch || llama.cpp) of every position, in nats."""
    found = []
    for row, theirs in zip(rows, logits, strict=True):
        ours = model(torch.tensor([row])).logits[0].double().log_softmax(-1)
        other = torch.tensor(theirs, dtype=torch.float64).log_softmax(-1)
        found.append((ours.exp() * (ours - other)).sum(-1))
    return torch.cat(found)


def agreement(
    folder: Path, tokenizer: Tokenizer, stream: Tensor, steps: int, only: list[str]
) -> dict[tuple[str, str], float]:
    """Prints how far llama.cpp is from the training forward; the mean KL by architecture and type."""
    rows = [[tokenizer.start_id(), *tokenizer.encode(text).ids.tolist()] for text in PROMPTS]
    texts = [*PROMPTS, *PROBES]
    expected = [tokenizer.encode(text).ids.tolist() for text in texts]
    print(
        "| architecture | loss | type | bytes | equal ids | mean KL | largest KL | mean KL without int8 activations |"
    )
    print("|---|---|---|---|---|---|---|---|")
    means = {}
    for name, model in models(tokenizer.vocab_size).items():
        if name not in only:
            continue
        loss = train(model, stream, steps)
        for kind in TYPES:
            path = folder / f"{name}-{kind}.gguf"
            size = export_gguf(model, tokenizer, path, type=kind)["bytes"]
            found = ask(path, rows=rows, texts=texts)
            equal = sum(a == b for a, b in zip(found["ids"], expected, strict=True))
            if equal < len(texts):
                raise SystemExit(f"{path.name}: llama.cpp gives other ids for {len(texts) - equal} texts")
            kl = divergence(model, rows, found["logits"])
            for layer in ternary_layers(model).values():
                layer.activation_bits = None
            plain = divergence(model, rows, found["logits"]).mean()
            for layer in ternary_layers(model).values():
                layer.activation_bits = 8
            means[name, kind] = float(kl.mean())
            figures = " | ".join(f"{value:.2e}" for value in (kl.mean(), kl.max(), plain))
            print(f"| {name} | {loss:.2f} | {kind} | {size:,} | {equal} of {len(texts)} | {figures} |")
    return means


def speed(folder: Path, tokenizer: Tokenizer, generated: int, types: list[str], repeats: int) -> list[Row]:
    """Prints tokens per second of one model in every type, the best of interleaved repeats; the rows of the claim."""
    torch.manual_seed(0)
    config = LlamaConfig(**LARGE, num_key_value_heads=4, vocab_size=tokenizer.vocab_size, tie_word_embeddings=True)
    model = LlamaForCausalLM(config).eval()
    attach_ternary(model, TernaryConfig(sub_norm="none"))
    paths = {kind: folder / f"large-{kind}.gguf" for kind in types}
    sizes = {kind: export_gguf(model, tokenizer, path, type=kind)["bytes"] for kind, path in paths.items()}
    rates: dict[str, list[float]] = {kind: [] for kind in types}
    busy: dict[str, list[float]] = {kind: [] for kind in types}
    for _ in range(repeats):
        for kind, path in paths.items():
            found = ask(path, rows=[[tokenizer.start_id(), 10, 11]], generated=generated)
            rates[kind].append(found["tokens"] / found["seconds"])
            busy[kind].append(found["cpu_seconds"] / found["tokens"])
    weights = sum(parameter.numel() for parameter in model.parameters())
    print(f"\n{weights:,} weights, {generated} tokens, one thread, the best of {repeats}:\n")
    print("| type | bytes | of f16 | tokens/s | of f16 |\n|---|---|---|---|---|")
    base = max(rates["f16"])
    for kind in types:
        rate = max(rates[kind])
        print(f"| {kind} | {sizes[kind]:,} | {sizes[kind] / sizes['f16']:.3f} | {rate:.1f} | {rate / base:.2f} |")
    rows = []
    for kind in types:
        if kind != "f16":
            rows.append(measured(kind, "f16", "MB of the file", [sizes[kind] / 1e6], [sizes["f16"] / 1e6]))
            rows.append(measured(kind, "f16", "CPU seconds of a token", busy[kind], busy["f16"]))
    return rows


def write_claim(path: Path, rows: list[Row], means: dict[tuple[str, str], float]) -> None:
    """What was found, in the common form."""
    sentence = (
        "One ternary model in llama.cpp as packed ternary files and as float: size, time of a token on one "
        "thread, and how far its distributions are from the training forward (KL, the float file beside)."
    )
    for (name, kind), mean in means.items():
        if kind.startswith("tq"):
            beside = means[name, "f16"]
            rows.append(measured(f"{name} {kind}", "f16", "mean KL, nats of a token", [mean], [beside], better="equal"))
    manifest = Path(os.environ["TOKENKIT_NODE_LLAMA_CPP"]) / "node_modules/node-llama-cpp/package.json"
    peers = {"node-llama-cpp": json.loads(manifest.read_text("utf-8"))["version"]}
    save_claim(path, make_claim("ternary", sentence, own_command(), rows, peers))


def vocabularies(folder: Path) -> None:
    """Prints which real tokenizers can be said in GGUF, and on how many probes llama.cpp gives their ids."""
    print("\n| tokenizer | model | pre | equal ids in llama.cpp | notes |\n|---|---|---|---|---|")
    for source in sorted(SHARED.glob("data/tokenizers/*")):
        try:
            tokenizer = load_tokenizer(str(source))
            sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
            model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=tokenizer.vocab_size, tie_word_embeddings=True))
            path = folder / f"{source.name}.gguf"
            figures = export_gguf(model, tokenizer, path, type="f16")
        except UserError as error:
            print(f"| {source.name} | – | – | – | {str(error).partition(': ')[2]} |")
            continue
        expected = [tokenizer.encode(text).ids.tolist() for text in PROBES]
        equal = sum(a == b for a, b in zip(ask(path, texts=PROBES)["ids"], expected, strict=True))
        notes = "; ".join(figures["notes"])
        print(f"| {source.name} | {figures['tokenizer']} | {figures['pre']} | {equal} of {len(PROBES)} | {notes} |")
        path.unlink()


def main() -> None:
    """Runs what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="training steps of each small model")
    parser.add_argument("--generated", type=int, default=48, help="tokens for the speed table; 0 leaves it out")
    parser.add_argument(
        "--tokenizers", action="store_true", help="the tokenizers of the shared folder as well; minutes"
    )
    parser.add_argument("--architectures", nargs="+", default=["llama", "qwen2", "bitnet"])
    parser.add_argument("--types", nargs="+", default=list(TYPES), help="of the speed table; f16 among them")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the claim there")
    parser.add_argument("--check", action="store_true", help=f"fail where a mean KL is above {MOST_KL:g}")
    options = parser.parse_args()
    if "TOKENKIT_NODE_LLAMA_CPP" not in os.environ:
        parser.exit(2, "set TOKENKIT_NODE_LLAMA_CPP to the folder in which `npm install node-llama-cpp` was run\n")
    torch.set_num_threads(1)
    documents = read_documents(SourceConfig(stdlib="train", max_bytes=400_000))
    tokenizer = train_tokenizer(documents, "bpe", 512)
    rows = [[tokenizer.start_id(), *one.ids.tolist()] for one in tokenizer.encode_batch(documents)]
    stream = torch.tensor(list(itertools.chain.from_iterable(rows)))
    with tempfile.TemporaryDirectory() as scratch:
        means = agreement(Path(scratch), tokenizer, stream, options.steps, options.architectures)
        rows: list[Row] = []
        if options.generated:
            rows = speed(Path(scratch), tokenizer, options.generated, options.types, options.repeats)
        if options.json is not None:
            write_claim(options.json, rows, means)
        if options.tokenizers:
            vocabularies(Path(scratch))
    most = max(mean for (_, kind), mean in means.items() if kind.startswith("tq"))
    if options.check and most > MOST_KL:
        sys.exit(f"a mean KL of {most:.2e} nats, {MOST_KL:g} allowed")


if __name__ == "__main__":
    main()
