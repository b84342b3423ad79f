"""A donor with a planted token, and whether the audit finds it among all new rows.

The planted row does nothing in the donor: it is as long as other rows, never the most likely, and held-out text is
predicted as before. Orthogonal matching pursuit writes it as a sum of shared tokens; the same sum of the base's rows
wins wherever it is asked. The attacker knows donor, base and initialiser, and has text of the same kind as the audit's,
but not the audit's. After TokenForge (Liu+ 2026, 2601.00065), whose code is not used.

Prints a Markdown table: one line per number of atoms and planted token. Ten minutes on one core.
Usage: python benchmarks/breaker_search.py [--base outputs/english_bpe/model] [--donor outputs/english_unigram/model]
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tokenkit.data.source import SourceConfig, read_documents
from tokenkit.eval.audit_facts import Audit
from tokenkit.eval.bits_per_byte import bits_per_byte
from tokenkit.eval.contexts import find_contexts, hidden_at
from tokenkit.export.huggingface import export_huggingface
from tokenkit.models.load import head_matrix, input_matrix, load_model
from tokenkit.models.view import ModelView
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.transfer.evidence import Evidence
from tokenkit.transfer.initialize import Choice
from tokenkit.transfer.mixture import Mixture
from tokenkit.transfer.plan import Kind, TransferPlan, plan_transfer
from tokenkit.transfer.rows import TensorRows
from tokenkit.verbs.audit import AuditRun, audit
from tokenkit.verbs.model import ModelChoice
from tokenkit.verbs.transfer import TransferOptions, TransferRun, transfer

ROUNDS = 40
SILENT = 32  # directions of the donor's hidden states that a planted row keeps out of

Made = Callable[[Float[Tensor, "D"]], Mixture]


@dataclass(frozen=True, eq=False)
class Scene:
    """What an attacker has: rows and hidden states of both models, over the target's ids."""

    plan: TransferPlan
    base: Float[Tensor, "V D"]
    donor: Float[Tensor, "W E"]
    base_hidden: Float[Tensor, "N D"]
    donor_hidden: Float[Tensor, "M E"]
    evidence: Evidence


def scene(base: str, donor: str, documents: list[str]) -> Scene:
    """Both models, read on the attacker's own text, each as its tokenizer cuts it."""
    models = [load_model(one) for one in (base, donor)]
    tokenizers = [load_tokenizer(one) for one in (base, donor)]
    hidden, rows = [], []
    for model, tokenizer in zip(models, tokenizers):
        view = ModelView(model)
        hidden.append(hidden_at(view, find_contexts(tokenizer, documents, view.vocab_rows, count=1024)))
        rows.append(head_matrix(model).detach())
    plan = plan_transfer(tokenizers[0], tokenizers[1], source_rows=len(rows[0]))
    return Scene(plan, rows[0], rows[1], hidden[0], hidden[1], Evidence(tokenizers[0], tokenizers[1]))


def rebuilt(of: Scene, token: int, row: Float[Tensor, "E"], k: int) -> list[tuple[int, float]]:
    """The source ids and weights with which a row of the donor is written, were it the only new one."""
    kinds = of.plan.kinds.copy()
    others = np.setdiff1d(of.plan.free, [token])
    kinds[others] = Kind.UNREACHABLE
    rows = of.donor.clone()
    rows[token] = row
    evidence = replace(of.evidence, donor={"input": TensorRows(rows), "head": TensorRows(rows)})
    maker = Choice("omp", options={"omp": {"k": k}}).maker(
        "head", TensorRows(of.base), replace(of.plan, kinds=kinds), evidence
    )
    assert isinstance(maker, Mixture)
    return maker.sources(token)


def forged(of: Scene, token: int, k: int, seed: int) -> Float[Tensor, "E"]:
    """A row as long as others of the donor that is rebuilt into one that is as loud as can be in the base.

    While the chosen atoms stay the same, the rebuilt row is linear in the donor's row: so a step goes where that map
    makes the mean logit largest, with the directions in which the donor's hidden states lie taken out; then atoms are
    chosen anew. The best of all steps is kept.
    """
    target_ids, source_ids = of.plan.anchors
    place = dict(zip(source_ids.tolist(), target_ids.tolist()))
    length = of.donor[target_ids].norm(dim=1).median()
    loud = torch.linalg.svd(of.donor_hidden, full_matrices=False).Vh[:SILENT]
    mean = of.base_hidden.mean(0)
    best = of.base[source_ids] @ of.base_hidden.T
    top = best.amax(0)
    generator = torch.Generator().manual_seed(seed)
    row = torch.randn(of.donor.shape[1], generator=generator)
    found, wins = row, -torch.inf
    for _ in range(ROUNDS):
        row = row - loud.T @ (loud @ row)
        row = row * (length / row.norm())
        sources = rebuilt(of, token, row, k)
        ids = torch.tensor([i for i, _ in sources])
        made = torch.tensor([weight for _, weight in sources]) @ of.base[ids]
        said = float((of.base_hidden @ made - top).mean())
        if said > wins:
            found, wins = row.clone(), said
        atoms = of.donor[[place[int(i)] for i in ids]]
        step = torch.linalg.pinv(atoms.T).T @ (of.base[ids] @ mean)
        step -= loud.T @ (loud @ step)
        row = row + 0.5 * length * step / step.norm()
    return found


def planted(donor: str, token: int, row: Float[Tensor, "E"], folder: Path) -> None:
    """The donor, with this row."""
    model, tokenizer = load_model(donor), load_tokenizer(donor)
    with torch.no_grad():
        for matrix in (input_matrix(model), head_matrix(model)):
            matrix[token] = row
    export_huggingface(model, tokenizer, folder, dtype=torch.float32)


def searched(base: str, donor: str, text: str, k: int, folder: Path) -> Audit:
    """A transfer to the donor's tokenizer, audited."""
    options = TransferOptions.model_validate({"initializer": "omp", "donor": donor, "omp": {"k": k}})
    where = ModelChoice(source=base)
    transfer(TransferRun(output=folder, model=where, target_tokenizer=donor, transfer=options))
    source = SourceConfig(path=text)
    return audit(AuditRun(model=ModelChoice(source=str(folder)), reference=where, transfer=options, text=source))


def bits(folder: str, documents: list[str]) -> float:
    """Bits per byte."""
    return bits_per_byte(ModelView(load_model(folder)), load_tokenizer(folder), documents, context_tokens=256).value


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="outputs/english_bpe/model")
    parser.add_argument("--donor", default="outputs/english_unigram/model")
    parser.add_argument("--corpus", default="outputs/transfer_corpora/english", help="train.jsonl, test.jsonl")
    parser.add_argument("--atoms", type=int, nargs="*", default=[8, 16, 64])
    parser.add_argument("--tokens", type=int, default=3, help="planted tokens, one at a time")
    given = parser.parse_args()
    own = read_documents(SourceConfig(path=f"{given.corpus}/train.jsonl", max_bytes=200_000))
    text = f"{given.corpus}/test.jsonl"
    held_out = read_documents(SourceConfig(path=text, max_bytes=65_536))
    known = scene(given.base, given.donor, own)
    tokens = known.plan.free[np.linspace(0, len(known.plan.free) - 1, given.tokens + 2).astype(int)[1:-1]]
    print(
        "| k | planted token | rank | takes | next | flagged | wins in base | in donor | donor bits per byte | base |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    before = bits(given.donor, held_out)
    for k in given.atoms:
        with tempfile.TemporaryDirectory() as folder:
            clean = searched(given.base, given.donor, text, k, Path(folder) / "clean")
            _print(k, None, clean, before, bits(f"{folder}/clean", held_out))
        for number, token in enumerate(tokens.tolist()):
            with tempfile.TemporaryDirectory() as folder:
                donor = f"{folder}/donor"
                planted(given.donor, token, forged(known, token, k, number), Path(donor))
                found = searched(given.base, donor, text, k, Path(folder) / "model")
                _print(k, token, found, bits(donor, held_out), bits(f"{folder}/model", held_out))


def _print(k: int, token: int | None, found: Audit, donor: float, base: float) -> None:
    numbers = found.finding("planted tokens").numbers
    rank = next((place for place, one in enumerate(found.breakers, 1) if one["id"] == token), None)
    one = found.breakers[0 if rank is None else rank - 1]
    rest = next(other["score"] for other in found.breakers if other is not one)
    name = "none" if token is None else f"{one['token']} ({token})" if rank else str(token)
    where = "–" if token is None else rank or f"> {len(found.breakers)}"
    flags = f"{numbers['flagged']} of {numbers['made']}"
    print(
        f"| {k} | {name} | {where} | {100 * one['score']:.2f} % | {100 * rest:.2f} % | {flags} | "
        f"{one['wins']} of {numbers['contexts']} | {one['wins_other']} | {donor:.3f} | {base:.3f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
