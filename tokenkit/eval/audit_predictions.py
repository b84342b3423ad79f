"""What the output rows do in held-out text: tokens that are never likely, or far too likely."""

import numpy as np

from tokenkit.align.doctor_facts import Finding, Level, Number
from tokenkit.eval.audit_facts import AuditOptions, Part, examples, flagged
from tokenkit.eval.contexts import Contexts
from tokenkit.eval.row_facts import IdKinds, robust_z
from tokenkit.eval.row_predictions import Predictions

OFTEN = 3  # a token that follows more rarely has had no chance to be among the first


def audit_predictions(found: Predictions, kinds: IdKinds, contexts: Contexts, options: AuditOptions) -> Part:
    """Never predicted, out of line in logit, and winners that the text never has."""
    return (
        never_predicted(found, kinds, contexts, options)
        + logit_outliers(found, kinds, options)
        + false_winners(found, kinds, contexts)
    )


def never_predicted(found: Predictions, kinds: IdKinds, contexts: Contexts, options: AuditOptions) -> Part:
    """Tokens in use that are never among the first n, and those of them that the text has."""
    topic = "predictions"
    usual = kinds.ordinary & ~kinds.unreachable
    never = usual & (found.among_first == 0)
    follows = np.bincount(contexts.labels, minlength=kinds.rows)
    missed = never & (follows >= OFTEN)
    rows = flagged(topic, "output", kinds, np.flatnonzero(missed), follows[missed])
    mass, share = float(found.mass[never].sum()), float(follows[missed].sum() / max(follows.sum(), 1))
    numbers: dict[str, Number] = {
        "contexts": found.contexts,
        "first": options.first,
        "never": int(never.sum()),
        "share_of_tokens": float(never.sum() / max(usual.sum(), 1)),
        "mass_of_never": mass,
        "never_though_frequent": int(missed.sum()),
        "share_of_places": share,
        "mass_of_unused": float(found.mass[kinds.unused].sum()),
        "windows_left_out": contexts.left_out,
    }
    sentence = (
        f"{int(never.sum()):,} of {int(usual.sum()):,} tokens are never among the {options.first} most likely of "
        f"{found.contexts:,} contexts and share {100 * mass:.2g} % of the mass; {int(missed.sum()):,} of them "
        f"follow {OFTEN} times or more in the text, at {100 * share:.1f} % of places{examples(rows)}."
    )
    level: Level = "warning" if share > 0.1 else "note" if share > 0.02 else "ok"
    return Part((Finding(topic, level, sentence, numbers),), rows)


def logit_outliers(found: Predictions, kinds: IdKinds, options: AuditOptions) -> Part:
    """Rows whose mean log-probability is out of line: high ones are a danger, low ones are never written."""
    topic = "logits"
    usual = kinds.ordinary & ~kinds.unreachable
    z = robust_z(found.mean_logp, usual)
    peak_z = robust_z(found.peak_logp, usual)
    high, low = z > options.outlier, usual & (z < -options.outlier)
    rows = flagged(topic, "output", kinds, np.flatnonzero(high), z[high])
    spare, largest = high & kinds.unused, float(z.max(initial=0))
    numbers: dict[str, Number] = {
        "median_mean_logp": float(np.median(found.mean_logp[usual])) if usual.any() else 0.0,
        "high": int(high.sum()),
        "low": int(low.sum()),
        "high_of_no_token_in_use": int(spare.sum()),
        "largest_z": largest,
        "largest_peak_z": float(peak_z.max(initial=0)),
    }
    if not high.any():
        sentence = (
            f"No row is likely everywhere: the highest mean log-probability is {largest:.1f} deviations "
            f"above the median; {int(low.sum()):,} lie as far below it as {options.outlier:g}."
        )
        return Part((Finding(topic, "ok", sentence, numbers),), rows)
    level: Level = "warning" if spare.any() or largest > 2 * options.outlier else "note"
    sentence = f"{int(high.sum()):,} rows are likely in whatever context{examples(rows)}."
    return Part((Finding(topic, level, sentence, numbers),), rows)


def false_winners(found: Predictions, kinds: IdKinds, contexts: Contexts) -> Part:
    """Ids of no special token that are the most likely one of some contexts though the text never has them."""
    topic = "winners"
    alien = (found.wins > 0) & ~contexts.met & ~kinds.special
    rows = flagged(topic, "output", kinds, np.flatnonzero(alien), found.wins[alien])
    places, most = int(found.wins[alien].sum()), int(found.wins[alien].max(initial=0))
    correct = found.contexts - int(found.false_wins.sum())
    numbers: dict[str, Number] = {
        "ids": int(alien.sum()),
        "places": places,
        "share_of_places": places / found.contexts,
        "right": correct / found.contexts,
        "places_of_special_tokens": int(found.wins[kinds.special].sum()),
        "unused_ids": int((alien & kinds.unused).sum()),
        "most_by_one_id": most,
    }
    if not alien.any():
        right = f"{100 * correct / found.contexts:.0f} %"
        sentence = f"Whatever is the most likely stands somewhere in the text; {right} are right."
        return Part((Finding(topic, "ok", sentence, numbers),))
    bad = most > 0.01 * found.contexts or (alien & kinds.unused).any()
    sentence = (
        f"{int(alien.sum()):,} ids that the text never has are the most likely ones at {places:,} of "
        f"{found.contexts:,} places{examples(rows)}."
    )
    level: Level = "warning" if bad else "note" if places > 0.01 * found.contexts else "ok"
    return Part((Finding(topic, level, sentence, numbers),), rows)
