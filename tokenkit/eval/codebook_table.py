"""What every id of a learned tokenizer stands for, and how often: the rows of `codebook.csv`, and the vocabulary."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokenkit.eval.id_usage import Spelled, Usage
from tokenkit.tokenizers.autoencoder.codec import Codec


@dataclass(frozen=True)
class Row:
    """A byte, a pin, or a run of codes that spelled a string; unused pins and bytes come last, with a count of 0."""

    rank: int
    ids: tuple[int, ...]
    tier: str
    count: int
    share: float
    """Of all ids of the text."""
    cumulative_share: float
    string: bytes
    codes: tuple[tuple[int, ...], ...]
    """Digits of each code; () where a string has none."""


def codebook_rows(codec: Codec, usage: Usage, spelled: Spelled) -> Iterator[Row]:
    """The most used first, as often used ones by id."""
    layout = codec.layout
    counts: Counter[tuple[int, ...]] = Counter({(index,): 0 for index in range(layout.byte_base, layout.open_base)})
    fixed = usage.ids < layout.open_base
    counts.update({(i,): n for i, n in zip(usage.ids[fixed].tolist(), usage.counts[fixed].tolist())})
    runs = _runs(spelled)
    counts.update(runs)
    strings = dict(zip(runs, _spelled_by(codec, list(runs))))
    course = 0
    for rank, (ids, count) in enumerate(sorted(counts.items(), key=lambda item: (-item[1], item[0])), 1):
        share = count * len(ids) / max(1, usage.tokens)
        course += count * len(ids)
        string = strings[ids] if ids in strings else codec.fixed_bytes[ids[0]]
        codes = _codes_of(codec, ids)
        yield Row(rank, ids, layout.tier(ids[0]), count, share, course / max(1, usage.tokens), string, codes)


def vocabulary(codec: Codec) -> list[dict[str, Any]]:
    """Every byte and pin: id, tier, text (None where it is no UTF-8), hexadecimal bytes, and its code if it has one."""
    layout, found = codec.layout, []
    for index in range(layout.byte_base, layout.open_base):
        string = codec.fixed_bytes[index]
        entry: dict[str, Any] = {"id": index, "tier": layout.tier(index), "text": _text(string), "hex": string.hex()}
        if layout.tier(index) == "pin" and codec.pins.digits:
            entry["code"] = [*codec.pins.digits[index - layout.pin_base]]
        found.append(entry)
    return found


def _text(string: bytes) -> str | None:
    try:
        return string.decode()
    except UnicodeDecodeError:
        return None


def _runs(spelled: Spelled) -> Mapping[tuple[int, ...], int]:
    """How often each run of codes was used."""
    layout, found = spelled.layout, Counter[tuple[int, ...]]()
    if not layout.num_codes:
        return found
    is_open = spelled.ids >= layout.open_base
    is_last = spelled.ids >= layout.open_base + layout.num_codes
    uses = np.repeat(spelled.table.counts, spelled.lengths)
    run: list[int] = []
    for place in np.flatnonzero(is_open):
        run.append(int(spelled.ids[place]))
        if is_last[place]:
            found[tuple(run)] += int(uses[place])
            run = []
    return found


def _spelled_by(codec: Codec, runs: Sequence[tuple[int, ...]]) -> list[bytes]:
    """The string of each run of codes; the network reads all of them at once."""
    strings = codec.token_strings([index for run in runs for index in run])
    ends = np.cumsum([len(run) for run in runs], dtype=np.int64)
    return [strings[end - 1] for end in ends]


def _codes_of(codec: Codec, ids: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    layout = codec.layout
    if codec.open_codes is not None and layout.is_open(ids[0]):
        numbers = [(index - layout.open_base) % layout.num_codes for index in ids]
        return tuple(map(tuple, codec.open_codes.network.quantizer.token_id_to_code(numbers)))
    if codec.pins.digits and ids[0] >= layout.pin_base:
        return (tuple(codec.pins.digits[ids[0] - layout.pin_base]),)
    return ()
