"""Special tokens of a target by what they are for: roles first, then literals, then the text of the literal."""

from collections.abc import Iterator
from typing import Literal

from tokenkit.config import UserError
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.tokenizers.chat import roles_of
from tokenkit.tokenizers.roles import Roles
from tokenkit.transfer.spelling import Speller

Side = Literal["input", "head"]


def role_sources(source: Tokenizer, target: Tokenizer, vocab: int, side: Side) -> dict[int, int]:
    """The source id for each target token with a role. Of two roles, input takes bos first and head takes eos first."""
    bos, eos, pad = (i if i is not None and i < vocab else None for i in (source.bos_id, source.eos_id, source.pad_id))
    # A target without bos begins texts with eos (`Tokenizer.start_id()`), so that token plays both roles.
    begin = target.eos_id if target.bos_id is None else target.bos_id
    ranked = [(begin, (bos, eos)), (target.eos_id, (eos, bos))]
    ranked = [*(ranked if side == "input" else reversed(ranked)), (target.pad_id, (pad, eos, bos))]
    found: dict[int, int] = {}
    for wanted, choices in ranked:
        choice = next((i for i in choices if i is not None), None)
        if wanted in target.special_ids and choice is not None:
            found.setdefault(wanted, choice)
    return found


def special_pieces(source: Tokenizer, target: Tokenizer, spell: Speller) -> dict[int, list[int]]:
    """Source ids for each special target token: the same special token, else what has its part in conversations, else
    the pieces of its text."""
    turns = dict(_turn_sources(source, target, spell))
    split = spell.split([literal.encode() for literal in target.special_tokens])
    found: dict[int, list[int]] = {}
    for (literal, i), (_, pieces) in zip(target.special_tokens.items(), split, strict=True):
        same = source.special_tokens.get(literal, spell.vocab)
        found[i] = [same] if same < spell.vocab else turns.get(i, pieces)
    return found


def _turn_sources(source: Tokenizer, target: Tokenizer, spell: Speller) -> Iterator[tuple[int, list[int]]]:
    """Source ids for the special tokens that begin, head and end the turns of the target's conversations."""
    try:
        ours, theirs = roles_of(source), roles_of(target)
    except UserError:  # a template that writes no plain turns
        return
    for wanted, text in zip(_turns(theirs), _turns(ours), strict=True):
        i = target.special_tokens.get(wanted.strip())
        if i is None or not text:
            continue
        known = source.special_tokens.get(text.strip())
        pieces = [known] if known is not None and known < spell.vocab else spell.split([text.encode()])[0][1]
        if pieces:
            yield i, pieces


def _turns(roles: Roles) -> tuple[str, str, str]:
    return roles.start_header, roles.end_header, roles.eot
