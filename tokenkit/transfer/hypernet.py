"""Rows that a trained hypernetwork makes of the pieces of each token. Minixhofer+ 2024, 2405.07883."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from numpy import ndarray
from torch import Tensor

from tokenkit.config import UserError
from tokenkit.models.hypernet import Hypernet
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.transfer import initializer
from tokenkit.transfer.mixture import Mixture, Origin, pieces_mixture, ranges
from tokenkit.transfer.plan import TransferPlan
from tokenkit.transfer.rows import Rows
from tokenkit.transfer.specials import Side
from tokenkit.transfer.spelling import Speller

TOGETHER = 4096  # tokens that go through the network at once


@dataclass(frozen=True, eq=False)
class Predicted:
    """Rows of the free target ids from a network, all others from the chain."""

    chain: Mixture
    network: Hypernet
    gather: Callable[[Tensor], Float[Tensor, "N K D"]]
    """Rows of ids of the source in every matrix that the network reads; ids beyond them are bytes."""
    matrix: int
    """Which of those is made here."""
    forms: Int64[ndarray, "F L"]
    lengths: Int64[ndarray, "F"]
    place: Int64[ndarray, "W"]
    """Of each target id among the forms; -1: the chain makes it."""

    @property
    def origin(self) -> UInt8[ndarray, "W"]:
        """The `Origin` of each row."""
        return np.where(self.place >= 0, np.uint8(Origin.INITIALIZER), self.chain.origin)

    def __len__(self) -> int:
        return len(self.place)

    @torch.no_grad()
    def __call__(self, wanted: Int64[ndarray, "N"]) -> Float[Tensor, "N D"]:
        """The rows of these target ids, in at least float32."""
        rows = self.chain(wanted)
        chosen = np.flatnonzero(self.place[wanted] >= 0)
        for some in np.array_split(chosen, -(-len(chosen) // TOGETHER) or 1):
            if len(some):
                at = self.place[wanted[some]]
                made = self.network.rows(
                    self.gather, torch.from_numpy(self.forms[at]), torch.from_numpy(self.lengths[at])
                )
                rows[torch.from_numpy(some)] = made[:, self.matrix].to(rows)
        return rows


@initializer(copies=True)
def hypernet(
    source: Rows,
    plan: TransferPlan,
    hypernet: Path,
    matrices: Mapping[Side, Rows],
    source_tokenizer: Tokenizer,
    target_tokenizer: Tokenizer,
    *,
    side: Side,
    seed: int = 0,
) -> Predicted:
    """What a network that `tokenkit train-hypernet` trained for this model makes of a token's pieces."""
    network, facts = Hypernet.load(hypernet)
    own = facts.get("source_tokenizer")
    if own is not None and own != source_tokenizer.fingerprint:
        raise UserError(
            f"transfer.hypernet: {hypernet} was trained for {facts['model']}, whose tokenizer is another than "
            f"{source_tokenizer.name}; train one for this model"
        )
    read = [source] if network.matrices == 1 else [matrices["input"], matrices["head"]] if len(matrices) == 2 else []
    if not read or (network.matrices == 1 and len(matrices) == 2):
        raise UserError(
            f"transfer.hypernet: {hypernet} makes rows of {network.matrices} matrices, and this model has "
            f"{len(matrices) or 1}; train one for this model"
        )
    return predicted(network, source, read, plan, source_tokenizer, target_tokenizer, side=side, seed=seed)


def predicted(
    network: Hypernet,
    source: Rows,
    read: Sequence[Rows],
    plan: TransferPlan,
    source_tokenizer: Tokenizer,
    target_tokenizer: Tokenizer,
    *,
    side: Side,
    seed: int = 0,
) -> Predicted:
    """The rows of `side` from a network in memory that reads these matrices; UserError where they do not fit it."""
    if source.shape[1] != network.width:
        raise UserError(
            f"transfer.hypernet: makes rows of {network.width} channels, and the model's have {source.shape[1]}; train "
            "one for this model"
        )
    longest = network.config.max_seq_length
    free = plan.free
    lengths = np.minimum(plan.lengths[free], longest)
    forms = np.zeros((len(free), longest), np.int64)
    inside = np.arange(longest) < lengths[:, None]
    forms[inside] = plan.pieces[ranges(plan.offsets[:-1][free], lengths)]
    drawn = np.flatnonzero(lengths == 0)
    if len(drawn):
        spell = Speller(source_tokenizer, plan.source_vocab)
        spellings = [target_tokenizer.token_bytes[i] for i in free[drawn].tolist()]
        forms[drawn], lengths[drawn] = surface_forms(spell, spellings, longest)
    place = np.full(len(plan), -1, np.int64)
    place[free] = np.arange(len(free))
    network = network.to(torch.promote_types(source.dtype, torch.float32))
    chain = pieces_mixture(source, plan, side, seed=seed)
    matrix = 0 if network.matrices == 1 or side == "input" else 1
    return Predicted(chain, network, gathering(network, read, plan.source_vocab), matrix, forms, lengths, place)


def gathering(network: Hypernet, read: Sequence[Rows], vocab: int) -> Callable[[Tensor], Float[Tensor, "N K D"]]:
    """A function from ids to their rows in all matrices: below `vocab` the source's, above the network's of bytes."""

    def gather(ids: Tensor) -> Tensor:
        known = ids.clamp_max(vocab - 1).numpy()
        rows = torch.stack([rows.gather(known).to(network.byte_rows) for rows in read], 1)
        beyond = ids >= vocab
        if beyond.any():
            rows[beyond] = network.byte_rows[ids[beyond] - vocab]
        return rows

    return gather


def surface_forms(
    spell: Speller, spellings: Sequence[bytes], longest: int
) -> tuple[Int64[ndarray, "N L"], Int64[ndarray, "N"]]:
    """Ids of the first `longest` pieces of each byte string, and their number; `vocab + byte` where none spells it."""
    pieces = spell.split(list(spellings))
    forms, lengths = np.zeros((len(pieces), longest), np.int64), np.zeros(len(pieces), np.int64)
    for row, (spelling, (_, ids)) in enumerate(zip(spellings, pieces, strict=True)):
        whole = spell.by_bytes.get(spelling)
        found = ([whole] if whole is not None else ids or spell.cut(spelling))[:longest]
        forms[row, : len(found)], lengths[row] = found, len(found)
    return forms, lengths
