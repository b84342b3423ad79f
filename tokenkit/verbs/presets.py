"""Named runs of `tokenkit distill` that come with the package, and the same ones so small that they end in a minute."""

import copy
import difflib
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel

from tokenkit.config import UserError, build, override, read_run_file
from tokenkit.models.count import unique_parameters
from tokenkit.models.load import quiet
from tokenkit.models.shape import new_config
from tokenkit.models.student import build_student
from tokenkit.models.ternary import attach_ternary
from tokenkit.verbs.distill_run import DistillRun
from tokenkit.verbs.pretrain import PretrainRun, pretrain

FOLDER = Path(__file__).parents[1] / "assets" / "presets"
# The sizes of the published models, by hub id: enough to count weights and to make small ones of the same kind.
FAMILIES: dict[str, dict[str, Any]] = {
    "openai-community/gpt2": {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12},
    "Qwen/Qwen2-0.5B": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "microsoft/Phi-3-mini-4k-instruct": {
        "model_type": "phi3",
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "meta-llama/Llama-3.1-8B": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "HuggingFaceTB/SmolLM-135M": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "HuggingFaceTB/SmolLM-360M": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "tie_word_embeddings": True,
    },
    "HuggingFaceTB/SmolLM-1.7B": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "tie_word_embeddings": True,
    },
    "microsoft/phi-2": {
        "model_type": "phi",
        "vocab_size": 51200,
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
}
FAMILIES["microsoft/Phi-3.5-mini-instruct"] = FAMILIES["microsoft/Phi-3-mini-4k-instruct"]
SMALLER, SMALL_LAYERS, SMALL_STEPS = 16, 2, 20
WIDTHS = ("hidden_size", "intermediate_size", "n_embd")
SMALL_TEXT = {"source": {"stdlib": "train", "max_bytes": 200_000}, "window_bytes": 128}
SMALL_EVAL = {"source": {"stdlib": "held_out", "max_bytes": 4096}, "context_tokens": 64}


def preset_names() -> list[str]:
    """The presets there are."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def preset_values(name: str) -> dict[str, Any]:
    """The run file of a preset; UserError for a name of none."""
    known = preset_names()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"write one of {', '.join(known)}"
        raise UserError(f"preset: {name!r} is none; {hint}")
    return read_run_file(FOLDER / f"{name}.yaml")


def preset_run(name: str, words: list[str], *, smoke: bool = False) -> DistillRun:
    """The run of a preset with overrides; with `smoke` the small one, of a teacher that `train_teacher` makes."""
    values = small_values(name) if smoke else preset_values(name)
    for word in words:
        if "=" not in word:
            raise UserError(f"{word!r}: a run file beside preset={name}; give one of them, and key=value overrides")
        override(values, word)
    if smoke and "model.source" not in [word.lstrip("+").partition("=")[0] for word in words]:
        values["model"] = {"source": str(_teacher_folder(Path(values["output"])) / "model")}
    return build(DistillRun, values)


def small_values(name: str) -> dict[str, Any]:
    """A preset at a sixteenth of its widths, on two layers of the student's, for twenty steps of local text."""
    values = preset_values(name)
    values |= {"output": f"outputs/{name}-smoke", "data": SMALL_TEXT, "eval": SMALL_EVAL, "export_dtype": "float32"}
    optimizer = {**values["train"]["optimizer"], "learning_rate": 1e-3}
    values["train"] = {"steps": SMALL_STEPS, "batch_size": 4, "log_every": 5, "optimizer": optimizer}
    student = values.get("student")
    if student and "layers" in student:
        values["student"] = {**student, "layers": SMALL_LAYERS}
    if student and "config" in student:
        values["student"] = {**student, "config": _small(student["config"])}
    if "ternary" in values:
        values["ternary"] = {**values["ternary"], "warmup_steps": SMALL_STEPS // 4}
    return copy.deepcopy(values)


def _small(keys: dict[str, Any]) -> dict[str, Any]:
    """The same kind of model: a sixteenth as wide, two heads, and groups only where there were."""
    small = {key: value // SMALLER if key in WIDTHS else value for key, value in keys.items()}
    heads = keys.get("num_attention_heads", keys.get("n_head"))
    groups = keys.get("num_key_value_heads", heads)
    counts = {"n_layer": SMALL_LAYERS, "num_hidden_layers": SMALL_LAYERS, "n_head": 2, "num_attention_heads": 2}
    counts["num_key_value_heads"] = 2 if groups == heads else 1
    return {key: counts.get(key, value) for key, value in small.items()}


def _teacher_folder(output: Path) -> Path:
    return output.with_name(f"{output.name}-teacher")


def train_teacher(name: str, run: DistillRun, *, quiet: bool = False) -> None:
    """Makes the small teacher of a small run, twenty steps old, where there is none yet."""
    folder = _teacher_folder(run.output)
    if run.model.source != str(folder / "model") or (folder / "model").is_dir():
        return
    values = preset_values(name)
    keys = {key: value for key, value in FAMILIES[values["model"]["source"]].items() if key != "vocab_size"}
    model = _small(keys)
    if "layers" in values.get("student", {}):  # the student takes some of its layers
        model |= {key: 2 * SMALL_LAYERS for key in ("n_layer", "num_hidden_layers") if key in keys}
    teacher = build(
        PretrainRun,
        {
            "output": folder,
            "tokenizer": {"train": {"kind": "bpe", "vocab_size": 512}},
            "model": model,
            "export_dtype": "float32",
            "data": SMALL_TEXT,
            "train": {"steps": SMALL_STEPS, "batch_size": 4, "device": run.train.device},
            "eval": SMALL_EVAL,
        },
    )
    pretrain(teacher, resume=(folder / "run.yaml").is_file(), quiet=quiet)


def preset_models(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Teacher and student of a preset on the meta device: shapes without weights, made of the published sizes."""
    run = build(DistillRun, preset_values(name))
    keys = dict(FAMILIES[run.model.source])
    with torch.device("meta"), quiet():
        teacher = AutoModelForCausalLM.from_config(new_config(keys.pop("model_type"), keys, name))
        student = teacher if run.student is None else build_student(teacher, run.student, seed=0).model
        if run.ternary is not None:
            student = copy.deepcopy(student)
            attach_ternary(student, run.ternary.model_copy(update={"calibrate": False}))
    return teacher, student


def preset_table() -> list[list[str]]:
    """A header, then per preset its name, its teacher, and the weights of both."""
    rows = [["preset", "model", "weights", "the student's", "ternary"]]
    for name in preset_names():
        run = build(DistillRun, preset_values(name))
        counts = [f"{unique_parameters(model):,}" for model in preset_models(name)]
        rows.append([name, run.model.source, *counts, "no" if run.ternary is None else "yes"])
    return rows


def presets_view() -> Table:
    """The same for a terminal; the model's name may be folded, what one has to type may not."""
    header, *rows = preset_table()
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    for name in header:
        table.add_column(name, no_wrap=name != "model", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
