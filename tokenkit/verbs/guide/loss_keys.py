"""The guide's losses and all that tunes them, as the `losses:` section and the chunks of `data:`."""

import difflib
from pathlib import Path
from typing import Any

from tokenkit.config import UserError
from tokenkit.losses import LOSSES
from tokenkit.verbs.guide.keys import Given, Key

NAMES: dict[str, tuple[str, str | None]] = {  # the loss here, and which chunks it is over
    "sft": ("clm", None),
    "clm": ("clm", None),
    "alm": ("alm", "unbiased"),
    "alm_unbiased": ("alm", "unbiased"),
    "alm_unconstrained": ("alm", "unconstrained"),
    "alm_greedy": ("alm", "unconstrained"),
    "alm_space": ("alm", "space"),
    "alm_latents": ("hidden_states", None),
    "alm_side_path": ("side_path", None),
    "alm_side_path_unbiased": ("side_path", "unbiased"),
    "alm_side_path_unconstrained": ("side_path", "unconstrained"),
    "alm_side_path_space": ("side_path", "space"),
    "baseline_dskd": ("dskd", None),
    "baseline_uld": ("uld", None),
    "baseline_mined": ("mined", None),
    "baseline_minED": ("mined", None),
}
AS_PUBLISHED: dict[str, dict[str, Any]] = {"alm": {"preset": "upstream"}, "uld": {"positions": "positional"}}
DIVERGENCES = {
    "binary_ce": "ce",
    "binary_kl": "kl",
    "reverse_binary_kl": "reverse_kl",
    "binary_kl_temp_limit": "kl_limit",
    "abs": "abs",
    "abs_exp": "tvd",
    "renyi": "renyi",
    "joschu_k2": "k2",
    "joschu_k3": "k3",
}
DUAL = {"srkl": "skewed_reverse_kl", "skl": "skewed_kl", "rkl": "reverse_kl", "akl": "adaptive_kl", "kl": "kl"}
STATES = {"last_hidden_state": "last", "all_hidden_states": "all", "qkv": "qkv"}
MAPPINGS = {"mined": "mined", "exact_match": "exact", "bias_threshold": "unbiased"}
MODE_WORDS = ("merge_by_space_prob", "append_space", "eos_as_space", "space_merge")
SPACES = "space+tab+newline+special"

OPTIONS = (  # of one loss or two: the guide's key, the loss here, its option, values
    ("binarization_temp", "alm", "temperature", {}),
    ("bce_temp", "alm", "temperature", {}),
    ("alm_diff_fn", "alm", "divergence", DIVERGENCES),
    ("renyi_alpha", "alm", "renyi_order", {}),
    ("distill_main_path_numerator", "alm", "numerator", {}),
    ("distill_main_path_denominator", "alm", "denominator", {}),
    ("distill_chunk_sizes", "alm", "chunk_sizes", {}),
    ("latents_to_align", "hidden_states", "states", STATES),
    ("latents_normalization", "hidden_states", "normalization", {}),
    ("latents_chunks", "hidden_states", "chunks", {"unconstrained": "naive"}),
    ("latents_do_project", "hidden_states", "project", {}),
    ("side_path_distance_fn", "side_path", "distance", {}),
    ("side_path_mapping_mode", "side_path", "mapping", MAPPINGS),
    ("baseline.divergence", "dskd", "divergence", DUAL),
    ("baseline.adaptive_kl_alpha", "dskd", "adaptive_alpha", {}),
    ("baseline.skew_lambda", "dskd", "skew", {}),
    ("baseline.teacher_temperature", "dskd", "teacher_temperature", {}),
    ("baseline.kd_temp", "dskd", "temperature", {}),
)
KEYS = (
    Key(
        "losses",
        "losses",
        section="losses",
        mapping_is_ours=True,
        replaces=("losses",),
        note=", ".join(f"{name} is `{ours}`" for name, (ours, _) in NAMES.items() if name != ours)
        + "; names from here stay; ALM begins with the published options (`preset: upstream`), ULD with `positional`",
    ),
    Key("loss_weights", "losses.*.weight", section="losses", note="in the order of `losses`; null is 1"),
    Key("loss_schedules", "losses.*.schedule", section="losses", note="by name, or in the order of `losses`"),
    *(
        Key(name, f"losses.{loss}.{option}", values, section="losses")
        for name, loss, option, values in OPTIONS
        if name != "baseline.kd_temp"
    ),
    Key("baseline.kd_temp", "losses.dskd.temperature, losses.mined.temperature", section="losses"),
    Key(
        "alm_mode",
        "losses.alm.merge, debias, boundary",
        section="losses",
        note="merge_by_space_prob is merge, append_space is debias, eos_as_space is boundary=eos; space_merge does "
        "nothing, there and here",
    ),
    Key(
        "space_mask_mode",
        section="losses",
        note=f"text may be cut before {SPACES}; another set is an error",
    ),
    Key(
        "tokenizer_pair_data_path",
        "data.bias, data.mined",
        section="losses",
        note="the folder of compute_tokenizer_info.py, of compute_mined_mapping.py, or of both",
    ),
    Key("tokenizer_pair_bias_threshold", "losses.alm.threshold, data.bias_threshold", section="losses"),
    Key("tokenizer_pair_bias_threshold_side_path", "data.bias_threshold", section="losses"),
    Key("baseline.kd_rate", note="it was read by no loss"),
)


def losses(given: Given) -> dict[str, Any]:
    """The losses with weights and options, and the chunks they are over."""
    listed = given.get("losses")
    found: dict[str, Any] = {}
    chosen: dict[str, dict[str, Any]] = {}
    if listed is not None:
        chosen, chunks = _named(listed)
        _weigh(given, listed, chosen)
        if chunks is not None:
            found["data.chunks"] = chunks
    else:
        for name in ("loss_weights", "loss_schedules"):
            if given.get(name):
                raise UserError(
                    f"{name}: goes with losses=[...]; beside `losses: {{...}}` write losses.NAME.{name[5:-1]}"
                )
        chosen = {name: {} for name, options in (given.own_values().get("losses") or {}).items() if options is not None}
    _options(given, chosen)
    _pair_data(given, found, chosen)
    for name, options in chosen.items():
        found |= {f"losses.{name}": {}} | {f"losses.{name}.{key}": value for key, value in options.items()}
    return found


def _named(listed: Any) -> tuple[dict[str, dict[str, Any]], str | None]:
    """The sections of the losses in a list, as published, and which chunks they ask for."""
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise UserError(f"losses: {listed!r} is no list of names; write losses=[sft, alm_unconstrained]")
    chosen: dict[str, dict[str, Any]] = {}
    asked: dict[str, str] = {}
    for name in listed:
        ours, chunks = NAMES.get(name, (name, None))
        if name not in NAMES and name not in LOSSES:
            close = difflib.get_close_matches(name, [*NAMES, *LOSSES], n=1, cutoff=0.6)
            hint = f"did you mean {close[0]!r}?" if close else f"the guide has {', '.join(NAMES)}"
            raise UserError(
                f"losses: {name!r} is not known; {hint} (one of your own: plugins=[FILE] losses={{{name}: {{}}}}, "
                "docs/own_loss.md)"
            )
        if ours in chosen:
            raise UserError(f"losses: {name!r} is {ours!r} here, which stands twice; keep one of {', '.join(listed)}")
        chosen[ours] = dict(AS_PUBLISHED.get(ours, {})) if name in NAMES else {}
        if chunks is not None:
            asked[chunks] = name
    if len(asked) > 1:
        first, second = list(asked.values())[:2]
        raise UserError(f"losses: {first} beside {second}: chunks are those of the whole run (data.chunks); keep one")
    return chosen, next(iter(asked), None)


def _weigh(given: Given, listed: list[str], chosen: dict[str, dict[str, Any]]) -> None:
    """Puts weights and schedules where the losses are."""
    weights, schedules = given.get("loss_weights"), given.get("loss_schedules")
    for key, values in (("loss_weights", weights), ("loss_schedules", schedules)):
        if isinstance(values, list) and len(values) != len(listed):
            raise UserError(f"{key}: {len(values)} of them, where losses names {len(listed)}; write one for each")
    if weights is not None and not isinstance(weights, list):
        raise UserError(f"loss_weights: {weights!r} is no list; write one number for each of {', '.join(listed)}")
    by_name = dict(zip(listed, schedules)) if isinstance(schedules, list) else schedules or {}
    for name in by_name:
        if name not in listed:
            close = difflib.get_close_matches(str(name), listed, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"losses names {', '.join(listed)}"
            raise UserError(f"loss_schedules: {name!r} is none of the losses; {hint}")
    for place, name in enumerate(listed):
        section = chosen[NAMES.get(name, (name, None))[0]]
        if weights is not None and weights[place] is not None:
            section["weight"] = weights[place]
        if by_name.get(name) is not None:
            section["schedule"] = by_name[name]


def _options(given: Given, chosen: dict[str, dict[str, Any]]) -> None:
    """Puts options where their losses are; a line for those whose loss is not there."""
    unused = []
    for name, loss, option, values in (*OPTIONS, ("baseline.kd_temp", "mined", "temperature", {})):
        value = given.get(name)
        if value is None:
            continue
        if loss in chosen:
            chosen[loss][option] = values.get(str(value), value)
        elif name != "baseline.kd_temp" or not {"dskd", "mined"} & chosen.keys():
            unused.append((name, loss))
    given.warnings += [f"{name} has no effect: {loss} is not among the losses" for name, loss in dict(unused).items()]
    _alm_mode(given, chosen)
    if given.get("space_mask_mode", SPACES) != SPACES:
        raise UserError(
            f"space_mask_mode: {given.get('space_mask_mode')!r} is not made; write {SPACES}, or leave it out"
        )


def _alm_mode(given: Given, chosen: dict[str, dict[str, Any]]) -> None:
    mode = given.get("alm_mode")
    if mode is None:
        return
    words = [word.strip() for word in str(mode).split("+") if word.strip()]
    for word in words:
        if word not in MODE_WORDS:
            close = difflib.get_close_matches(word, MODE_WORDS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"write {', '.join(MODE_WORDS[:3])}, joined by +"
            raise UserError(f"alm_mode: {word!r} is not known; {hint}")
    if "alm" not in chosen:
        given.warnings.append("alm_mode has no effect: alm is not among the losses")
        return
    chosen["alm"]["merge"] = "merge_by_space_prob" in words
    chosen["alm"]["debias"] = "append_space" in words
    chosen["alm"]["boundary"] = "eos" if "eos_as_space" in words else "space"


def _pair_data(given: Given, found: dict[str, Any], chosen: dict[str, dict[str, Any]]) -> None:
    """What was measured of the pair of tokenizers, and up to where a bias is none."""
    threshold = given.get("tokenizer_pair_bias_threshold")
    if threshold is not None and "alm" in chosen:
        chosen["alm"]["threshold"] = threshold
    side = given.get("tokenizer_pair_bias_threshold_side_path")
    limit = threshold if side is None or "side_path" not in chosen else side
    if limit is not None:
        found["data.bias_threshold"] = limit
    path = given.get("tokenizer_pair_data_path")
    folder = None if path is None else Path(str(path))
    wants_bias = found.get("data.chunks") == "unbiased" or chosen.get("side_path", {}).get("mapping") == "unbiased"
    if folder is None:
        if wants_bias and not given.names_ours("data.bias"):
            raise UserError(
                "tokenizer_pair_data_path: missing, and alm_unbiased reads what scripts/compute_tokenizer_info.py "
                "writes there; write its folder, or losses=[sft, alm_unconstrained], which need none"
            )
        return
    if (folder / "mined_mapping.safetensors").is_file():
        found["data.mined"] = str(folder)
    if wants_bias or (folder / "bias.safetensors").is_file():
        found["data.bias"] = str(folder)


SECTIONS = {"losses": losses}
