"""What every row of a transferred model was made of, as a table: a line per token and side."""

from collections.abc import Iterator, Mapping

import numpy as np

from tokenkit.tokenizers.base import Tokenizer
from tokenkit.transfer.initialize import RowMaker
from tokenkit.transfer.mixture import Mixture, Origin
from tokenkit.transfer.plan import Side

FILE = "transfer_rows.tsv"
HEADER = "id\ttoken\tside\torigin\tsources"
SHOWN = 8  # source rows per line, the heaviest first

Columns = tuple[str, str]


def rows_table(makers: Mapping[Side, RowMaker], source: Tokenizer, target: Tokenizer) -> Iterator[str]:
    """The lines of the table. Bytes are escaped, spaces too; a source is `id:weight:token`. Lines of both sides that
    are alike are one."""
    yield HEADER
    names = _escaped(target)
    columns = {side: _columns(maker, _escaped(source)) for side, maker in makers.items()}
    if len(columns) == 1:
        both = next(iter(columns.values()))
        yield from (_line(i, name, "both", one) for i, (name, one) in enumerate(zip(names, both, strict=True)))
        return
    for i, (name, one, other) in enumerate(zip(names, columns["input"], columns["head"], strict=True)):
        if one == other:
            yield _line(i, name, "both", one)
        else:
            yield _line(i, name, "input", one)
            yield _line(i, name, "head", other)


def _line(i: int, name: str, side: str, columns: Columns) -> str:
    return f"{i}\t{name}\t{side}\t{columns[0]}\t{columns[1]}"


def _columns(maker: RowMaker, names: list[str]) -> Iterator[Columns]:
    """The origin of every row, and its sources where the rows are sums of source rows."""
    words = [origin.name.lower() for origin in Origin]
    origins = [words[one] for one in maker.origin.tolist()]
    if not isinstance(maker, Mixture):
        yield from ((origin, "") for origin in origins)
        return
    ids, weights, offsets = maker.ids.tolist(), maker.weights.tolist(), maker.offsets.tolist()
    for i, origin in enumerate(origins):
        begin, end = offsets[i], offsets[i + 1]
        places = range(begin, end)
        if end - begin > SHOWN:
            places = (begin + np.argsort(-np.abs(maker.weights[begin:end]), kind="stable")[:SHOWN]).tolist()
        yield origin, " ".join(f"{ids[p]}:{weights[p]:.4g}:{names[ids[p]]}" for p in places)


def _escaped(tokenizer: Tokenizer) -> list[str]:
    """A token per id as printable ASCII without spaces; of a special token its literal."""
    literals = {i: literal.encode() for literal, i in tokenizer.special_tokens.items()}
    spelled = (literals.get(i, spelling) for i, spelling in enumerate(tokenizer.token_bytes))
    return [repr(spelling)[2:-1].replace(" ", "\\x20") for spelling in spelled]
