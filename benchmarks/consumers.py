"""One model in five programs: what tokenkit, transformers, ONNX Runtime and llama.cpp write after the same prompts.

Exports each model, then lets every program continue the same prompts greedily, in a process of its own; none but the
first imports tokenkit. Prints Markdown tables: sizes, equal texts, load time and tokens per second beside transformers.
Needs the extras onnx and gguf; llama.cpp needs node, and in TOKENKIT_NODE_LLAMA_CPP the folder in which
`npm install node-llama-cpp` was run, and is left out otherwise. One thread each; the repeats are interleaved, medians.
Usage: python benchmarks/consumers.py MODEL [MODEL ...] [--prompts FILE] [--new 64] [--repeats 3] [--check]
"""

import os

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SHARED = Path(os.environ.get("TOKENKIT_SHARED", HERE.resolve().parents[1] / "shared"))
GGUF = ("f32", "f16", "q8_0")
PROGRAM = [sys.executable, "-m", "tokenkit.cli"]
OURS = """
import json, sys, time
begin = time.perf_counter()
import torch
from tokenkit.models.generate import WritingConfig, write
from tokenkit.verbs.model import ModelChoice, load_pair
torch.set_num_threads(1)
folder, prompts, new, out = sys.argv[1:]
model, tokenizer = load_pair(ModelChoice(source=folder), "cpu")
loaded = time.perf_counter()
how = WritingConfig(max_new_tokens=int(new))
found = [write(model, tokenizer, [prompt], how)[0] for prompt in json.load(open(prompts))]
taken = time.perf_counter() - loaded
said = {"texts": [one.text for one in found], "tokens": sum(len(one.ids) for one in found)}
json.dump({**said, "load_s": loaded - begin, "generate_s": taken}, open(out, "w"))
"""


def first_words(count: int) -> list[str]:
    """The beginnings of so many held-out stories, of four to nine words."""
    text = (SHARED / "data/corpora/tinystories/valid.txt").read_text("utf-8")
    stories = [story.strip() for story in text.split("\n\n") if len(story.split()) > 20]
    return [" ".join(story.split()[: 4 + number % 6]) for number, story in enumerate(stories[:count])]


def export(model: Path, folder: Path) -> dict[str, Path]:
    """The model in every container; what tokenkit refuses is named and left out."""
    wanted = {"huggingface": ("huggingface", {}), "onnx": ("onnx", {})}
    wanted |= {f"gguf {kind}": ("gguf", {"type": kind}) for kind in GGUF}
    found = {}
    for name, (container, options) in wanted.items():
        path = folder / (f"{options['type']}.gguf" if container == "gguf" else name)
        words = [f"model.source={model}", f"output={path}", f"format={container}"]
        words += [f"{key}={value}" for key, value in options.items()]
        done = subprocess.run([*PROGRAM, "export", *words], check=False, capture_output=True, text=True)
        if done.returncode == 0:
            found[name] = path
        else:
            print(f"{name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
    return found


def ask(name: str, path: Path, prompts: list[str], new: int, suppressed: list[int]) -> dict[str, Any]:
    """Texts and times of one program."""
    with tempfile.TemporaryDirectory() as scratch:
        asked, answer = Path(scratch, "prompts.json"), Path(scratch, "answer.json")
        asked.write_text(json.dumps(prompts), "utf-8")
        arguments = [str(path), str(asked), str(new), str(answer)]
        if name.startswith("gguf"):
            question = {"folder": os.environ["TOKENKIT_NODE_LLAMA_CPP"], "model": str(path), "threads": 1}
            question |= {"rows": [], "texts": [], "generated": 0, "suppressed": suppressed}
            question |= {"cache": "F32"} if name == "gguf f32" else {}  # by default float16, whatever the file
            command = ["node", str(HERE / "llama_cpp_worker.mjs")]
            stdin = json.dumps({**question, "prompts": prompts, "max_new": new})
        else:
            worker = {"tokenkit": ["-c", OURS], "onnx": [str(HERE / "onnx_worker.py")]}
            command = [sys.executable, *worker.get(name, [str(HERE / "transformers_worker.py")]), *arguments]
            stdin = ""
        done = subprocess.run(command, check=False, input=stdin, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{name} cannot read {path.name}: {done.stderr[-2000:]}")
        return json.loads(done.stdout if name.startswith("gguf") else answer.read_text("utf-8"))


def size_of(path: Path) -> int:
    """Bytes of the weights: of a folder, without tokenizer and settings."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.iterdir() if file.suffix in (".safetensors", ".onnx", ".data"))


def compare(model: Path, prompts: list[str], new: int, repeats: int) -> bool:
    """Prints the table of one model; whether every program that computes in float32 wrote the same."""
    with tempfile.TemporaryDirectory() as scratch:
        files = export(model, Path(scratch))
        if "TOKENKIT_NODE_LLAMA_CPP" not in os.environ:
            files = {name: path for name, path in files.items() if not name.startswith("gguf")}
        folder = files["huggingface"]
        settings = json.loads((folder / "generation_config.json").read_text("utf-8"))
        suppressed = settings.get("suppress_tokens") or []
        programs = {"transformers": folder, "tokenkit": folder, **files}
        del programs["huggingface"]
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in programs}
        for _ in range(repeats):
            for name, path in programs.items():
                found[name].append(ask(name, path, prompts, new, suppressed))
        sizes = {name: size_of(path) for name, path in programs.items()}
    return _table(model, found, sizes, prompts)


def _table(model: Path, found: dict[str, list[dict[str, Any]]], sizes: dict[str, int], prompts: list[str]) -> bool:
    def rate(name: str) -> float:
        return statistics.median(run["tokens"] / run["generate_s"] for run in found[name])

    def load(name: str) -> float:
        return statistics.median(run["load_s"] for run in found[name])

    name = model.parent.name if model.name == "model" else model.name
    base, right = found["transformers"][0]["texts"], True
    print(f"\n{name}: {len(prompts)} prompts, {found['transformers'][0]['tokens']} tokens\n")
    columns = ("program", "bytes", "of transformers", "equal texts", "load time, imports included", "tokens/s")
    print(f"| {' | '.join(columns)} |\n|---|---:|---:|---:|---:|---:|")
    for program, runs in found.items():
        equal = sum(a == b for a, b in zip(runs[0]["texts"], base, strict=True))
        if program not in ("gguf f16", "gguf q8_0"):
            right &= equal == len(prompts)
        share, loading = sizes[program] / sizes["transformers"], load(program) / load("transformers")
        speed = rate(program) / rate("transformers")
        figures = f"{share:.2f} | {equal} of {len(prompts)} | {loading:.2f} | {speed:.2f}"
        print(f"| {program} | {sizes[program]:,} | {figures} |")
    return right


def main() -> None:
    """Compares every model that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL", help="a folder of transformers, or a run's")
    parser.add_argument("--prompts", type=Path, help="a JSON list of texts; by default beginnings of stories")
    parser.add_argument("--count", type=int, default=20, help="how many beginnings of stories")
    parser.add_argument("--new", type=int, default=64, help="tokens to write after each")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--check", action="store_true", help="fail where a float32 program writes something else")
    options = parser.parse_args()
    prompts = first_words(options.count) if options.prompts is None else json.loads(options.prompts.read_text("utf-8"))
    equal = [compare(model, prompts, options.new, options.repeats) for model in options.models]
    if options.check and not all(equal):
        raise SystemExit("the programs do not agree")


if __name__ == "__main__":
    main()
