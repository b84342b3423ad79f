"""Ensembles of stories260K and of short transfers of it: bits per byte beside each member's, and what they cost.

A real pretrained model and real text, from the shared data folder. Makes what is not there yet (four short transfers),
then prints three Markdown tables. Every text is short enough to be read whole, so all figures have the same context.
Usage: nice python benchmarks/ensembles.py [--steps 200] [--documents 8] [--output FOLDER]
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from tokenkit.align.vocabulary import map_vocabulary
from tokenkit.config import load
from tokenkit.data.source import SourceConfig, read_documents
from tokenkit.eval.bits_per_byte import EvalConfig, bits_per_byte
from tokenkit.eval.byte_ensemble import byte_distributions, byte_windows, score_bytes
from tokenkit.eval.combine import Combination
from tokenkit.eval.ensemble import Ensemble, Member
from tokenkit.eval.next_byte import ByteModel, CoverConfig
from tokenkit.eval.vocabulary_union import mined_slots, shared_slots
from tokenkit.models.view import ModelView
from tokenkit.tokenizers.train import train_tokenizer
from tokenkit.train.folder import RUN_FILE
from tokenkit.verbs.distill import distill
from tokenkit.verbs.distill_run import DistillRun
from tokenkit.verbs.model import ModelChoice, load_pair

ROOT = Path(__file__).parents[1]
RUN = ROOT / "runs" / "distill" / "stories260k_to_gpt2.yaml"
DATA = ROOT.parent / "shared" / "data"
TRAIN, VALID = (DATA / "corpora" / "tinystories" / f"{name}.txt" for name in ("train", "valid"))
BYTES = 480  # of a text; with the start token no more tokens than the model has positions


def transferred(name: str, target: str, words: Sequence[str], steps: int, folder: Path) -> Path:
    """The model folder of one short transfer, made now or found finished."""
    output = folder / name
    if not (output / "results.json").is_file():
        short = [f"output={output}", f"target_tokenizer={target}", f"train.steps={steps}", f"train.eval_at=[{steps}]"]
        run = load(DistillRun, [str(RUN), *short, *words])
        distill(run, resume=(output / RUN_FILE).is_file(), quiet=True)
    return output / "model"


def trained(kind: Literal["bpe", "unigram"], size: int, folder: Path) -> str:
    """The folder of a tokenizer of the training text, made now or found finished."""
    path = folder / f"{kind}_{size}"
    if not path.is_dir():
        train_tokenizer(read_documents(SourceConfig(path=str(TRAIN), max_bytes=1 << 20)), kind, size).save(path)
    return str(path)


def members(steps: int, folder: Path) -> dict[str, Member]:
    """stories260K and its transfers, by name."""
    bpe, unigram = (trained(kind, size, folder) for kind, size in (("bpe", 4096), ("unigram", 2048)))
    sources = {
        "stories260K": DATA / "weights" / "stories260K",
        "bpe, ALM": transferred("bpe", bpe, [], steps, folder),
        "bpe, CLM": transferred("bpe_clm", bpe, ["losses.alm=null", "losses.clm={}"], steps, folder),
        "unigram": transferred("unigram", unigram, [], steps, folder),
        "byte": transferred("byte", "byte", [], steps, folder),
    }
    found = {}
    for name, source in sources.items():
        model, tokenizer = load_pair(ModelChoice(source=str(source)), "cpu")
        found[name] = Member(ModelView(model.eval()), tokenizer)
    return found


def timed(what: Callable[[], Any]) -> tuple[Any, float]:
    """A result and the CPU seconds it took."""
    start = time.process_time()
    return what(), time.process_time() - start


def row(*cells: object) -> None:
    """Prints a row of a table."""
    print("| " + " | ".join(f"{c:.4f}" if isinstance(c, float) else str(c) for c in cells) + " |", flush=True)


def covers_table(side: dict[str, Member], documents: list[str]) -> None:
    """What each model says of bytes, by the covers that are followed, and the seconds per kilobyte."""
    num_kb = sum(len(d.encode()) for d in documents) / 1000
    row(
        "model",
        "tokens",
        "s/kB",
        *(f"{name} | dropped | s/kB" for name in ("canonical", "beam 1", "beam 8", "beam 32")),
    )
    row(*["---"] * 15)
    for name, member in side.items():
        plain, seconds = timed(lambda member=member: bits_per_byte(member.view, member.tokenizer, documents))
        cells: list[object] = [name, plain.value, seconds / num_kb]
        for config in (
            CoverConfig(beam=1, threshold=0, canonical=True),
            CoverConfig(beam=1, threshold=0),
            CoverConfig(),
            CoverConfig(beam=32, threshold=1e-6),
        ):
            model = ByteModel(member.view.model, member.tokenizer, config)
            (_, own), seconds = timed(lambda model=model: score_bytes([model], Combination("mean_prob", 1), documents))
            cells += [own[0].bits_per_byte, f"{own[0].dropped:.1e}", seconds / num_kb]
        row(*cells)


def byte_table(side: dict[str, Member], documents: list[str]) -> None:
    """Ensembles over bytes."""
    models = {name: ByteModel(m.view.model, m.tokenizer, CoverConfig()) for name, m in side.items()}
    row("members", "each alone", "mean_prob", "mean_logp")
    row(*["---"] * 4)
    groups = [
        ["bpe, ALM", "bpe, CLM"],
        ["bpe, ALM", "unigram"],
        ["bpe, ALM", "unigram", "byte"],
        ["stories260K", "bpe, ALM"],
        ["stories260K", "bpe, ALM", "unigram", "byte"],
    ]
    windows = [window for document in documents for window in byte_windows(document, 512)]
    for group in groups:
        combined = [Combination(how, len(group)) for how in ("mean_prob", "mean_logp")]
        nats, count = np.zeros(2 + len(group)), 0
        for place in byte_distributions([models[name] for name in group], windows):
            members = [torch.from_numpy(logp) for logp in place.logp]
            wanted = torch.from_numpy(place.wanted)[:, None]
            nats -= [one.gather(1, wanted).sum().item() for one in (*(c(members) for c in combined), *members)]
            count += len(wanted)
        bits = [float(value) for value in nats / math.log(2) / count]
        row(" + ".join(group), ", ".join(f"{one:.4f}" for one in bits[2:]), *bits[:2])


def token_table(side: dict[str, Member], documents: list[str]) -> None:
    """Ensembles over tokens: one vocabulary, and one through a token map."""
    config = EvalConfig(source=SourceConfig(path=str(VALID)))
    row("members", "mode", "each alone", "mean_prob", "mean_logp")
    row(*["---"] * 5)
    for group, mapped in (
        (["bpe, ALM", "bpe, CLM"], False),
        (["bpe, ALM", "unigram"], True),
        (["unigram", "bpe, ALM"], True),
        (["stories260K", "bpe, ALM"], True),
    ):
        some = [side[name] for name in group]
        sides = [m.tokenizer for m in some]
        about = sides, [m.view.vocab_rows for m in some], [m.ends for m in some]
        slots = mined_slots(*about, [map_vocabulary("mined", sides[0], sides[1])]) if mapped else shared_slots(*about)
        alone = ", ".join(f"{bits_per_byte(m.view, m.tokenizer, documents).value:.4f}" for m in some)
        values = [
            Ensemble(some, slots, Combination(how, 2), mapped=mapped).bits_per_byte(documents, config).value
            for how in ("mean_prob", "mean_logp")
        ]
        row(" + ".join(group), "mined" if mapped else "tokens", alone, *values)


def main() -> None:
    """Makes the models, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("outputs/ensembles"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    side = members(arguments.steps, arguments.output)
    whole = read_documents(SourceConfig(path=str(VALID), separator=r"\n\n(?=Once upon a time|One day)"))
    documents = [text.encode()[:BYTES].decode(errors="ignore") for text in whole[: arguments.documents]]
    for table in (token_table, byte_table, covers_table):
        print(f"\n{table.__doc__}\n")
        table(side, documents)


if __name__ == "__main__":
    main()
