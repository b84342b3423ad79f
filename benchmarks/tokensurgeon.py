"""A transfer beside mergekit-tokensurgeon 0.1.5: real vocabularies, small models, one run each, one thread.

Per pair a source model and a donor with the target vocabulary are made: the rows of a token are the sum of vectors of
its three-byte pieces, seen through another matrix in each model, and noise, so that a donor's rows say something of the
source's. Prints Markdown tables: shared tokens found, rows made from other text than the token's, CPU and wall seconds
and peak memory of the whole command, what the written folder holds, and the mean cosine of the new input rows with
those that the source model would have. Writes the same as JSON to --raw, and the claim of one pair to --json.
Usage: python benchmarks/tokensurgeon.py --peer BIN [--width 256] [--raw FILE] [--json FILE] [--work FOLDER] [PAIR ...]
       where BIN is the bin folder of an environment with mergekit 0.1.5, and PAIR is SOURCE:TARGET of the shared folder
"""

import os

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"

import argparse
import itertools
import json
import lzma
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tokenkit.report.claims import Row, absent, make_claim, measured, own_command, save_claim
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.transfer.plan import TransferPlan, plan_transfer

SHARED = Path(os.environ.get("TOKENKIT_SHARED", Path(__file__).resolve().parents[2] / "shared"))
PAIRS = ["llama2:gpt2", "gpt2:mistral_v1", "gpt2:smollm2"]
TEMPLATE = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
RANK = 64
BODY = {"hidden_act": "silu", "num_hidden_layers": 2, "num_attention_heads": 4, "tie_word_embeddings": False}


def vectors(tokens: list[bytes], seed: int = 0) -> np.ndarray:
    """What a token is like: the mean of drawn vectors of its pieces of three bytes."""
    table = np.random.default_rng(seed).standard_normal((1 << 14, RANK)).astype(np.float32)
    rows = np.zeros((len(tokens), RANK), np.float32)
    for row, token in zip(rows, tokens, strict=True):
        framed = b"^" + token + b"$"
        pieces = [int.from_bytes(framed[i : i + 3], "big") * 2654435761 % (1 << 14) for i in range(len(framed) - 2)]
        row += table[pieces].sum(0) / max(len(pieces), 1) ** 0.5 if pieces else 0
    return rows


def seen(tokens: list[bytes], width: int, model: int, noise: float) -> torch.Tensor:
    """The rows that a model has for tokens; without noise, those that it would have."""
    random = np.random.default_rng(model)
    view = random.standard_normal((RANK, width)).astype(np.float32) / RANK**0.5
    rows = vectors(tokens) @ view
    return torch.from_numpy(0.02 * (rows + noise * random.standard_normal(rows.shape).astype(np.float32)))


def make_model(name: str, tokenizer: Tokenizer, folder: Path, width: int, seed: int) -> None:
    """A model with a real vocabulary, sampling settings and a chat template of its own."""
    torch.manual_seed(seed)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "max_position_embeddings": 512}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=tokenizer.vocab_size, **BODY, **sizes, **ids))
    with torch.no_grad():
        for side, matrix in enumerate((model.model.embed_tokens.weight, model.lm_head.weight)):
            matrix.copy_(seen(tokenizer.token_bytes, width, 10 * seed + side, 0.3))
    model.generation_config.do_sample, model.generation_config.temperature = True, 0.5 + seed / 10
    model.save_pretrained(folder)
    for file in (SHARED / "data/tokenizers" / name).glob("tokenizer*"):
        content = lzma.decompress(file.read_bytes()) if file.suffix == ".xz" else file.read_bytes()
        (folder / file.name.removesuffix(".xz")).write_bytes(content)
    (folder / "chat_template.jinja").write_text(f"{name}: {TEMPLATE}", "utf-8")


def run(command: list[str], log: Path) -> dict[str, Any]:
    """What the whole command used, of this child alone."""
    begin = time.perf_counter()
    with log.open("w") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - begin
    cpu, memory = used.ru_utime + used.ru_stime, used.ru_maxrss / 1e3
    return {"exit": child.returncode, "cpu_s": cpu, "wall_s": wall, "peak_mb": memory, "log": log.read_text("utf-8")}


def written(folder: Path, source: Path, target: Tokenizer, plan: TransferPlan, truth: torch.Tensor) -> dict[str, Any]:
    """What the folder holds as it was left, loaded with transformers."""
    before, after = (load_file(path / "model.safetensors") for path in (source, folder))
    old, new = (weights.pop("model.embed_tokens.weight") for weights in (before, after))
    heads = before.pop("lm_head.weight"), after.pop("lm_head.weight")
    ids, sources = (torch.from_numpy(part) for part in plan.anchors)
    config, loaded = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    pad = config.pad_token_id if target.pad_id is None else target.pad_id  # without one, anything may stand there
    wanted = (target.bos_id, target.eos_id, pad)
    generation = folder / "generation_config.json"
    settings = json.loads(generation.read_text("utf-8")) if generation.is_file() else {}
    return {
        "body unchanged": before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before),
        "shared rows copied": float((old[sources] == new[ids]).all(1).float().mean()),
        "shared head rows copied": float((heads[0][sources] == heads[1][ids]).all(1).float().mean()),
        "cosine of new rows": float(torch.cosine_similarity(new[plan.free], truth[plan.free]).mean()),
        "sampling settings kept": settings.get("temperature") == 0.6,
        "chat template": (loaded.chat_template or "none").partition(":")[0],
        "special ids right": (config.bos_token_id, config.eos_token_id, config.pad_token_id) == wanted,
        "rows = vocab_size = tokenizer": len(new) == config.vocab_size == len(loaded) == model.config.vocab_size,
    }


def measure_pair(pair: str, args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All commands on a pair, and what the vocabularies have in common."""
    names = pair.split(":")
    source, target = (load_tokenizer(str(SHARED / "data/tokenizers" / name)) for name in names)
    base, donor = work / "source", work / "donor"
    for number, (name, tokenizer, folder) in enumerate(zip(names, (source, target), (base, donor), strict=True), 1):
        make_model(name, tokenizer, folder, args.width, number)
    plan = plan_transfer(source, target, source_rows=source.vocab_size)
    truth = seen(target.token_bytes, args.width, 10, 0.0)
    (work / "bytes").write_text("\n".join(token.hex() for token in target.token_bytes), "ascii")
    found: dict[str, Any] = {"peer": counted_by_peer(args.peer, base, donor, work), "shared": len(plan.anchors[0])}
    for repeat, command in itertools.product(range(args.repeats), args.commands):
        if repeat and command.endswith("omp"):
            continue  # a minute each
        name, _, method = command.partition("-")
        out = work / f"{command}-{repeat}"
        if name == "mergekit":
            line = [str(args.peer / "mergekit-tokensurgeon"), str(base), str(donor), str(out), "-a", method, "-k", "8"]
        else:
            options = {"initializer": method, **({"donor": str(donor), "omp": {"k": 8}} if method == "omp" else {})}
            file = {
                "output": str(out),
                "model": {"source": str(base)},
                "target_tokenizer": str(donor),
                "transfer": options,
            }
            (work / f"{command}.yaml").write_text(yaml.safe_dump(file), "utf-8")
            line = [sys.executable, "-m", "tokenkit.cli", "transfer", str(work / f"{command}.yaml")]
        earlier = found.get(command, {"all": []})["all"]
        found[command] = run(line, work / f"{command}.log")
        found[command]["all"] = [*earlier, {key: found[command][key] for key in ("cpu_s", "peak_mb")}]
        if found[command]["exit"] == 0:
            found[command] |= written(out, base, target, plan, truth)
        print(
            pair, command, json.dumps({k: v for k, v in found[command].items() if k not in ("log", "all")}), flush=True
        )
    return found


def counted_by_peer(peer: Path, base: Path, donor: Path, work: Path) -> dict[str, int]:
    """What mergekit makes of the two vocabularies; nothing where it is not there."""
    if not (peer / "python").exists():
        return {}
    worker = [str(peer / "python"), str(Path(__file__).with_name("tokensurgeon_worker.py"))]
    counted = subprocess.run([*worker, base, donor, work / "bytes"], capture_output=True, text=True, check=True)
    return json.loads(counted.stdout.splitlines()[-1])


def claim_rows(pair: str, found: dict[str, Any]) -> list[Row]:
    """The two ways that both know, side by side."""
    rows: list[Row] = []
    for ours, theirs in (("tokenkit-fvt", "mergekit-subword"), ("tokenkit-omp", "mergekit-omp")):
        if ours not in found:
            continue
        what, beside = (f"{name.replace('-', ' ')}, {pair.replace(':', ' → ')}" for name in (ours, theirs))
        own, peer = found[ours], found.get(theirs, {"exit": None})
        if peer["exit"] != 0:
            why = "mergekit is not installed" if peer["exit"] is None else peer["log"].strip().splitlines()[-1][:100]
            rows.append(absent(what, beside, "CPU seconds", why, [one["cpu_s"] for one in own["all"]]))
            continue
        for unit, key in (("CPU seconds", "cpu_s"), ("peak MB", "peak_mb")):
            rows.append(measured(what, beside, unit, *([one[key] for one in side["all"]] for side in (own, peer))))
        for unit, key in (("cosine of new rows with the source's", "cosine of new rows"),):
            rows.append(measured(what, beside, unit, [own[key]], [peer[key]], better="more"))
        for unit, key in (("share of shared rows copied", "shared rows copied"),):
            rows.append(measured(what, beside, unit, [own[key]], [peer[key]], better="equal"))
    if found["peer"]:
        wrong = found["peer"]["garbled"]
        note = "of them made by mergekit from other text than the token's: the peer's figure"
        rows.append(measured("new rows", "mergekit", "rows from other text", [0], [wrong], better="equal", note=note))
    return rows


def write_claim(path: Path, results: dict[str, dict[str, Any]]) -> None:
    """What was found, in the common form."""
    sentence = (
        "Whole commands from folder to folder over real vocabularies and synthetic rows: time, memory, how many "
        "of the shared tokens keep their rows, and how close new rows are to what the source model would have."
    )
    rows = [row for pair, found in results.items() for row in claim_rows(pair, found)]
    there = all(found["peer"] for found in results.values())
    peers = {"mergekit": "0.1.5" if there else "absent: not installed; see benchmarks/peers.py"}
    save_claim(path, make_claim("transplant", sentence, own_command(), rows, peers))


def tables(results: dict[str, dict[str, Any]], commands: list[str]) -> str:
    """Markdown."""
    lines = [
        "| pair | shared: ours | shared: mergekit | new to mergekit | of these from other text |",
        "|---|---:|---:|---:|---:|",
    ]
    for pair, one in results.items():
        peer = one["peer"] or {"shared": 0, "new": 0, "garbled": 0}
        share = peer["garbled"] / max(peer["new"], 1)
        lines.append(
            f"| {pair} | {one['shared']:,} | {peer['shared']:,} | {peer['new']:,} | {peer['garbled']:,} ({share:.1%}) |"
        )
    keys = [key for key in results[next(iter(results))][commands[0]] if key not in ("exit", "log", "all")]
    lines += ["", "| pair | command | " + " | ".join(keys) + " |", "|---|---|" + "---:|" * len(keys)]
    for pair, one in results.items():
        for command in commands:
            cells = [_cell(one[command].get(key)) for key in keys]
            if one[command]["exit"] != 0:
                cells[-1] = one[command]["log"].strip().splitlines()[-1]
            lines.append(f"| {pair} | {command} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="*", default=PAIRS)
    parser.add_argument("--peer", type=Path, default=Path(".peers/mergekit/bin"))
    parser.add_argument("--repeats", type=int, default=1, help="of every command but the searches, in turn")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--raw", type=Path, help="all figures as JSON")
    parser.add_argument("--json", type=Path, help="write the claim there")
    parser.add_argument("--work", type=Path, help="keep what is written, in a new folder")
    every = ["tokenkit-fvt", "tokenkit-omp", "mergekit-subword", "mergekit-omp", "mergekit-stb"]
    parser.add_argument("--commands", nargs="+", default=every)
    args = parser.parse_args()
    if not (args.peer / "mergekit-tokensurgeon").exists():
        args.commands = [name for name in args.commands if not name.startswith("mergekit")]
    results: dict[str, dict[str, Any]] = {}
    for pair in args.pairs:
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder) if args.work is None else args.work / pair.replace(":", "_")
            work.mkdir(parents=True, exist_ok=args.work is None)
            results[pair] = measure_pair(pair, args, work)
        if args.raw is not None:
            args.raw.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    print("\n" + tables(results, args.commands))
    if args.json is not None:
        write_claim(args.json, results)


if __name__ == "__main__":
    main()
