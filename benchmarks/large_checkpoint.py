"""Peak memory and time of `tokenkit transfer` on checkpoints of 1B and 8B shapes: Llama 3 to Qwen 2, from file to file.

The checkpoints have real names, shards and index, and real tokenizers. Embedding and output rows are random numbers;
the body is holes, which take no space on the disk and are copied as holes. A whole process is measured, with what it
imports; the system's page cache is not in it. The folders are removed in the end.
Usage: python benchmarks/large_checkpoint.py --tokenizers FOLDER [--shapes 1B 8B] [--initializers fvt edge_pieces]
"""

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.transfer.shards import open_checkpoint

SHAPES = {
    "1B": {"hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, "num_attention_heads": 32},
    "8B": {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336, "num_attention_heads": 32},
}
SHARD_BYTES, ITEMSIZE = 5_000_000_000, 2


def make_checkpoint(folder: Path, shape: str, tokenizer: str) -> int:
    """Writes a checkpoint in bfloat16; its size in bytes, holes counted."""
    folder.mkdir(parents=True)
    known = load_tokenizer(tokenizer)
    config = LlamaConfig(vocab_size=known.vocab_size, num_key_value_heads=8, **SHAPES[shape], dtype="bfloat16")
    config.bos_token_id, config.eos_token_id = known.bos_id, known.eos_id
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    known.save(folder)
    with torch.device("meta"):
        shapes = {name: tuple(one.shape) for name, one in AutoModelForCausalLM.from_config(config).named_parameters()}
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, one in shapes.items():
        if sum(map(size_of, shards[-1].values())) + size_of(one) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = one
    weight_map = {}
    for number, shard in enumerate(shards):
        name = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        write_shard(folder / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    total = sum(map(size_of, shapes.values()))
    index = {"metadata": {"total_parameters": total // ITEMSIZE, "total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return total


def size_of(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel() * ITEMSIZE


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A file of holes in which the rows of the vocabulary are random numbers."""
    header, end = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": [*shape], "data_offsets": [end, end + size_of(shape)]}
        end += size_of(shape)
    raw = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)
        for name, shape in shapes.items():
            if "embed" in name or "head" in name:
                generator = torch.Generator().manual_seed(len(name))
                file.seek(8 + len(raw) + header[name]["data_offsets"][0])
                for begin in range(0, shape[0], 4096):
                    block = torch.randn(min(4096, shape[0] - begin), shape[1], generator=generator) * 0.02
                    file.write(block.bfloat16().view(torch.uint8).numpy().tobytes())


def measured(*words: str) -> tuple[float, float, float]:
    """Peak memory in GB, seconds and CPU seconds of one process."""
    began = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "tokenkit.cli", *words], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    assert status == 0, words
    return used.ru_maxrss * 1024 / 1e9, time.perf_counter() - began, used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizers", type=Path, required=True, help="folder with llama3/ and qwen2/ inside")
    parser.add_argument("--shapes", nargs="+", default=[*SHAPES], choices=SHAPES)
    parser.add_argument("--initializers", nargs="+", default=["fvt", "edge_pieces"])
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    work = Path(tempfile.mkdtemp(prefix="large_checkpoint-"))
    target = str(options.tokenizers / "qwen2")
    print("| shape | weights, GB | initialiser | peak memory, GB | seconds | CPU seconds |\n|---|---|---|---|---|---|")
    try:
        for shape in options.shapes:
            source, output = work / shape, work / "out"
            total = make_checkpoint(source, shape, str(options.tokenizers / "llama3"))
            for name in options.initializers:
                words = (f"model.source={source}", f"target_tokenizer={target}", f"output={output}")
                peak, wall, cpu = measured("transfer", *words, f"transfer.initializer={name}")
                found = open_checkpoint(output)
                assert found.rows(found.tables.input).shape[0] == found.config.vocab_size
                print(f"| {shape} | {total / 1e9:.1f} | {name} | {peak:.2f} | {wall:.0f} | {cpu:.0f} |", flush=True)
                shutil.rmtree(output)
            shutil.rmtree(source)
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
