"""Which pins of a learned tokenizer are worth their ids on counted text, and what becomes of the ids of the others."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from tokenkit.tokenizers.autoencoder.chunkers import to_text
from tokenkit.tokenizers.autoencoder.codec import Codec
from tokenkit.tokenizers.autoencoder.package import Package
from tokenkit.tokenizers.autoencoder.pins import PinTable, spelling_length

By = Literal["saving", "frequency"]
SHRINK = 0.65  # share of the pins that survives a round of pruning by saving


def prune_pins(package: Package, chunks: Mapping[bytes, int], top_k: int, *, by: By, min_count: int) -> PinTable:
    """At most `top_k` of a package's pins, each used `min_count` times or more, with their uses on these chunks.

    By saving, a pin is worth its uses times the ids that its best other spelling takes beyond one; since that hangs on
    the pins that are left, they are let go in rounds. By frequency, its uses are what it is worth.
    """
    table = recounted(package, chunks)
    while True:
        left = [(piece, count) for piece, count in zip(table.pieces, table.counts) if count >= min_count]
        enough = len(left) <= top_k
        if enough and len(left) == len(table):
            return table
        target = len(left) if enough else top_k if by == "frequency" else max(top_k, int(len(left) * SHRINK))
        if by == "saving" and not enough:
            gains = _gains(table, left)
            left.sort(key=lambda item: (-gains[item[0]], item[0]))
        kept = {piece for piece, _ in left[:target]}
        table = recounted(replace(package, pins=only(table, kept)), chunks)


def recounted(package: Package, chunks: Mapping[bytes, int]) -> PinTable:
    """The pins of a package with their uses, and those of the bytes, on these chunks; the most used first.

    Codes are kept.
    """
    pins, codec = package.pins, replace(package, warm={}).codec("compact")
    uses: Counter[int] = Counter()
    for chunk, count in chunks.items():
        for index in codec.spell(to_text(chunk)):
            uses[index] += count
    base, layout = codec.layout.byte_base, codec.layout
    counted = {piece: uses[layout.pin_base + place] for place, piece in enumerate(pins.pieces)}
    order = sorted(range(len(pins)), key=lambda place: (-counted[pins.pieces[place]], pins.pieces[place]))
    return PinTable(
        tuple(pins.pieces[place] for place in order),
        tuple(counted[pins.pieces[place]] for place in order),
        tuple(uses[base + byte] for byte in range(256)),
        tuple(pins.digits[place] for place in order) if pins.digits else (),
    )


def only(pins: PinTable, kept: Iterable[bytes]) -> PinTable:
    """The table without the pins that are not kept, in its order."""
    wanted = {*kept}
    rows = [place for place, piece in enumerate(pins.pieces) if piece in wanted]
    digits = tuple(pins.digits[row] for row in rows) if pins.digits else ()
    return PinTable(
        tuple(pins.pieces[row] for row in rows), tuple(pins.counts[row] for row in rows), pins.byte_counts, digits
    )


def _gains(table: PinTable, pieces: Sequence[tuple[bytes, int]]) -> dict[bytes, int]:
    costs, longest = dict.fromkeys(table.pieces, 1), table.longest
    return {piece: count * (spelling_length(piece, costs, longest, without=piece) - 1) for piece, count in pieces}


def id_mapping(old: Codec, new: Codec) -> dict[str, Any]:
    """`kept`: old id → new id, specials, bytes and pins; `spelled`: old id → the new ids of a pin that is gone.

    `open` are the old and the new first id of the codes, whose order never changes, where both tokenizers have them.
    """
    layout, ids = old.layout, {piece: new.layout.pin_base + place for place, piece in enumerate(new.pins.pieces)}
    kept = {index: index for index in range(layout.pin_base)}
    spelled: dict[int, list[int]] = {}
    for place, piece in enumerate(old.pins.pieces):
        if piece in ids:
            kept[layout.pin_base + place] = ids[piece]
        else:
            spelled[layout.pin_base + place] = [*new.spell_piece(piece)]
    both = layout.num_codes and new.layout.num_codes == layout.num_codes
    return {
        "old_vocab_size": layout.vocab_size,
        "new_vocab_size": new.layout.vocab_size,
        "kept": {str(index): other for index, other in kept.items()},
        "spelled": {str(index): others for index, others in spelled.items()},
        "open": [layout.open_base, new.layout.open_base] if both else None,
    }


@dataclass(frozen=True)
class Coverage:
    """What counted text costs without codes."""

    tokens_per_byte: float
    whole: float
    """Share of the chunks that one id spells."""


def compact_coverage(package: Package, chunks: Mapping[bytes, int]) -> Coverage:
    """Of the pins and bytes of a package."""
    codec = replace(package, warm={}).codec("compact")
    lengths = {chunk: len(codec.spell(to_text(chunk))) for chunk in chunks}
    tokens = sum(lengths[chunk] * count for chunk, count in chunks.items())
    num_bytes = sum(len(chunk) * count for chunk, count in chunks.items())
    whole = sum(count for chunk, count in chunks.items() if lengths[chunk] == 1)
    return Coverage(tokens / max(1, num_bytes), whole / max(1, sum(chunks.values())))
