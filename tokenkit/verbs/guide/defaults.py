"""What stands in for the keys that the guide's commands leave out: models, text and lengths that need no network."""

from pathlib import Path
from typing import Any

from tokenkit.config import read_run_file
from tokenkit.train.folder import RUN_FILE
from tokenkit.verbs.guide.keys import Given

ASSETS = Path(__file__).parents[2] / "assets"
STUDENTS = (
    "student.pretrained_model_name_or_path",
    "original.pretrained_model_name_or_path",
    "new.pretrained_model_name_or_path",
)
LOSSES = ["sft", "alm_unconstrained"]  # what the original's documents recommend; they need no data of the pair
RECIPE: dict[str, Any] = {
    "output": "outputs/cross_tokenizer_distill",
    "train.steps": 5000,
    "train.seed": 1234,
    "train.precision": "bfloat16",
    "train.mode": "lora",
    "train.save_every": 5000,
    "train.optimizer.learning_rate": 1e-5,
    "train.optimizer.weight_decay": 0.01,
    "train.optimizer.schedule": "linear",
}
WARMUP_RATIO = 0.4  # 2,000 of 5,000 steps
WINDOW_BYTES = 2048  # 512 tokens
DEMO = {
    "student.pretrained_model_name_or_path": str(ASSETS / "demo_teacher"),
    "target_tokenizer_name": str(ASSETS / "demo_unigram"),
}
DEMO_SIZES: dict[str, Any] = {
    "train.optimizer.learning_rate": 1e-3,
    "data.window_bytes": 512,
}
TEXT: dict[str, Any] = {"data.source.stdlib": "train", "data.source.max_bytes": 1_000_000}
HELD_OUT: dict[str, Any] = {"eval.source.stdlib": "held_out", "eval.source.max_bytes": 24_576}
DATA = ("data.path", "data.dataset_configs", "data.dataset_name", "dataset_name", "dataset_path", "data.kind")
HELD_OUT_KEYS = ("ppl_eval_data", "val_split")
WARMUPS = ("warmup_steps", "optimizer.warmup_steps", "optimizer.warmup_ratio")


def distillation(given: Given) -> dict[str, Any]:
    """The guide's defaults. A run that names `model`, as a run file does, is one of ours and gets none."""
    if given.names_ours("model"):
        return {}
    found = dict(RECIPE)
    if not given.names_ours("losses"):
        _fall_back(given, {"losses": LOSSES})
    if not any(given.get(name) is not None for name in WARMUPS) and not given.names_ours("train.optimizer"):
        found["train.optimizer.warmup_ratio"] = WARMUP_RATIO
    student = given.first(*STUDENTS)
    if student is None:
        found |= DEMO_SIZES
        wanted = given.first("target_tokenizer", "new.tokenizer_name") or given.names_ours("target_tokenizer")
        _fall_back(given, {name: value for name, value in DEMO.items() if not wanted or name in STUDENTS})
        given.notices.append("student.pretrained_model_name_or_path: none, so the embedded model")
    else:
        found |= {"data.window_bytes": WINDOW_BYTES} | _teacher_of(given, student)
    if not any(given.get(name) for name in DATA) and not _names_source(given, "data.source", "data.mixture"):
        found |= TEXT
        given.notices.append("data: none, so the sources of Python's standard library; write data.path=FILE")
    if not any(given.get(name) for name in HELD_OUT_KEYS) and not _names_source(given, "eval.source"):
        found |= HELD_OUT
        given.notices.append("ppl_eval_data: none, so held-out sources of Python's standard library")
    return found


def _fall_back(given: Given, values: dict[str, Any]) -> None:
    """Keys of the guide that are not written."""
    for name, value in values.items():
        if given.get(name) is None:
            given.values[name], given.ranks[name] = value, -1


def _names_source(given: Given, *paths: str) -> bool:
    """Whether the run file's own form says where text comes from, and not only how much of it is read."""
    kinds = ("", ".path", ".hub", ".saved", ".stdlib")
    named = {f"{path}{kind}" for path in paths for kind in kinds}
    return any(key in named and value is not None for _, key, value in given.own)


def _teacher_of(given: Given, student: Any) -> dict[str, Any]:
    """The teacher of the run that the student comes from: a second stage goes on learning from the first one's."""
    file = Path(str(student)) / RUN_FILE
    named = "teacher.pretrained_model_name_or_path" in given.values or any(
        map(given.names_ours, ("teacher", "teachers", "record"))
    )
    if named or not file.is_file():
        return {}
    before = read_run_file(file)
    teacher = before.get("teacher") or before.get("model")
    if not isinstance(teacher, dict) or not teacher.get("source"):
        return {}
    given.notices.append(
        f"teacher.pretrained_model_name_or_path: none, so {teacher['source']}, as in the run {student}"
    )
    return {"teacher": {key: value for key, value in teacher.items() if value is not None and value is not False}}
