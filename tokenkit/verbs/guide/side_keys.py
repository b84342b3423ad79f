"""The guide's keys of both models, the target tokenizer, the hypernetwork and the output."""

from typing import Any

from tokenkit.verbs.guide.keys import Given, Key

NETWORK = (
    "architecture",
    "num_layers",
    "num_heads",
    "residual",
    "residual_alpha",
    "residual_pooling",
    "use_attention",
    "use_attention_mask",
    "hidden_expansion_factor",
    "shared",
    "multiply_hidden_dim_by_num_embeddings",
    "pooling",
    "max_seq_length",
    "initializer_range",
)
LOW_RANK = "embeddings have no low-rank update of their own; train_embeddings trains them, hypernet predicts them"
HYPERNET = (
    *(
        Key(
            f"hypernet.{name}",
            f"hypernet.{name}",
            section="hypernet",
            note="identity is no network: rows are trained themselves" if name == "architecture" else "",
        )
        for name in NETWORK
    ),
    Key("hypernet.layer_norm_eps", note="layer norms have torch's own, 1e-5"),
    *(Key(f"hypernet.embedding_lora_{name}", refused=True, note=LOW_RANK) for name in ("rank", "alpha", "position")),
)
SIDES = (
    Key("student.pretrained_model_name_or_path", "model.source", note="the folder of a run is what it wrote"),
    Key("student.tokenizer_name", "model.tokenizer"),
    Key("student.revision", "model.revision"),
    Key("original.pretrained_model_name_or_path", "model.source"),
    Key("original.tokenizer_name", "model.tokenizer"),
    Key("new.pretrained_model_name_or_path", "model.source"),
    Key("new.tokenizer_name", "target_tokenizer", section="target"),
    Key(
        "teacher.pretrained_model_name_or_path",
        "teacher.source",
        note="none: the student before any change; of a student that is a run's folder, the teacher of that run",
    ),
    Key("teacher.tokenizer_name", "teacher.tokenizer"),
    Key("teacher.revision", "teacher.revision"),
    Key(
        "target_tokenizer",
        "target_tokenizer",
        section="target",
        mapping_is_ours=True,
        replaces=("target_tokenizer",),
        note="a folder, `byte`, or longest_prefix: the student's own read by longest prefixes",
    ),
    Key("target_tokenizer_name", "target_tokenizer", section="target", replaces=("target_tokenizer",)),
    Key("tokens_to_add", "target_tokenizer.tokens_to_add", section="target"),
    Key("special_tokens_mode", "data.special_tokens_mode"),
    Key("expand_input_ids", "expand_inputs"),
    Key("add_expanded_input_ids", "expand_inputs"),
    Key("output_embeddings_mode", "transfer.untie", {"preserve": False, "untie": True}, closed=True),
    Key("pad_to_multiple_of", "transfer.pad_to_multiple_of", note="1 by default; added rows stand for no token"),
)
OUTPUT = (
    Key("output", "output", section="output", note="never deleted: a new folder, or --resume"),
    Key("output_dir", "output", section="output"),
    Key("name", "output", section="output", note="outputs/NAME where no folder is written; else it is of no use"),
)
RUNNING = (
    Key("dry_run", "--dry-run", section="running", note="prints the whole run and leaves"),
    Key("do_cost_analysis", "--dry-run", section="running", note="with what it will take in memory and time"),
)
KEYS = (*SIDES, *HYPERNET, *OUTPUT, *RUNNING)


def hypernet(given: Given) -> dict[str, Any]:
    """The network's shape; none for `identity`, which learns nothing."""
    found = {
        f"hypernet.{name}": given.get(f"hypernet.{name}")
        for name in NETWORK
        if given.get(f"hypernet.{name}") is not None
    }
    if found.get("hypernet.architecture") == "identity":
        return {}
    return found


def target(given: Given) -> dict[str, Any]:
    """The target tokenizer as one string or, with added tokens, as a section."""
    name = given.first("target_tokenizer", "target_tokenizer_name", "new.tokenizer_name")
    added = given.get("tokens_to_add")
    if name == "longest_prefix":
        name = {"name": _students_own(given), "conversion": "longest_prefix"}
    if not added:
        return {"target_tokenizer": name}
    if name is None and given.names_ours("target_tokenizer"):
        return {"target_tokenizer.tokens_to_add": added}
    whole = name if isinstance(name, dict) else {"name": name or _students_own(given)}
    return {"target_tokenizer": {**whole, "tokens_to_add": added}}


def _students_own(given: Given) -> str | None:
    """The tokenizer that the student has before any change."""
    named = given.first("student.tokenizer_name", "original.tokenizer_name")
    named = named or given.first("student.pretrained_model_name_or_path", "original.pretrained_model_name_or_path")
    model = given.own_values().get("model") or {}
    return named or model.get("tokenizer") or model.get("source")


def output(given: Given) -> dict[str, Any]:
    """Where a run stands."""
    folder = given.first("output", "output_dir")
    if folder is None and not given.names_ours("output") and given.get("name") is not None:
        folder = f"outputs/{given.get('name')}"
    return {} if folder is None else {"output": folder}


def running(given: Given) -> dict[str, Any]:
    """Nothing of the run file: an option of the command."""
    return {"--dry-run": True} if given.get("dry_run") or given.get("do_cost_analysis") else {}


SECTIONS = {"hypernet": hypernet, "target": target, "output": output, "running": running}
