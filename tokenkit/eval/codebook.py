"""The whole analysis of a learned tokenizer on text, as plain values: what `analysis.json` holds and a page shows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from tokenkit.eval.code_statistics import code_numbers, collisions, digit_masses, entropy_bits, mutual_information
from tokenkit.eval.id_usage import (
    CountedCorpus,
    Spelled,
    Usage,
    by_corpus,
    by_script,
    coverage,
    script_of,
    spell_corpora,
    unused_pins,
    usage_of,
)
from tokenkit.eval.learned import BUCKETS, CELLS, LOGITS, Look, buckets, by_label, digits_of, histogram, look, overall
from tokenkit.eval.neighbours import neighbourhood
from tokenkit.eval.reconstruction import entropy_ratios
from tokenkit.tokenizers.autoencoder.codec import Codec
from tokenkit.tokenizers.autoencoder.package import Kind, Package, PackageConfig

if TYPE_CHECKING:
    from tokenkit.tokenizers.autoencoder.network import AutoEncoder

MOST_POINTS = 200  # of a curve over ranks
COMMONEST = 2000  # strings that the map shows
TOLD = 100  # unused pins that are named


@dataclass(frozen=True)
class Analysis:
    """Plain values for a file and a page, and the tables that they were counted from."""

    values: dict[str, Any]
    codec: Codec
    usage: Usage
    spelled: Spelled

    @property
    def figures(self) -> dict[str, float]:
        """The figures that two analyses are compared by."""
        return self.values["figures"]


@dataclass(frozen=True)
class Placed:
    """Strings that have codes: the text's own through the network, or the pins where there is none."""

    source: str
    strings: tuple[bytes, ...]
    counts: Float[ndarray, "N"]
    weights: Float[ndarray, "N"]
    digits: Int[ndarray, "N G d"]
    levels: tuple[int, ...]

    @property
    def flat(self) -> Int[ndarray, "N D"]:
        """The digits of all groups in a row."""
        return self.digits.reshape(len(self.digits), -1)

    @property
    def all_levels(self) -> list[int]:
        """The levels of these."""
        return [*self.levels] * self.digits.shape[1]


def analyse(
    package: Package,
    corpora: Sequence[CountedCorpus],
    *,
    kind: Kind | None = None,
    training: Mapping[bytes, int] | None = None,
    most: int = 65536,
    seed: int = 0,
) -> Analysis:
    """All quantities. `training` counts strings as the network learnt them; the network looks at `most` at most.

    Without a network the learned part is left out; without placed pins the codes are too.
    """
    codec = package.codec(kind)
    spelled = spell_corpora(codec, corpora)
    usage = usage_of(spelled)
    values: dict[str, Any] = {
        "vocabulary": _vocabulary(package.config, spelled),
        "usage": _usage(usage, spelled, package),
        "corpora": {name: figures.as_json() for name, figures in by_corpus(spelled).items()},
        "scripts": {name: figures.as_json() for name, figures in by_script(spelled).items()},
    }
    network = package.network
    seen = look(network, spelled.table, most, seed) if network is not None else None
    pins = _pins_placed(package, usage, spelled)
    text = pins if seen is None or network is None else _text_placed(seen, network)
    if text is not None:
        values["codes"] = _codes(text, None if network is None else network.quantizer.num_usable)
    if (common := pins or text) is not None:
        values["neighbours"] = _neighbours(common, network, seed)
        values["map"] = _map(common)
    if seen is not None and network is not None:
        values["learned"] = _learned(seen, package.config, training)
    values["figures"] = _figures(values, usage)
    return Analysis(values, codec, usage, spelled)


def shown(string: bytes) -> str:
    """Bytes as text; those that are no UTF-8 as escapes."""
    return string.decode("utf-8", "backslashreplace")


def _vocabulary(config: PackageConfig, spelled: Spelled) -> dict[str, Any]:
    layout = spelled.layout
    return {
        "kind": "open" if layout.num_codes else "compact",
        "chunker": config.chunker,
        "size": layout.vocab_size,
        "special": layout.first_regular_id,
        "bytes": 256,
        "pins": layout.num_pins,
        "open": 2 * layout.num_codes,
    }


def _usage(usage: Usage, spelled: Spelled, package: Package) -> dict[str, Any]:
    layout, counts = spelled.layout, spelled.table.counts
    missing = unused_pins(usage, layout)
    pins = layout.num_pins
    return {
        "tokens": usage.tokens,
        "exposed": usage.exposed,
        "used": len(usage.ids),
        "entropy_bits": usage.entropy_bits,
        "u1": usage.u1,
        "u2": usage.u2,
        "pins_used": 1 - len(missing) / pins if pins else None,
        "unused_pins": len(missing),
        "first_unused": [
            {"id": int(index), "text": shown(package.pins.pieces[index - layout.pin_base])} for index in missing[:TOLD]
        ],
        "distinct_chunks": len(counts),
        "coverage": {str(size): share for size, share in coverage(usage.counts).items()},
        "chunk_coverage": {str(size): share for size, share in coverage(counts).items()},
        "ranks": _ranks(usage.counts),
        "chunk_ranks": _ranks(counts),
    }


def _ranks(counts: Int[ndarray, "N"]) -> list[list[Any]]:
    """(rank, uses, share of all uses up to there) at ranks that are even on a log scale."""
    if not len(counts):
        return []
    ranks = np.unique(np.geomspace(1, len(counts), MOST_POINTS).round().astype(np.int64))
    course = np.cumsum(counts) / max(1, counts.sum())
    return [[int(rank), int(counts[rank - 1]), float(course[rank - 1])] for rank in ranks]


def _text_placed(seen: Look, network: "AutoEncoder") -> Placed:
    levels = tuple(network.quantizer.levels)
    return Placed("text", seen.strings, seen.counts, seen.weights, seen.digits, levels)


def _pins_placed(package: Package, usage: Usage, spelled: Spelled) -> Placed | None:
    """The pins that a network can read, with its codes; without one all of them, where they were placed."""
    network, pins, base = package.network, package.pins, spelled.layout.pin_base
    uses = dict(zip(usage.ids.tolist(), usage.counts.tolist()))
    rows = [i for i, piece in enumerate(pins.pieces) if network is None or len(piece) <= network.max_bytes]
    strings = tuple(pins.pieces[row] for row in rows)
    if not strings or package.config.network is None:
        return None
    if network is not None:
        digits, levels = digits_of(network, strings), network.quantizer.levels
    elif pins.digits:
        digits, levels = (
            np.array([[*code] for code in pins.digits], np.int64)[:, None],
            package.config.network["levels"],
        )
    else:
        return None
    counts = np.array([uses.get(base + row, 0) for row in rows], np.float64)
    return Placed("pins", strings, counts, np.ones(len(rows)), digits, tuple(levels))


def _codes(placed: Placed, usable: int | None) -> dict[str, Any]:
    """How the strings are spread: by group and, for what is shared, for the whole tuple of codes as well."""
    numbers = code_numbers(placed.digits, placed.levels)
    total = int(np.prod(np.array(placed.levels, np.int64)))
    groups = numbers.shape[1]
    levels = [*placed.levels]
    ratios = entropy_ratios(placed.digits, levels, placed.weights)
    by_use = entropy_ratios(placed.digits, levels, placed.counts).tolist() if placed.counts.any() else None
    masses = digit_masses(placed.digits, placed.levels, placed.weights)
    information = mutual_information(placed.flat, placed.all_levels, placed.weights)
    return {
        "source": placed.source,
        "strings": len(placed.strings),
        "levels": levels,
        "codes": total,
        "usable": usable or total,
        "groups": [_group(numbers[:, [group]], placed, total, usable or total) for group in range(groups)],
        "joint_entropy_bits": entropy_bits(numbers, placed.weights),
        "joint_entropy_bits_by_use": entropy_bits(numbers, placed.counts) if placed.counts.any() else None,
        "u3": ratios.tolist(),
        "u3_by_use": by_use,
        "masses": masses,
        "unreached_levels": sum(share == 0 for group in masses for digit in group for share in digit),
        "mutual_information_bits": information.tolist(),
        "collisions": {
            "first_code": _collisions(numbers[:, :1], placed),
            "all_codes": _collisions(numbers, placed),
        },
    }


def _group(numbers: Int[ndarray, "N 1"], placed: Placed, total: int, usable: int) -> dict[str, Any]:
    used = len(np.unique(numbers))
    return {
        "used": used,
        "used_of_all": used / total,
        "used_of_usable": used / usable,
        "used_of_possible": used / min(usable, len(numbers)),
        "entropy_bits": entropy_bits(numbers, placed.weights),
    }


def _collisions(numbers: Int[ndarray, "N G"], placed: Placed) -> dict[str, Any]:
    found = collisions(numbers)
    return {
        "share": found.share,
        "codes": found.codes,
        "histogram": {str(size): count for size, count in found.histogram.items()},
        "worst": [
            {
                "code": [*code],
                "strings": [{"text": shown(placed.strings[row]), "count": float(placed.counts[row])} for row in rows],
            }
            for code, rows in found.worst
        ],
    }


def _neighbours(placed: Placed, network: "AutoEncoder | None", seed: int) -> dict[str, Any]:
    def encode(strings: Sequence[bytes]) -> Int[ndarray, "N D"]:
        assert network is not None
        return digits_of(network, strings).reshape(len(strings), -1)

    common = np.argsort(-placed.counts, kind="stable")[:32768]  # as many as pins usually are
    strings = [placed.strings[row] for row in common]
    asked = encode if network is not None else None
    found = neighbourhood(strings, placed.flat[common], placed.all_levels, seed=seed, encode=asked)
    return {
        "correlation": _number(found.correlation),
        "random_pairs": _number(found.random_pairs),
        "one_edit": found.one_edit,
        "bands": [[*band] for band in found.bands],
        "sample": [
            {
                "text": shown(one.string),
                "nearest": [{"text": shown(other), "distance": away} for other, away in one.nearest],
            }
            for one in found.sample
        ],
    }


def _map(placed: Placed) -> list[list[Any]]:
    """(x, y, class, text) of the commonest strings: the two directions in which their grid values differ the most."""
    rows = np.argsort(-placed.counts, kind="stable")[:COMMONEST]
    values = 2 * placed.flat[rows] / (np.array(placed.all_levels) - 1) - 1.0
    centred = values - values.mean(0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    flat = np.zeros((len(rows), 2))
    flat[:, : min(2, len(directions))] = centred @ directions[:2].T
    classes = [class_of(placed.strings[row]) for row in rows]
    texts = [shown(placed.strings[row]) for row in rows]
    return [[round(x, 4), round(y, 4), name, text] for (x, y), name, text in zip(flat.tolist(), classes, texts)]


def class_of(string: bytes) -> str:
    """What kind of string it is, to colour it by."""
    text = string.decode("utf-8", "replace")
    bare = text.strip()
    if any(map(str.isdigit, bare)) and not any(map(str.isalpha, bare)):
        return "digits"
    if not any(map(str.isalnum, bare)):
        return "punctuation"
    if any(map(str.isupper, bare)):
        return "upper case"
    return "word with space" if text[:1] == " " else "other"


def _learned(seen: Look, config: PackageConfig, training: Mapping[bytes, int] | None) -> dict[str, Any]:
    counted = training or dict(zip(seen.strings, seen.counts.round().astype(np.int64).tolist()))
    lengths = by_label(seen, [str(len(string)) for string in seen.strings])
    frequencies = by_label(seen, buckets(seen.strings, counted))
    share = seen.weights / seen.weights.sum()
    places = seen.cell_margins[0].size if len(share) else 1
    spread = np.broadcast_to(share[:, None, None], seen.cell_margins.shape) / places
    firm = (seen.cell_margins >= config.encoder_margin).reshape(len(seen.strings), -1).all(1)
    exact = seen.exact[:, -1]
    return {
        "strings": len(seen.strings),
        "groups": [*seen.groups],
        "all": overall(seen),
        "by_length": {length: lengths[length] for length in sorted(lengths, key=int)},
        "by_frequency": {name: frequencies[name] for _, name in BUCKETS if name in frequencies},
        "frequency_in": "training" if training else "this text",
        "by_script": by_label(seen, [script_of(string) for string in seen.strings]),
        "logit_margins": {
            "edges": LOGITS.tolist(),
            "exact": histogram(seen.logit_margins, share * exact, LOGITS),
            "wrong": histogram(seen.logit_margins, share * ~exact, LOGITS),
            "required": config.decoder_margin,
            "exact_but_under": float(share[exact & (seen.logit_margins < config.decoder_margin)].sum()),
        },
        "cell_margins": {
            "edges": CELLS.tolist(),
            "share": histogram(seen.cell_margins, spread, CELLS),
            "required": config.encoder_margin,
            "strings_under": float(share[~firm].sum()),
        },
    }


def _figures(values: Mapping[str, Any], usage: Usage) -> dict[str, float]:
    """Single numbers: gates are held against them, and an earlier analysis is compared by them."""
    found = {"u1": usage.u1, "u2": usage.u2}
    if "codes" in values:
        shared, ratios = values["codes"]["collisions"], np.array(values["codes"]["u3"])
        found |= {"u3": float(ratios.min()), "u3_mean": float(ratios.mean())}
        found |= {"collisions": shared["all_codes"]["share"], "collisions_first_code": shared["first_code"]["share"]}
    if "learned" in values:
        most = str(max(values["learned"]["groups"]))
        found["learned_exact"] = values["learned"]["all"]["exact"][most]
        found["learned_exact_types"] = values["learned"]["all"]["exact_types"][most]
    found |= {f"bytes_per_token/{name}": one["bytes_per_token"] for name, one in values["corpora"].items()}
    return found


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value
