"""The guide's keys of data and evaluation: what is trained on, how it is read, what a model is measured on."""

import difflib
from collections.abc import Mapping
from typing import Any

from tokenkit.config import UserError
from tokenkit.verbs.guide.keys import Given, Key

KINDS = ("jsonl", "hf", "hf_saved")
FILES = ("json", "text", "parquet")  # loaders of `datasets` for files of one's own
MARKERS = {"dolly": "### Response:\n", "openmath2": "<|start_header_id|>assistant<|end_header_id|>\n\n"}
BYTES_PER_TOKEN = 4  # of English under vocabularies of 32,000 and more: what lengths in tokens are taken for
SOURCE_KEYS = {"name": "hub_name", "split": "split", "revision": "revision", "field": "field", "data_files": "path"}
SOURCES = ("data.source", "data.mixture")
LENGTHS = ("max_teacher_length", "max_student_length", "max_length_teacher", "max_length_new")
DATA = (
    Key("data.kind", "data.source", section="data", note="jsonl: `path`; hf: `hub`; hf_saved: `saved`"),
    Key("data.path", "data.source.path", section="data", replaces=SOURCES),
    Key(
        "data.dataset_configs",
        "data.source or data.mixture",
        section="data",
        replaces=SOURCES,
        note="`p` is weight, `lang_code` language",
    ),
    Key("data.lang_code", "data.mixture.*.language", section="data", note="of one source without effect"),
    Key("data.n_subsample", "data.source.max_documents", section="data", note="the first so many rows"),
    *(Key(f"{at}dataset_name", "data.source.hub", section="data", replaces=SOURCES) for at in ("", "data.")),
    *(Key(f"{at}dataset_config_name", "data.source.hub_name", section="data") for at in ("", "data.")),
    *(Key(f"{at}split", "data.source.split", section="data") for at in ("", "data.")),
    Key("dataset_path", "data.source.path", section="data", replaces=SOURCES),
    Key("max_train_examples", "data.source.max_documents", section="data"),
    Key("data.mix_languages", "data.mix_languages", section="languages", note="of several datasets"),
    Key("data.streaming", "data.streaming"),
    Key(
        "data.shuffle_buffer_size",
        "data.shuffle_buffer",
        section="shuffling",
        note="of streams; else every epoch has an order of its own over all rows, which inf and null ask for",
    ),
    Key("num_workers", "data.workers"),
    Key("data.num_workers", "data.workers"),
    *(
        Key(name, "data.window_bytes", section="lengths", note=f"the smaller one, {BYTES_PER_TOKEN} bytes a token")
        for name in LENGTHS
    ),
    Key("use_chat_template", "data.format", section="chat", note="true is `chat`: rows hold messages; else `text`"),
    Key("chat_template_mode", section="chat", note="text begins with the start token; a conversation is written whole"),
    Key("loss_mask_mode", "data.learn_after", {"null": None, **MARKERS}, closed=True),
)
HARNESS = {
    "tasks": "tasks",
    "limit": "limit",
    "num_fewshot": "num_fewshot",
    "add_bos": "add_bos",
    "tokens_per_batch": "batch_tokens",
    "lengths": "max_length",
    "chat_template_mode": "apply_chat_template",
    "confirm_run_unsafe_code": "confirm_run_unsafe_code",
}
HARNESS_NOTES = {
    "lengths": "the largest",
    "chat_template_mode": "surround_instruct is true, direct_encode and its kin false",
    "tasks": "needs the package lm-eval, and the data of its tasks",
}


def harness_keys(at: str) -> tuple[Key, ...]:
    """The keys of tasks, whose section here is `at`."""
    return tuple(
        Key(f"eval.{name}", f"{at}.{ours}", section="harness", note=HARNESS_NOTES.get(name, ""))
        for name, ours in HARNESS.items()
    )


HELD_OUT = (
    Key(
        "ppl_eval_data",
        "eval.source",
        section="held_out",
        replaces=("eval.source",),
        note="as `data`, or the path of a file; bits per byte",
    ),
    Key("val_split", "eval.source.split", section="held_out", note="of the training data's dataset"),
    Key("max_val_examples", "eval.source.max_documents", section="held_out"),
)
EVAL = (
    *harness_keys("eval.harness"),
    Key("skip_lm_eval", "eval.harness", section="harness", note="true is none"),
    *HELD_OUT,
)
KEYS = (*DATA, *EVAL)


def data(given: Given) -> dict[str, Any]:
    """The source of the training text, or a mixture of several."""
    section = {key.removeprefix("data."): value for key, value in given.values.items() if key.startswith("data.")}
    rows = given.first("data.n_subsample", "max_train_examples")
    section |= {key: given.get(key) for key in ("dataset_name", "dataset_config_name", "split") if given.get(key)}
    if given.get("dataset_path"):
        section |= {"path": given.get("dataset_path"), "kind": "jsonl"}
    sources = sources_of(section | ({"n_subsample": rows} if rows else {}), "data")
    if len(sources) == 1:
        source, _, language = sources[0]
        if language is not None:
            given.warnings.append("data.lang_code has no effect: there is one source, and so one language")
        return {f"data.source.{key}": value for key, value in source.items()}
    return {
        "data.mixture": [
            {**source, "weight": weight, **({"language": language} if language is not None else {})}
            for source, weight, language in sources
        ]
    }


def sources_of(section: Mapping[str, Any], at: str) -> list[tuple[dict[str, Any], float, str | None]]:
    """The sources of a guide's section of data, each with its share and its language."""
    kind = section.get("kind") or _kind_of(section)
    if kind is not None and kind not in KINDS:
        close = difflib.get_close_matches(str(kind), KINDS, n=1)
        raise UserError(
            f"{at}.kind: {kind!r}, {f'did you mean {close[0]!r}?' if close else ''} it is jsonl, hf or hf_saved"
        )
    rows = {"max_documents": section["n_subsample"]} if section.get("n_subsample") else {}
    language = section.get("lang_code")
    if kind == "jsonl":
        if not section.get("path"):
            raise UserError(f"{at}.path: missing; write the file of data.kind=jsonl")
        return [({"path": section["path"], **rows}, 1.0, language)]
    configs = section.get("dataset_configs")
    if configs is None and section.get("dataset_name"):
        named = {
            "path": section["dataset_name"],
            "name": section.get("dataset_config_name"),
            "split": section.get("split"),
        }
        configs = [{"kwargs": {key: value for key, value in named.items() if value is not None}}]
    if kind is None or not isinstance(configs, list) or not configs:
        raise UserError(
            f"{at}.dataset_configs: missing; write data.kind=jsonl with data.path=FILE, or a list of datasets"
        )
    found: list[tuple[dict[str, Any], float, str | None]] = []
    for place, config in enumerate(configs):
        where = f"{at}.dataset_configs.{place}"
        if not isinstance(config, dict):
            raise UserError(f"{where}: {config!r} is no mapping; write {{lang_code: en, kwargs: {{path: NAME}}, p: 1}}")
        values: dict[str, Any] = config
        source = _source(values, kind, where) | rows
        found.append((source, float(values.get("p") or 1.0), values.get("lang_code", language)))
    return found


def _kind_of(section: Mapping[str, Any]) -> str | None:
    if section.get("dataset_configs") or section.get("dataset_name"):
        return "hf"
    return "jsonl" if section.get("path") else None


def _source(config: Mapping[str, Any], kind: str, at: str) -> dict[str, Any]:
    """One dataset, as a source."""
    if kind == "hf_saved":
        return {"saved": config.get("path")}
    given = dict(config.get("kwargs") or {})
    path = given.pop("path", None)
    given.pop("streaming", None)  # data.streaming says it
    for key in sorted(given.keys() - SOURCE_KEYS.keys()):
        raise UserError(f"{at}.kwargs.{key}: is not read; a dataset has path, {', '.join(SOURCE_KEYS)}")
    found = {SOURCE_KEYS[key]: value for key, value in given.items() if value is not None}
    if path in FILES:
        found.pop("split", None)
        return found
    return {"hub": path, **found}


def languages(given: Given) -> dict[str, Any]:
    """Whether a step is of one language; of one source there is nothing to say."""
    mix = bool(given.get("data.mix_languages"))
    several = len(given.get("data.dataset_configs") or []) > 1 or given.names_ours("data.mixture")
    if not several and not mix:
        given.warnings.append("data.mix_languages has no effect: there is one source, and so one language")
    return {"data.mix_languages": mix} if several else {}


def shuffling(given: Given) -> dict[str, Any]:
    """The buffer that a stream is shuffled in."""
    size = given.get("data.shuffle_buffer_size")
    return {"data.shuffle_buffer": size} if isinstance(size, int) and given.get("data.streaming") else {}


def lengths(given: Given) -> dict[str, Any]:
    """Bytes of a row, so that both sides see the same text; of conversations tokens, which is what is counted there."""
    teacher = given.first("max_teacher_length", "max_length_teacher")
    student = given.first("max_student_length", "max_length_new")
    own_format = (given.own_values().get("data") or {}).get("format")
    chat = own_format == "chat" if own_format else bool(chat_format(given))
    wanted = str(given.first("target_tokenizer", "target_tokenizer_name", "new.tokenizer_name") or "")
    per_student = 1 if wanted.split(":")[0] == "byte" or "conversion=byte" in wanted.split(":") else BYTES_PER_TOKEN
    found = [(teacher, 1 if chat else BYTES_PER_TOKEN), (student, 1 if chat else per_student)]
    return {"data.window_bytes": min(length * size for length, size in found if length is not None)}


def chat(given: Given) -> dict[str, Any]:
    """Whether rows hold conversations."""
    mode = str(given.get("chat_template_mode", "direct_encode"))
    if mode == "surround_instruct":
        raise UserError(
            "chat_template_mode: 'surround_instruct' asks a question, where a student learns whole texts; write "
            "direct_encode, and use_chat_template=true for conversations"
        )
    if not mode.startswith("direct_encode"):
        raise UserError(f"chat_template_mode: {mode!r} is not known; write direct_encode, or leave it out")
    return {} if given.get("use_chat_template") is None else {"data.format": "chat" if chat_format(given) else "text"}


def chat_format(given: Given) -> bool:
    """The guide reads messages of `hf` datasets alone; the other kinds hold text."""
    return bool(given.get("use_chat_template")) and given.get("data.kind", "hf") == "hf" and not given.get("data.path")


def harness(given: Given, at: str = "eval.harness") -> dict[str, Any]:
    """The tasks that a finished model is measured on, and how; none without tasks."""
    if given.get("skip_lm_eval"):
        return {at: None}
    tasks, own = given.get("eval.tasks"), given.names_ours(at)
    others = [name for name in HARNESS if name != "tasks" and f"eval.{name}" in given.values]
    if not tasks and not own:
        given.warnings += [f"eval.{name} has no effect: eval.tasks names none" for name in others]
        return {}
    found = {f"{at}.tasks": [tasks] if isinstance(tasks, str) else tasks} if tasks else {}
    for name in others:
        value = given.get(f"eval.{name}")
        if name == "lengths" and value:
            value = max(value) if isinstance(value, list) else value
        if name == "chat_template_mode":
            value = _asked_as(str(value))
        found[f"{at}.{HARNESS[name]}"] = value
    return found


def _asked_as(mode: str) -> bool:
    if mode != "surround_instruct" and not mode.startswith("direct_encode"):
        raise UserError(f"eval.chat_template_mode: {mode!r} is not known; write surround_instruct or direct_encode")
    return mode == "surround_instruct"


def held_out(given: Given) -> dict[str, Any]:
    """The held-out text."""
    data_given = given.get("ppl_eval_data")
    rows = {"max_documents": given.get("max_val_examples")} if given.get("max_val_examples") else {}
    if isinstance(data_given, str):
        return {f"eval.source.{key}": value for key, value in {"path": data_given, **rows}.items()}
    if isinstance(data_given, dict):
        sources = sources_of(data_given, "ppl_eval_data")
        if len(sources) > 1:
            raise UserError("ppl_eval_data.dataset_configs: several, where one text is held out; keep one")
        return {f"eval.source.{key}": value for key, value in (sources[0][0] | rows).items()}
    if given.get("val_split") is None:
        return {f"eval.source.{key}": value for key, value in rows.items()}
    name = given.first("dataset_name", "data.dataset_name")
    if name is None:
        raise UserError("val_split: of which dataset? write dataset_name, or ppl_eval_data=FILE")
    configuration = given.first("dataset_config_name", "data.dataset_config_name")
    of = {"hub": name, "split": given.get("val_split"), **({"hub_name": configuration} if configuration else {})}
    return {f"eval.source.{key}": value for key, value in (of | rows).items()}


SECTIONS = {
    "data": data,
    "languages": languages,
    "shuffling": shuffling,
    "lengths": lengths,
    "chat": chat,
    "harness": harness,
    "held_out": held_out,
}
