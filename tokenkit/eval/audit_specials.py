"""Whether a model and its tokenizer agree on ids: rows and tokens, roles, settings of generation, the chat template."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from tokenkit.align.doctor_facts import Finding, Level, Number
from tokenkit.config import UserError
from tokenkit.eval.audit_facts import AuditOptions, Flagged, Part, examples, flagged
from tokenkit.eval.row_facts import IdKinds, robust_z
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.tokenizers.chat import roles_of

ROLES = ("bos", "eos", "pad")


def audit_ids(kinds: IdKinds, matrices: Mapping[str, int]) -> Part:
    """Rows without a token, tokens without a row, tokens that are never given; `matrices` are rows by name."""
    rows, tokenizer = kinds.rows, kinds.tokenizer
    lost = [i for i in range(rows, tokenizer.vocab_size) if tokenizer.token_bytes[i] or i in tokenizer.special_ids]
    unreachable = np.flatnonzero(kinds.unreachable)
    numbers: dict[str, Number] = {
        "rows": rows,
        "ids": tokenizer.vocab_size,
        "tokens_without_row": len(lost),
        "padding": int(kinds.padding.sum()),
        "holes": int(kinds.hole.sum()),
        "unreachable": len(unreachable),
    }
    topic = "ids"
    found = flagged(topic, "tokenizer", kinds, unreachable, np.zeros(len(unreachable)))
    named = " and ".join(f"{count:,} {name}" for name, count in matrices.items())
    if lost or len(set(matrices.values())) > 1:
        sentence = (
            f"The tokenizer has ids up to {tokenizer.vocab_size - 1:,}, the model {named} rows: {len(lost):,} tokens "
            "have none, and a text with one of them ends in an error."
        )
        return Part((Finding(topic, "warning", sentence, numbers),), found)
    sentence = (
        f"Every token has a row; {int(kinds.padding.sum()):,} rows are padding, {int(kinds.hole.sum()):,} ids have no "
        f"token, {len(unreachable):,} tokens are never given for their own text"
    )
    level: Level = "note" if len(unreachable) > 0.01 * max(int(kinds.ordinary.sum()), 1) else "ok"
    return Part((Finding(topic, level, sentence + examples(found) + ".", numbers),), found)


def audit_roles(matrix: str, norms: Float64[ndarray, "V"], kinds: IdKinds, options: AuditOptions) -> Part:
    """Which roles there are, and whether their rows are like rows."""
    tokenizer, topic = kinds.tokenizer, f"{matrix}: roles"
    ids = {role: _role_id(tokenizer, role) for role in ROLES}
    z = robust_z(norms, kinds.ordinary)
    wrong: list[Flagged] = []
    for i in dict.fromkeys(i for i in ids.values() if i is not None and i < kinds.rows):
        if not np.isfinite(norms[i]) or norms[i] == 0 or abs(z[i]) > 4 * options.outlier:
            wrong.append(Flagged(topic, matrix, i, kinds.name(i), float(norms[i]) if np.isfinite(norms[i]) else None))
    numbers: dict[str, Number] = dict(ids)
    numbers |= {f"{role}_z": None if i is None or i >= kinds.rows else float(z[i]) for role, i in ids.items()}
    lacking = [role for role in ("bos", "eos") if ids[role] is None]
    if ids["bos"] is None and ids["eos"] is None:
        sentence = "The tokenizer has neither a token that begins texts nor one that ends them."
        return Part((Finding(topic, "warning", sentence, numbers),))
    if wrong:
        sentence = f"Rows of special tokens are not like rows{examples(wrong)}."
        return Part((Finding(topic, "warning", sentence, numbers),), tuple(wrong))
    have = ", ".join(f"{role} {kinds.name(i)}" for role, i in ids.items() if i is not None and i < kinds.rows)
    none = f"; no {' and no '.join(lacking)}" if lacking else ""
    return Part((Finding(topic, "note" if "eos" in lacking else "ok", f"{have}{none}.", numbers),))


def _role_id(tokenizer: Tokenizer, role: str) -> int | None:
    """The id of a role."""
    return {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}[role]


def audit_settings(
    tokenizer: Tokenizer, rows: int, config: Mapping[str, Any], generation: Mapping[str, Any] | None
) -> Part:
    """Whether config.json and generation_config.json name the tokenizer's ids, and ids that have a token."""
    inner = config.get("text_config")
    files: dict[str, Mapping[str, Any]] = {"config.json": {**config, **(inner if isinstance(inner, dict) else {})}}
    if generation is not None:
        files["generation_config.json"] = generation
    wrong = [line for name, values in files.items() for line in _disagreements(tokenizer, rows, name, values)]
    size = files["config.json"].get("vocab_size")
    if size is not None and size != rows:
        wrong.append(f"config.json has a vocab_size of {size}, the matrix {rows} rows")
    numbers: dict[str, Number] = {"disagreements": len(wrong), "generation_config": generation is not None}
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        return Part((Finding("settings", "warning", "; ".join(wrong[:3]) + more + ".", numbers),))
    sentence = f"{' and '.join(files)} name{'' if len(files) > 1 else 's'} the tokenizer's ids."
    return Part((Finding("settings", "ok", sentence, numbers),))


def _disagreements(tokenizer: Tokenizer, rows: int, name: str, values: Mapping[str, Any]) -> Iterator[str]:
    for role in ROLES:
        given, own = values.get(f"{role}_token_id"), _role_id(tokenizer, role)
        ids = given if isinstance(given, list) else [] if given is None else [given]
        for i in ids:
            if not 0 <= i < rows:
                yield f"{name}: {role}_token_id {i} has no row"
            elif i >= tokenizer.vocab_size or not (tokenizer.token_bytes[i] or i in tokenizer.special_ids):
                yield f"{name}: {role}_token_id {i} is no token"
        if role == "pad" and own is None:
            continue  # any token will do: it is masked
        if own is not None and own not in ids:
            yield f"{name}: {role}_token_id is {given}, the tokenizer's {own}"
        elif own is None and ids:
            yield f"{name}: {role}_token_id is {given}, and the tokenizer has none"


def audit_template(tokenizer: Tokenizer) -> Part:
    """Whether what heads and ends turns in conversations are single special tokens."""
    topic = "chat template"
    if tokenizer.chat_template is None:
        return Part((Finding(topic, "ok", "The tokenizer has no chat template.", {"template": False}),))
    try:
        literals = roles_of(tokenizer).specials
    except UserError as error:
        sentence = f"The template writes no plain turns of a user and an assistant: {error}"
        return Part((Finding(topic, "note", sentence, {"template": True}),))
    split = {one: len(tokenizer.encode(one)) for one in literals if one not in tokenizer.special_tokens}
    numbers: dict[str, Number] = {"template": True, "literals": len(literals), "not_special": len(split), **split}
    if split:
        named = ", ".join(f"{one!r} ({count} tokens)" for one, count in split.items())
        sentence = f"The template writes what is no special token, so that turns are cut as text: {named}."
        return Part((Finding(topic, "warning", sentence, numbers),))
    sentence = f"All {len(literals)} marks of the template are single special tokens."
    return Part((Finding(topic, "ok", sentence, numbers),))
