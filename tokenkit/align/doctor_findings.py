"""What two tokenizers mean for each other, one finding per question."""

from tokenkit.align.doctor_facts import Facts, Finding, Level, Number, Side
from tokenkit.align.doctor_measure import Measured
from tokenkit.align.doctor_schemes import INDENTATION, WhiteSpace

# Share of the target's running text for which the source has the very tokens: the rows that are exact from the start.
MOSTLY_KNOWN, HALF_KNOWN = 0.9, 0.6
MERGES = 3  # an indentation of eight spaces in at most so many tokens counts as merged


def examine(facts: Facts) -> tuple[Finding, ...]:
    """The findings about the two tokenizers themselves."""
    same = Finding("same tokenizer", "note", "Both give the same ids for every text: there is nothing to transfer.", {})
    found = (
        _overlap(facts),
        _scripts(facts),
        _digits(facts.source, facts.target),
        _white_space(facts.source, facts.target),
        _indentation(facts.source, facts.target),
        _dummy_space(facts.source, facts.target),
        _begin(facts.source, facts.target),
        _end(facts.source, facts.target),
        _normalisation(facts),
        _unknown(facts),
        _length(facts),
        _longest(facts.source, facts.target),
        _undecodable(facts.target),
        _edges(facts.source, facts.target),
    )
    return (same, *found) if facts.same else found


def percent(share: float) -> str:
    """A share in per cent."""
    return f"{100 * share:.1f} %"


def _overlap(facts: Facts) -> Finding:
    target, running, shared = facts.target, facts.running, facts.shared
    share = shared / max(target.entries.spellings, 1)
    known = running.known_share
    level: Level = "ok" if known >= MOSTLY_KNOWN else "note" if known >= HALF_KNOWN else "warning"
    sentence = (
        f"{facts.source.name} has {shared:,} of {target.name}'s {target.entries.spellings:,} tokens byte for byte "
        f"({percent(share)}), which make up {percent(known)} of the tokens in running text ({running.text})."
    )
    numbers: dict[str, Number] = {
        "shared": shared,
        "share_of_target": share,
        "share_of_source": shared / max(facts.source.entries.spellings, 1),
        "share_of_running_text": known,
        "chunks": running.chunks,
        "single_token_chunks": running.single,
    }
    return Finding("overlap", level, sentence, numbers)


def _scripts(facts: Facts) -> Finding:
    least = 0.005 * facts.target.entries.tokens
    spelled = [s for s in facts.scripts if s.pieces is not None and s.tokens >= least]
    dear = [s for s in spelled if s.pieces is not None and s.pieces >= 3]
    lost = [s for s in facts.scripts if s.unspelled]
    worst = sorted(dear, key=lambda s: -s.tokens)[:4]
    if lost:
        sentence = f"{facts.source.name} cannot spell some of {facts.target.name}'s tokens: " + ", ".join(
            s.script for s in lost[:4]
        )
    elif worst:
        named = ", ".join(f"{s.script} ({s.pieces:.1f})" for s in worst)
        sentence = f"{facts.source.name} spells some scripts of {facts.target.name} with three pieces or more: {named}"
    else:
        sentence = f"{facts.source.name} spells every script of {facts.target.name} in fewer than three pieces"
    level: Level = "warning" if lost else "note" if dear else "ok"
    return Finding("scripts", level, sentence + ".", {s.script: s.pieces for s in spelled})


def _digits(source: Side, target: Side) -> Finding:
    a, b = source.profile.digits, target.profile.digits
    numbers: dict[str, Number] = {
        "source": a.kind,
        "target": b.kind,
        "source_longest": a.longest,
        "target_longest": b.longest,
        "source_whole_0_to_999": a.numerals,
        "target_whole_0_to_999": b.numerals,
        "source_joins_space": a.joins_space,
        "target_joins_space": b.joins_space,
    }
    if a.kind == b.kind and (a.kind == "free" or a.longest == b.longest):
        level: Level = "note" if a.kind == "free" or a.joins_space != b.joins_space else "ok"
        more = ", and not the same ones" if a.kind == "free" and a != b else ""
        return Finding("digits", level, f"Both cut numbers {a.scheme}{more}.", numbers)
    sentence = (
        f"{source.name} cuts numbers {a.scheme}, {target.name} {b.scheme}: arithmetic collapses zero-shot (GSM8K fell "
        "by 74 to 79 % in published transfers across schemes, by 6 % within one) and comes back only with training on "
        "numbers."
    )
    return Finding("digits", "warning", sentence, numbers)


def _white_space(source: Side, target: Side) -> Finding:
    a, b = source.profile.white_space, target.profile.white_space
    numbers: dict[str, Number] = {}
    for side, one in (("source", a), ("target", b)):
        numbers |= {f"{side}_word_space": one.word_space, f"{side}_longest_spaces": one.spaces}
        numbers |= {f"{side}_longest_tabs": one.tabs, f"{side}_longest_newlines": one.newlines}
        numbers[f"{side}_newline_joins_punctuation"] = one.newline_joins_punctuation
    if a.word_space != b.word_space:
        sentence = f"The space between words is {_space(a)} in {source.name} and {_space(b)} in {target.name}"
        return Finding("white space", "warning", sentence + ".", numbers)
    apart = []
    if (a.newlines > 1) != (b.newlines > 1):
        apart.append(f"only {(source if a.newlines > 1 else target).name} merges empty lines")
    if (a.tabs > 1) != (b.tabs > 1):
        apart.append(f"only {(source if a.tabs > 1 else target).name} merges tabs")
    if a.newline_joins_punctuation != b.newline_joins_punctuation:
        joins = source if a.newline_joins_punctuation else target
        apart.append(f"only {joins.name} joins a line break to the punctuation before it")
    sentence = f"The space between words is {_space(a)} in both" + "".join(f"; {one}" for one in apart)
    return Finding("white space", "note" if apart else "ok", sentence + ".", numbers)


def _space(one: WhiteSpace) -> str:
    return {
        "before": "the first byte of the word after it",
        "after": "the last byte of the word before it",
        "alone": "a token of its own",
        "dropped": "spelled by no token",
    }[one.word_space]


def _indentation(source: Side, target: Side) -> Finding:
    a, b = source.profile.white_space, target.profile.white_space
    numbers: dict[str, Number] = {
        "source_tokens_of_eight": a.indentation_tokens,
        "target_tokens_of_eight": b.indentation_tokens,
        "source_space_joins_word": a.space_joins_word,
        "target_space_joins_word": b.space_joins_word,
        "source_tab_joins_word": a.tab_joins_word,
        "target_tab_joins_word": b.tab_joins_word,
        "source_newline_joins_indentation": a.newline_joins_indentation,
        "target_newline_joins_indentation": b.newline_joins_indentation,
    }
    lossy = [side.name for side, one in ((source, a), (target, b)) if not one.keeps_indentation]
    if lossy:
        sentence = f"{' and '.join(lossy)} cannot spell indentation: code does not survive."
        return Finding("indentation", "warning", sentence, numbers)
    apart = []
    if (a.indentation_tokens <= MERGES) != (b.indentation_tokens <= MERGES):
        merges, spells = (source, target) if a.indentation_tokens <= MERGES else (target, source)
        tokens = max(a.indentation_tokens, b.indentation_tokens)
        apart.append(
            f"{merges.name} merges runs of spaces, {spells.name} spells {INDENTATION} spaces with {tokens} tokens"
        )
    if a.space_joins_word != b.space_joins_word:
        joins = source if a.space_joins_word else target
        apart.append(f"only {joins.name} takes the last space of an indentation into the word")
    if a.tab_joins_word != b.tab_joins_word:
        joins = source if a.tab_joins_word else target
        apart.append(f"only {joins.name} takes a tab into the word")
    if a.newline_joins_indentation != b.newline_joins_indentation:
        joins = source if a.newline_joins_indentation else target
        apart.append(f"only {joins.name} takes the line break into the indentation")
    if not apart:
        return Finding("indentation", "ok", "Both cut indented code the same way.", numbers)
    only_tabs = len(apart) == 1 and a.tab_joins_word != b.tab_joins_word
    sentence = f"Indented code is cut differently: {'; '.join(apart)}. Measure code apart, and train on some."
    return Finding("indentation", "note" if only_tabs else "warning", sentence, numbers)


def _dummy_space(source: Side, target: Side) -> Finding:
    a, b = source.profile.dummy_space, target.profile.dummy_space
    numbers: dict[str, Number] = {"source": a, "target": b}
    if a == b:
        sentence = "Both begin a text with a space that it does not hold" if a else "Neither adds a space to a text"
        return Finding("dummy space", "ok", sentence + ".", numbers)
    adds = source if a else target
    sentence = f"Only {adds.name} begins a text with a space that it does not hold: first words are other tokens."
    return Finding("dummy space", "note", sentence, numbers)


def _begin(source: Side, target: Side) -> Finding:
    numbers: dict[str, Number] = {"source_bos": source.bos, "target_bos": target.bos}
    if source.bos is not None and target.bos is None:
        unnamed = "name bos_token in its tokenizer_config.json, or neither transfer nor distill takes it"
        starts = f"texts will begin with {target.eos}, with its row" if target.eos else unnamed
        sentence = (
            f"{source.name} begins texts with {source.bos}, {target.name} has no such token: the model parks attention "
            f"on it, and a published transfer lost 9 points without it; {starts}."
        )
        return Finding("begin of text", "warning", sentence, numbers)
    if source.bos is None and target.bos is not None:
        sentence = f"{target.name} begins texts with {target.bos}, a token that {source.name} has no counterpart of."
        return Finding("begin of text", "note", sentence, numbers)
    if source.bos is None:
        return Finding("begin of text", "note", "Neither has a token that begins a text.", numbers)
    return Finding("begin of text", "ok", f"Texts begin with {source.bos} and {target.bos}.", numbers)


def _end(source: Side, target: Side) -> Finding:
    numbers: dict[str, Number] = {"source_eos": source.eos, "target_eos": target.eos, "target_pad": target.pad}
    for has, lacks in ((source, target), (target, source)):
        if has.eos is not None and lacks.eos is None:
            sentence = (
                f"Only {has.name} ends texts with a token of its own ({has.eos}): {lacks.name} cannot learn to stop."
            )
            return Finding("end of text", "warning", sentence, numbers)
    double = [side for side in (source, target) if side.eos is not None and side.eos == side.bos]
    if len(double) == 1:
        sentence = f"{double[0].name} begins and ends texts with one token, {double[0].eos}; the other side has two."
        return Finding("end of text", "note", sentence, numbers)
    return Finding("end of text", "ok", f"Texts end with {source.eos} and {target.eos}.", numbers)


def _normalisation(facts: Facts) -> Finding:
    a, b = facts.source.profile, facts.target.profile
    refused = facts.running.source_refused, facts.running.target_refused
    numbers: dict[str, Number] = {"source_changes": "; ".join(a.changes), "target_changes": "; ".join(b.changes)}
    numbers |= {"source_lossless": a.lossless, "target_lossless": b.lossless}
    numbers |= {"source_refused_documents": refused[0], "target_refused_documents": refused[1]}
    parts = []
    for side, documents in zip((facts.source, facts.target), refused):
        if side.profile.changes:
            parts.append(f"{side.name} {' and '.join(side.profile.changes)}")
        if not side.profile.lossless:
            parts[-1] += ", so text cannot be had back from its tokens"
        if documents:
            parts.append(f"{side.name} refuses {documents} of the measured texts")
    if not parts:
        return Finding("normalisation", "ok", "Neither changes a text before it cuts it.", numbers)
    level: Level = "ok" if a.changes == b.changes else "note"
    if not (a.lossless and b.lossless) or any(refused):
        level = "warning"
    return Finding("normalisation", level, "; ".join(parts) + ".", numbers)


def _unknown(facts: Facts) -> Finding:
    numbers: dict[str, Number] = {
        "source_unknown": facts.running.source_unknown,
        "target_unknown": facts.running.target_unknown,
    }
    cannot = [side.name for side in (facts.source, facts.target) if side.profile.lacks_characters]
    if not cannot:
        return Finding("any character", "ok", "Both can spell every character.", numbers)
    return Finding("any character", "warning", f"{' and '.join(cannot)} cannot spell every character.", numbers)


def _length(facts: Facts) -> Finding:
    running = facts.running
    per_byte = [tokens / max(running.bytes, 1) for tokens in (running.source_tokens, running.target_tokens)]
    numbers: dict[str, Number] = {
        "bytes": running.bytes,
        "source_tokens_per_byte": per_byte[0],
        "target_tokens_per_byte": per_byte[1],
        "ratio": running.ratio,
    }
    numbers |= {f"ratio: {probe.text}": probe.ratio for probe in facts.probes if probe.whole}
    spread = sorted((probe for probe in facts.probes if probe.whole), key=_ratio)
    ends = f"; from {spread[0].ratio:.2f} ({spread[0].text}) to {spread[-1].ratio:.2f} ({spread[-1].text})"
    sentence = (
        f"{facts.target.name} needs {running.ratio:.2f} tokens for one of {facts.source.name} ({per_byte[1]:.3f} "
        f"against {per_byte[0]:.3f} per byte, {running.text}){ends if spread else ''}."
    )
    level: Level = "warning" if running.ratio > 2 else "ok" if 0.9 <= running.ratio <= 1.1 else "note"
    return Finding("length", level, sentence, numbers)


def _ratio(measured: Measured) -> float:
    return measured.ratio


def _longest(source: Side, target: Side) -> Finding:
    parts, numbers = [], {}
    for name, side in (("source", source), ("target", target)):
        parts.append(f"{side.name} {', '.join(map(repr, side.entries.longest[:1])) or '(no letters)'}")
        numbers |= {f"{name}_longest_bytes": side.entries.longest_bytes}
        numbers |= {f"{name}_over_16_bytes": side.entries.over_16_bytes}
    return Finding("longest tokens", "ok", f"Longest words: {'; '.join(parts)}.", numbers)


def _undecodable(target: Side) -> Finding:
    share = target.entries.undecodable / max(target.entries.tokens, 1)
    numbers: dict[str, Number] = {"target": target.entries.undecodable, "share_of_target": share}
    sentence = (
        f"{target.entries.undecodable:,} of {target.name}'s tokens ({percent(share)}) are parts of characters, no text "
        "on their own: never decode tokens one by one."
    )
    if not target.entries.undecodable:
        sentence = f"Every token of {target.name} is text on its own."
    return Finding("undecodable tokens", "note" if share > 0.05 else "ok", sentence, numbers)


def _edges(source: Side, target: Side) -> Finding:
    numbers: dict[str, Number] = {}
    odd = []
    for name, side in (("source", source), ("target", target)):
        numbers |= {f"{name}_ids": side.entries.ids, f"{name}_special": side.entries.special}
        numbers |= {f"{name}_duplicates": side.entries.duplicates, f"{name}_holes": side.entries.holes}
        if side.entries.duplicates or side.entries.holes:
            odd.append(f"{side.name} has {side.entries.duplicates} doubles and {side.entries.holes} ids of no token")
    sentence = "; ".join(odd) or "Every id of either is a token, and no two have the same bytes"
    return Finding("vocabulary", "note" if odd else "ok", sentence + ".", numbers)
