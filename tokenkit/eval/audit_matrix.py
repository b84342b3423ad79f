"""What the rows of one matrix say by themselves: broken ones, outliers, repetitions, rows that were never trained.

The indicator for tokens that were never trained is the distance to the mean of rows that no text can have reached.
Land & Bartolo 2024, 2405.05417.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float64
from numpy import ndarray

from tokenkit.align.doctor_facts import Finding, Level, Number
from tokenkit.eval.audit_facts import AuditOptions, Part, examples, flagged
from tokenkit.eval.row_duplicates import Families, find_duplicates
from tokenkit.eval.row_facts import IdKinds, blocks, robust_z, row_norms
from tokenkit.transfer.rows import Rows

FEW_UNUSED = 4  # rows that no text reads; of fewer a mean says little
MANY = 0.01  # share of ordinary tokens from which on a note becomes a warning


def audit_matrix(matrix: str, rows: Rows, kinds: IdKinds, options: AuditOptions) -> Part:
    """The findings of a matrix, whose name is put before each topic."""
    norms = row_norms(rows)
    families = find_duplicates(rows, cosine=options.cosine)
    return (
        broken_rows(matrix, norms, kinds)
        + norm_outliers(matrix, norms, kinds, options.outlier)
        + repetitions(matrix, families, norms, kinds, options.cosine)
        + untrained(matrix, rows, norms, kinds)
    )


def broken_rows(matrix: str, norms: Float64[ndarray, "V"], kinds: IdKinds) -> Part:
    """Rows that are not finite, and tokens whose row is zero."""
    topic = f"{matrix}: broken rows"
    wild, empty = ~np.isfinite(norms), norms == 0
    used = empty & (kinds.ordinary | kinds.special) & ~kinds.unreachable
    rows = flagged(topic, matrix, kinds, np.flatnonzero(wild | used), norms[wild | used])
    numbers: dict[str, Number] = {
        "not_finite": int(wild.sum()),
        "zero": int(empty.sum()),
        "zero_with_a_token_in_use": int(used.sum()),
    }
    if not rows:
        spare = f"; {int(empty.sum()):,} rows of no token in use are zero" if empty.any() else ""
        sentence = f"Every row is finite, and none of a token in use is zero{spare}."
        return Part((Finding(topic, "ok", sentence, numbers),))
    sentence = f"{int(wild.sum()):,} rows are not finite and {int(used.sum()):,} tokens have a row of zeros"
    return Part((Finding(topic, "warning", sentence + examples(rows) + ".", numbers),), rows)


def norm_outliers(matrix: str, norms: Float64[ndarray, "V"], kinds: IdKinds, limit: float) -> Part:
    """Rows of tokens in use whose length is out of line with those of ordinary tokens; special tokens counted apart."""
    topic = f"{matrix}: norms"
    usual = kinds.ordinary & ~kinds.unreachable
    with np.errstate(divide="ignore", invalid="ignore"):
        z = robust_z(np.log(norms), usual)  # of logarithms: half as long is as odd as twice as long
    out = (np.abs(z) > limit) & usual & (norms > 0)
    special = (np.abs(z) > limit) & kinds.special & (norms > 0)
    rows = flagged(topic, matrix, kinds, np.flatnonzero(out), np.abs(z[out]))
    rows += flagged(topic, matrix, kinds, np.flatnonzero(special), np.abs(z[special]))
    largest = float(np.abs(z[usual]).max(initial=0))
    finite = norms[usual & np.isfinite(norms)]
    low, middle, high = np.quantile(finite, [0.01, 0.5, 0.99]).tolist() if len(finite) else (0.0, 0.0, 0.0)
    numbers: dict[str, Number] = {
        "median": middle,
        "first_percentile": low,
        "last_percentile": high,
        "long": int((out & (z > 0)).sum()),
        "short": int((out & (z < 0)).sum()),
        "special": int(special.sum()),
        "largest_z": largest,
    }
    known = f"Rows of ordinary tokens are {middle:.3g} long (99 % of them at most {high:.3g})"
    apart = f"; {int(special.sum())} special tokens lie apart" if special.any() else ""
    if not out.any():
        return Part((Finding(topic, "ok", f"{known}, none out of line{apart}.", numbers),), rows)
    level: Level = "warning" if out.sum() > MANY * usual.sum() or largest > 4 * limit else "note"
    sentence = f"{known}; {int(out.sum()):,} lie more than {limit:g} deviations off{examples(rows)}{apart}."
    return Part((Finding(topic, level, sentence, numbers),), rows)


def repetitions(matrix: str, families: Families, norms: Float64[ndarray, "V"], kinds: IdKinds, cosine: float) -> Part:
    """Rows that repeat others: how many of tokens in use, and how many of padding, holes and tokens never given."""
    topic = f"{matrix}: repeated rows"
    repeated = np.zeros(len(norms), bool)
    repeated[families.repeated] = True
    repeated &= norms > 0
    sizes = families.sizes()
    in_family = np.isin(families.leader, [*sizes]) & (norms > 0)
    used = in_family & (kinds.ordinary | kinds.special) & ~kinds.unused
    exact = families.exact != np.arange(len(norms))
    partners = np.bincount(families.leader[used], minlength=len(norms))
    alike = used & (partners[families.leader] > 1)  # beside another token in use
    largest = max(sizes.values(), default=1)
    numbers: dict[str, Number] = {
        "repeated": int(repeated.sum()),
        "exactly": int((repeated & exact).sum()),
        "families": len(sizes),
        "largest_family": largest,
        "padding": int((in_family & kinds.padding).sum()),
        "holes": int((in_family & kinds.hole).sum()),
        "unreachable": int((in_family & kinds.unreachable).sum()),
        "in_use": int(alike.sum()),
    }
    shadow = in_family & kinds.unreachable & (partners[families.leader] > 0)
    if matrix == "input":  # there nobody reads them
        shadow[:] = False
    numbers["doubles_of_tokens_in_use"] = int(shadow.sum())
    rows = flagged(topic, matrix, kinds, np.flatnonzero(alike), partners[families.leader[alike]])
    rows += flagged(topic, matrix, kinds, np.flatnonzero(shadow), np.zeros(int(shadow.sum())))
    sentences = []
    if alike.any():
        sentences.append(
            f"{int(alike.sum()):,} tokens in use have the row of another one, so the model cannot tell them apart"
            f"{examples(rows)}; the largest family has {largest:,} rows."
        )
    if shadow.any():
        named = examples(flagged(topic, matrix, kinds, np.flatnonzero(shadow), norms[shadow]))
        sentences.append(
            f"{int(shadow.sum()):,} tokens that are never given for their text have the row of one that is{named}: as "
            "output rows they take half its probability."
        )
    if not sentences:
        sentence = f"No two rows have a cosine of {cosine:g} or more."
        if repeated.any():
            sentence = f"{int(repeated.sum()):,} rows repeat others, none of them of a token in use."
        return Part((Finding(topic, "ok", sentence, numbers),))
    level: Level = "warning" if (alike | shadow).sum() > MANY * kinds.ordinary.sum() else "note"
    return Part((Finding(topic, level, " ".join(sentences), numbers),), rows)


def untrained(matrix: str, rows: Rows, norms: Float64[ndarray, "V"], kinds: IdKinds) -> Part:
    """Tokens in use whose row lies no further from the mean of rows that no text reads than those rows do."""
    topic = f"{matrix}: untrained rows"
    unused = kinds.unused & np.isfinite(norms)
    numbers: dict[str, Number] = {"unused": int(unused.sum())}
    if unused.sum() < FEW_UNUSED:
        sentence = f"Rows that stand for no token in use: {int(unused.sum())}, too few to know an untrained row by."
        return Part((Finding(topic, "ok", sentence, numbers),))
    distance = distance_to_mean(rows, unused)
    reach = float(np.quantile(distance[unused], 0.9))
    usual = kinds.ordinary & ~kinds.unreachable & np.isfinite(norms)
    near = usual & (distance <= reach)
    middle = float(np.median(distance[usual])) if usual.any() else 0.0
    numbers |= {"reach": reach, "median_distance": middle, "near": int(near.sum())}
    found = flagged(topic, matrix, kinds, np.flatnonzero(near), -distance[near])
    if middle <= 2 * reach:
        sentence = (
            f"The {int(unused.sum()):,} rows of no token in use are as far apart as trained ones: by them no untrained "
            "row can be known."
        )
        return Part((Finding(topic, "ok", sentence, numbers),))
    if not near.any():
        sentence = f"No token's row is where the {int(unused.sum()):,} rows of no token in use are."
        return Part((Finding(topic, "ok", sentence, numbers),))
    level: Level = "warning" if near.sum() > MANY * usual.sum() else "note"
    sentence = f"{int(near.sum()):,} tokens have rows like those that no text reads{examples(found)}."
    return Part((Finding(topic, level, sentence, numbers),), found)


def distance_to_mean(rows: Rows, among: Bool[ndarray, "V"]) -> Float64[ndarray, "V"]:
    """How far each row is from the mean of some."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    for ids, block in blocks(rows):
        chosen = torch.from_numpy(among[ids])
        total += block.cpu().double()[chosen].sum(0)
    centre = total / int(among.sum())
    distance = np.empty(rows.shape[0])
    for ids, block in blocks(rows):
        distance[ids] = (block.cpu().double() - centre).norm(dim=1).numpy()
    return distance
