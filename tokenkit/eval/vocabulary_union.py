"""One list of slots that several vocabularies fill with ids of their own: what a token-level ensemble chooses among."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tokenkit.align.vocabulary import NONE, TokenMap, ids_in_use
from tokenkit.config import UserError
from tokenkit.tokenizers.base import Tokenizer


@dataclass(frozen=True, eq=False)
class Slots:
    """Per model the id of every slot, -1 where it has none; behind them one more slot, the end of the text."""

    ids: Int64[Tensor, "K S"]
    ends: list[list[int]]
    """Per model the ids that end a text; their mass is the end's."""
    spelled: list[bytes]
    """What the slots write; empty for a special token, which can be scored and is never drawn."""
    slot_of: Int64[Tensor, "V"]
    """Slot of every id of the first model, -1 for those that are no token of the ensemble."""

    @property
    def end(self) -> int:
        """The slot of the end of the text, behind those of all tokens."""
        return len(self.spelled)

    def logp(self, model: int, logits: Float[Tensor, "N V"]) -> Float[Tensor, "N T"]:
        """One model's log-probabilities over the slots and the end. Absent slots, and ids in no slot, have no mass.

        An ordinary token that ends a text of this model has its mass there, and none as a token.
        """
        ids, own = (
            self.ids[model].to(logits.device),
            torch.tensor(self.ends[model], dtype=torch.long, device=logits.device),
        )
        absent = logits.new_full((len(logits), 1), -torch.inf)
        ends = torch.cat([logits[:, own], absent], 1).logsumexp(1, keepdim=True)
        logits = torch.cat([logits.index_fill(1, own, -torch.inf), absent], 1)
        found = logits[:, torch.where(ids < 0, logits.shape[1] - 1, ids)]
        return torch.cat([found, ends], 1).log_softmax(-1)

    def silent(self) -> tuple[int, ...]:
        """Slots that are never drawn: they write nothing, or some model has no id to read for them."""
        absent = (self.ids < 0).any(0).tolist()
        return tuple(slot for slot, spelling in enumerate(self.spelled) if not spelling or absent[slot])


def shared_slots(tokenizers: Sequence[Tokenizer], rows: Sequence[int], ends: Sequence[list[int]]) -> Slots:
    """The spellings that all have, each with the id that its own tokenizer uses for it.

    Tokenizers of one vocabulary share every id, special tokens and doubled spellings too. `rows` are the logits of each
    model: ids from there on have none.
    """
    first = tokenizers[0]
    own = {i for i, spelling in enumerate(first.token_bytes[: min(rows)]) if spelling}
    if all(_same(first, other) for other in tokenizers[1:]):
        special = {i for i in first.special_ids if i < min(rows)} - {i for some in ends for i in some}
        ids = sorted(own | special)
        return _slots([ids] * len(tokenizers), ends, [first.token_bytes[i] for i in ids], first)
    used = [ids_in_use(tokenizer) for tokenizer in tokenizers]
    spelled = [s for s in used[0] if all(ids.get(s, n) < n for ids, n in zip(used, rows, strict=True))]
    if not spelled:
        raise UserError("models: their vocabularies have no token in common; write mode=byte")
    return _slots([[ids[s] for s in spelled] for ids in used], ends, spelled, first)


def mined_slots(
    tokenizers: Sequence[Tokenizer], rows: Sequence[int], ends: Sequence[list[int]], maps: Sequence[TokenMap]
) -> Slots:
    """The tokens of the first model; the others have the ids that a token map gives for them, a map for each."""
    first = tokenizers[0]
    own = [i for i, spelling in enumerate(first.token_bytes[: rows[0]]) if spelling]
    ids = [own] + [[int(found.teacher_id[i]) for i in own] for found in maps]
    present = [[i if i < n else NONE for i in some] for some, n in zip(ids, rows, strict=True)]
    return _slots(present, ends, [first.token_bytes[i] for i in own], first)


def _slots(ids: list[list[int]], ends: Sequence[list[int]], spelled: list[bytes], first: Tokenizer) -> Slots:
    place = {spelling: slot for slot, spelling in enumerate(spelled)}
    slot_of = torch.tensor([place.get(spelling, NONE) if spelling else NONE for spelling in first.token_bytes])
    slot_of[torch.tensor(ids[0])] = torch.arange(len(spelled))  # a doubled spelling that has slots of its own
    return Slots(torch.tensor(ids), [list(some) for some in ends], spelled, slot_of)


def _same(first: Tokenizer, other: Tokenizer) -> bool:
    return first.token_bytes == other.token_bytes and first.special_tokens == other.special_tokens
