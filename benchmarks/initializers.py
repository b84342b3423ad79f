"""What each initialiser keeps of a model, at once and after a little training, on two pairs trained here.

    python benchmarks/transfer_corpora.py outputs/tokenizer_corpora outputs/transfer_corpora
    tokenkit pretrain runs/pretrain/{english_bpe,english_unigram,mixed_english_bpe,mixed_bpe}.yaml
    python benchmarks/initializers.py --pairs english mixed [--methods fvt omp_64 ...] [--seeds 0 1 2]
    python benchmarks/initializers.py --table

Pairs: English, byte-level BPE to Unigram, one matrix for input and head; and code with 43 languages, an English
vocabulary to one of its own, two matrices. Donors are models of the same size that were trained with the target
tokenizer. Healing is plain language modelling of the whole model, 4 windows of 128 bytes a step. Measured: bits per
byte of held-out text, and two probes that count how often the model finds the held-out text likelier than the same text
with one digit of a number changed, or with a line indented otherwise. Rows `mergekit: ...` are folders that
mergekit-tokensurgeon wrote (benchmarks/tokensurgeon.py). Seeds change the order of the text and what is drawn.
"""

import argparse
import json
import random
import re
import statistics
from pathlib import Path

import torch

from tokenkit.config import build
from tokenkit.data.batch import Batches
from tokenkit.data.example import cut
from tokenkit.data.source import SourceConfig, read_documents
from tokenkit.eval.bits_per_byte import bits_per_byte
from tokenkit.models.view import ModelView
from tokenkit.objective import LossesConfig, Objective
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.train.balance import build_balance
from tokenkit.train.optimizer import build_optimizer, learning_rate_factor, set_learning_rate
from tokenkit.train.schema import TrainConfig
from tokenkit.train.step import accumulate_gradients
from tokenkit.train.tasks.distill import TextTask
from tokenkit.verbs.model import ModelChoice, load_pair
from tokenkit.verbs.transfer import TransferOptions, transferred

PAIRS = {  # source, donor (its tokenizer is the target), corpus
    "english": ("outputs/english_bpe/model", "outputs/english_unigram/model", "english"),
    "mixed": ("outputs/mixed_english_bpe/model", "outputs/mixed_bpe/model", "mixed"),
}
METHODS = {  # keys of the section `transfer`
    "mean": {"initializer": "mean"},
    "zero": {"initializer": "zero"},
    "normal": {"initializer": "normal"},
    "fvt": {"initializer": "fvt"},
    "fvt, norms kept": {"initializer": "fvt", "fvt": {"keep_norm": True}},
    "last piece / first piece": {"initializer": "edge_pieces"},
    "focus": {"initializer": "focus"},
    "wechsel": {"initializer": "wechsel"},
    "tokalign": {"initializer": "tokalign"},
    "token distillation": {"initializer": "token_distillation", "token_distillation": {"max_steps": 200}},
    "hypernetwork": {"initializer": "hypernet"},
    "nearest": {"initializer": "nearest"},
    "clp": {"initializer": "clp"},
    "omp, k = 8": {"initializer": "omp", "omp": {"k": 8}},
    "omp, k = 8, no rules": {"initializer": "omp", "omp": {"k": 8}, "rules": []},
    "omp, k = 16": {"initializer": "omp", "omp": {"k": 16}},
    "omp, k = 64": {"initializer": "omp", "omp": {"k": 64}},
}
ITSELF = {"the source itself": 0, "the donor itself": 1}  # with their own tokenizers, trained on like the others
PEERS = {  # folders in outputs/mergekit
    "mergekit: subword": "subword",
    "mergekit: omp, k = 8": "omp8",
    "mergekit: omp, k = 64": "omp64",
}
DONORS, TEXTS = {"omp", "clp", "nearest"}, {"focus", "wechsel", "tokalign", "token_distillation"}
EVAL_AT, HELD_OUT_BYTES, LEARN_BYTES = (0, 50, 200, 1000), 32_768, 2_000_000
PROBES, AROUND = 100, 160  # items of a probe, bytes of text before the place and half as many behind
TRAIN = {
    "steps": EVAL_AT[-1],
    "batch_size": 4,
    "optimizer": {"learning_rate": 1e-3, "schedule": "linear", "warmup_steps": 20},
}


def digit_items(documents: list[str], seed: int = 0) -> list[tuple[str, str]]:
    """Held-out text around a number of two digits and more, and the same with one of the digits changed."""
    draw, found = random.Random(seed), []
    for document in documents:
        for match in re.finditer(r"(?<![\d.])\d{2,}(?![\d.])", document):
            place = draw.randrange(match.start(), match.end())
            other = draw.choice([digit for digit in "0123456789" if digit != document[place]])
            found.append((document, place, place + 1, other))
    return [changed(*item) for item in draw.sample(found, min(PROBES, len(found)))]


def indent_items(documents: list[str], seed: int = 0) -> list[tuple[str, str]]:
    """Held-out code around an indented line, and the same with the line four spaces further in or out."""
    draw, found = random.Random(seed), []
    for document in documents:
        for match in re.finditer(r"(?<=\n)(?: {4})+(?=\S)", document) if "def " in document else ():
            width = len(match[0])
            other = " " * draw.choice([width + 4, max(0, width - 4)])
            found.append((document, match.start(), match.end(), other))
    return [changed(*item) for item in draw.sample(found, min(PROBES, len(found)))]


def changed(document: str, start: int, end: int, other: str) -> tuple[str, str]:
    """Both texts, from some way before the place to some way behind it."""
    before, behind = document[max(0, start - AROUND) : start], document[end : end + AROUND // 2]
    return before + document[start:end] + behind, before + other + behind


@torch.no_grad()
def likelier(view: ModelView, tokenizer, items: list[tuple[str, str]]) -> float | None:
    """How often the first text of a pair is the likelier one."""
    texts = [text for item in items for text in item]
    encodings = tokenizer.encode_batch(texts)
    totals = []
    for begin in range(0, len(texts), 20):
        part = encodings[begin : begin + 20]
        width = max(len(one) for one in part)
        inputs, labels = torch.zeros(len(part), width, dtype=torch.long), torch.full((len(part), width), -100)
        for row, one in enumerate(part):
            ids = torch.from_numpy(one.ids.astype("int64"))
            inputs[row, : len(one)] = torch.cat([torch.tensor([tokenizer.start_id()]), ids[:-1]])
            labels[row, : len(one)] = ids
        scores = view.leaves({"label_logp"}, inputs, labels)["label_logp"]
        totals += torch.where(labels >= 0, scores, 0.0).double().sum(1).tolist()
    right = [true > other for true, other in zip(totals[::2], totals[1::2], strict=True)]
    return sum(right) / len(right) if right else None


def moved(pair: str, method: str, seed: int, texts: Path):
    """The model of a method and the target tokenizer."""
    source, donor, _ = PAIRS[pair]
    if method in ITSELF:
        return load_pair(ModelChoice(source=PAIRS[pair][ITSELF[method]]), "cpu")
    if method in PEERS:
        return load_pair(ModelChoice(source=f"outputs/mergekit/{pair}_{PEERS[method]}"), "cpu")
    target = load_tokenizer(donor)
    model, own = load_pair(ModelChoice(source=source), "cpu")
    keys = {**METHODS[method], "seed": seed}
    name = keys["initializer"]
    if name in DONORS:
        keys["donor"] = donor
    if name in TEXTS:
        keys["texts"] = {"path": str(texts), "max_bytes": LEARN_BYTES}
    if name == "hypernet":
        keys["hypernet"] = f"outputs/hypernet_{pair}"
    transferred(build(TransferOptions, keys), model, own, target)
    return model, target


def run(pair: str, method: str, seed: int) -> dict:
    """Bits per byte and probes at some steps."""
    folder = Path("outputs/transfer_corpora") / PAIRS[pair][2]
    torch.manual_seed(seed)
    model, tokenizer = moved(pair, method, seed, folder / "train.jsonl")
    model.requires_grad_(True)
    held_out = read_documents(SourceConfig(path=str(folder / "test.jsonl")))
    digits, indents = digit_items(held_out), indent_items(held_out)
    some = read_documents(SourceConfig(path=str(folder / "test.jsonl"), max_bytes=HELD_OUT_BYTES))
    windows = cut(read_documents(SourceConfig(path=str(folder / "train.jsonl"))), 128, 0)
    config, view = build(TrainConfig, TRAIN), ModelView(model)
    task = TextTask(Objective.of(LossesConfig.model_validate({"clm": {}})), view, tokenizer)
    batches = Batches(windows, tokenizer, None, batch_size=config.batch_size, seed=seed)
    optimizer = build_optimizer(task.trainable(), config.optimizer)
    balance = build_balance(config.balance, ["clm"], task.last_layer, list(task.trainable().values()))
    curve = {}
    for step in range(EVAL_AT[-1] + 1):
        if step in EVAL_AT:
            task.train_mode(False)
            curve[step] = [bits_per_byte(view, tokenizer, some, context_tokens=256).value]
            if step in (0, EVAL_AT[-1]):
                curve[step] += [likelier(view, tokenizer, digits), likelier(view, tokenizer, indents)]
            task.train_mode(True)
        optimizer.zero_grad(set_to_none=True)
        accumulate_gradients(task, batches.at(step), seed * 100_000 + step, balance)
        torch.nn.utils.clip_grad_norm_(list(task.trainable().values()), 1.0)
        rate = learning_rate_factor(step, steps=EVAL_AT[-1], config=config.optimizer)
        set_learning_rate(optimizer, config.optimizer.learning_rate * rate)
        optimizer.step()
    return {"pair": pair, "method": method, "seed": seed, "curve": curve}


def path_of(output: Path, pair: str, method: str, seed: int) -> Path:
    return output / f"{pair}-{re.sub(r'[^a-z0-9]+', '_', method)}-{seed}.json"


def table(output: Path, pair: str) -> str:
    """Means and deviations over the seeds."""
    last = EVAL_AT[-1]
    heads = [
        *(f"bits per byte at {step}" for step in EVAL_AT),
        "digits at 0",
        f"at {last}",
        "indents at 0",
        f"at {last}",
    ]
    lines = ["| initialiser | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    rows = []
    for method in [*METHODS, *PEERS, *ITSELF]:
        paths = sorted(output.glob(path_of(output, pair, method, 0).name.replace("-0.json", "-[0-9].json")))
        curves = [json.loads(path.read_text())["curve"] for path in paths]
        if not curves:
            continue
        bits = [spread([curve[str(step)][0] for curve in curves]) for step in EVAL_AT]
        probes = [share([curve[str(step)][which] for curve in curves]) for which in (1, 2) for step in (0, last)]
        order = statistics.mean(curve["200"][0] for curve in curves)
        rows.append((order, f"| {method} ({len(curves)}) | " + " | ".join([*bits, *probes]) + " |"))
    return "\n".join([*lines, *(line for _, line in sorted(rows))])


def spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {deviation:.3f}"


def share(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{100 * statistics.mean(known):.0f} %" if known else "–"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/initializers"))
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS))
    parser.add_argument("--methods", nargs="+", default=[*METHODS, *PEERS, *ITSELF])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    for pair in options.pairs if options.table else []:
        print(f"{pair}\n\n{table(options.output, pair)}\n")
    if options.table:
        return
    for seed in options.seeds:
        for pair in options.pairs:
            for method in options.methods:
                path = path_of(options.output, pair, method, seed)
                if path.exists():
                    continue
                found = run(pair, method, seed)
                path.with_suffix(".tmp").write_text(json.dumps(found))
                path.with_suffix(".tmp").rename(path)
                print(pair, method, seed, {step: round(v[0], 3) for step, v in found["curve"].items()}, flush=True)


if __name__ == "__main__":
    main()
