"""What a transfer will cost, and which initialiser and loss to begin with. Factors and sizes, never hours."""

from collections.abc import Collection

from tokenkit.align.doctor_facts import Facts, Finding, ModelFacts, Number

LITTLE_TEXT = 100_000  # bytes: up to here ALM was ahead of cross-entropy in our runs, on subwords
LITTLE_TEXT_FOR_BYTES = 40_000
PLENTY = 800_000  # bytes: from here cross-entropy was, on small models
SMALL_MODEL = 100_000_000  # parameters: what we measured on is far below, what was published far above
MEBI = 2**20


def advise(facts: Facts, initializers: Collection[str], losses: Collection[str]) -> tuple[Finding, ...]:
    """Findings on the model, memory, time, initialiser and loss; names are taken from those that exist."""
    found = [] if facts.model is None else [_rows(facts, facts.model)]
    found += [_memory(facts), _time(facts)]
    found += _initializer(facts, initializers) + _loss(facts, losses)
    return tuple(found)


def _rows(facts: Facts, model: ModelFacts) -> Finding:
    ids = facts.source.entries.ids
    numbers: dict[str, Number] = {"rows": model.rows, "ids": ids}
    if ids > model.rows:
        sentence = f"{ids - model.rows} ids of {facts.source.name} have no row in {model.name} ({model.rows:,} rows)"
        return Finding("embedding", "warning", sentence + ": is this the model's tokenizer?", numbers)
    if ids < model.rows:
        sentence = f"{model.name} has {model.rows - ids} rows for no id of {facts.source.name}; they are dropped."
        return Finding("embedding", "note", sentence, numbers)
    return Finding("embedding", "ok", f"{model.name} has one row per id of {facts.source.name}.", numbers)


def _memory(facts: Facts) -> Finding:
    before, after = facts.source.entries.ids, facts.target.entries.ids
    logits = [ids * 4 * 1000 / MEBI for ids in (before, after)]
    numbers: dict[str, Number] = {"source_logits_mib_per_1000_tokens": logits[0]}
    numbers["target_logits_mib_per_1000_tokens"] = logits[1]
    sentence = f"Logits of 1,000 tokens in float32 take {logits[1]:,.0f} MiB, {logits[0]:,.0f} before"
    model = facts.model
    if model is not None:
        matrix = model.matrices * model.width
        sizes = [rows * matrix * model.bytes_per_weight / MEBI for rows in (model.rows, after)]
        gained = (after - model.rows) * matrix
        numbers |= {"embedding_mib_before": sizes[0], "embedding_mib_after": sizes[1], "parameters_gained": gained}
        numbers["parameters_before"] = model.parameters
        tied = "input and head share one matrix" if model.matrices == 1 else "input and head"
        sentence += (
            f"; embeddings ({tied}) {sizes[1]:,.1f} MiB, {sizes[0]:,.1f} before: {gained:+,} weights on "
            f"{model.parameters:,}"
        )
    return Finding("memory", "ok", sentence + ".", numbers)


def _time(facts: Facts) -> Finding:
    ratio = facts.running.ratio
    vocabulary = facts.target.entries.ids / max(facts.source.entries.ids, 1)
    numbers: dict[str, Number] = {"body": ratio, "head": ratio * vocabulary}
    sentence = f"For the same text the body computes ×{ratio:.3g}, the output head ×{ratio * vocabulary:.3g}"
    model = facts.model
    if model is not None:
        body = max(model.parameters - model.matrices * model.rows * model.width, 0)
        whole = [body + model.width * ids for ids in (facts.source.entries.ids, facts.target.entries.ids)]
        numbers["model"] = ratio * whole[1] / max(whole[0], 1)
        sentence += f", the model as a whole ×{numbers['model']:.3g}"
    return Finding("time", "ok", sentence + " of before.", numbers)


def _initializer(facts: Facts, names: Collection[str]) -> list[Finding]:
    chosen = next((name for name in ("fvt", "mean") if name in names), None)
    if chosen is None:
        return []
    pieces = [s for s in facts.scripts if s.pieces is not None]
    spelled = sum(s.tokens - s.same for s in pieces)
    rest = sum(s.pieces * s.tokens - s.same for s in pieces if s.pieces is not None) / max(spelled, 1)
    numbers: dict[str, Number] = {"initializer": chosen, "copied": facts.shared, "averaged": spelled}
    numbers |= {"pieces_per_averaged": rest, "parts_of_characters": facts.target.entries.undecodable}
    why = {
        "fvt": f"copies {facts.shared:,} rows and averages {rest:.1f} pieces for each of the other {spelled:,}; "
        "mean rows were still 0.36 bits per byte behind after 1,000 steps (docs/results.md)",
        "mean": "nothing better is at hand",
    }[chosen]
    return [Finding("initialiser", "ok", f"{chosen}: {why}.", numbers)]


def _loss(facts: Facts, names: Collection[str]) -> list[Finding]:
    chosen, why = _loss_choice(facts)
    if not set(chosen) <= set(names):
        return []
    size = None if facts.corpus is None else facts.corpus.bytes
    numbers: dict[str, Number] = {"losses": " + ".join(chosen), "corpus_bytes": size}
    return [Finding("loss", "ok", f"{' + '.join(chosen)}: {why}.", numbers)]


def _loss_choice(facts: Facts) -> tuple[tuple[str, ...], str]:
    """Names of losses and the evidence for them."""
    size = None if facts.corpus is None else facts.corpus.bytes
    is_bytes = facts.target.entries.longest_bytes == 1
    small = facts.model is not None and facts.model.parameters < SMALL_MODEL
    if facts.same:
        return ("forward_kl",), "one vocabulary: another teacher with it can be matched token by token"
    if size is not None and size <= (LITTLE_TEXT_FOR_BYTES if is_bytes else LITTLE_TEXT):
        return ("alm",), f"{size:,} bytes are few, and cross-entropy learns few bytes by heart (docs/log.md)"
    if small and size is not None and size >= PLENTY:
        return ("clm",), "with plenty of fresh text for a small model it ended 0.01 to 0.07 bits per byte below alm"
    if is_bytes:
        return ("clm", "alm"), "published transfers to bytes did better with both than with alm alone"
    why = "published transfers of large models between subwords did best with it alone"
    return ("alm",), why + ("" if size else "; --corpus says more")
