"""From the files of a run folder to what its card says."""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from tokenkit.config import UserError, differences, dump_yaml
from tokenkit.data.example import Window
from tokenkit.data.records import Record, sha256_of
from tokenkit.data.source import SourceConfig, describe
from tokenkit.data.stream import Rows, StreamedRows
from tokenkit.eval.harness import EvalRow, row_of
from tokenkit.export.private import plain_names, redacted
from tokenkit.losses import LOSSES
from tokenkit.models.count import config_parameters, inventory_of
from tokenkit.models.load import BASE, quiet
from tokenkit.objective import Objective
from tokenkit.report.card_facts import CardConfig, CardFacts, Measured, Place, curve_of, direction_of, figure
from tokenkit.report.runs import training_seconds
from tokenkit.verbs.distill_page import short_name
from tokenkit.verbs.distill_run import DistillRun
from tokenkit.verbs.model import ModelChoice

READ = ("source", "path", "hub", "saved", "record", "cloze", "plugins", "teacher")
READ += ("mined", "bias", "load", "name", "function")
NOT_COMPARED = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
MB = 1e6


@dataclass(frozen=True)
class Known:
    """The files of a run folder."""

    folder: Path
    run: dict[str, Any]
    results: dict[str, Any]
    provenance: dict[str, Any]
    losses: Mapping[int, float]
    metrics: Sequence[dict[str, Any]]


def model_facts(choice: ModelChoice) -> dict[str, Any]:
    """Where a model came from, its size and its configuration, as plain values; weights are not read."""
    folder = Path(choice.source)
    found: dict[str, Any] = {"source": choice.source, "revision": choice.revision, "local": folder.exists()}
    if folder.is_dir():
        return found | folder_facts(folder)
    with quiet():
        config = AutoConfig.from_pretrained(
            choice.source, revision=choice.revision, trust_remote_code=choice.trust_remote_code
        )
    return found | {"parameters": config_parameters(config), "config": config.to_diff_dict()}


def folder_facts(folder: Path) -> dict[str, Any]:
    """Size, number formats and configuration of a model folder."""
    inside = folder / BASE if (folder / BASE).is_dir() else folder
    found, config = inventory_of(str(inside)), inside / "config.json"
    sizes: dict[str, int] = {}
    for entry in found.stored:
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.elements * entry.itemsize
    return {
        "parameters": found.parameters,
        "stored_bytes": sum(path.stat().st_size for path in folder.rglob("*.safetensors")),
        "formats": sorted(sizes, key=lambda name: -sizes[name]),
        "config": AutoConfig.from_pretrained(inside).to_diff_dict() if config.is_file() else {},
    }


def data_facts(rows: Rows, held_out: Sequence[str], read: Mapping[str, int]) -> dict[str, Any]:
    """How much text there was, and a fingerprint of it; of a mixture the rows `read` of each source."""
    return _row_facts(rows) | {
        "read": dict(read),
        "held_out_documents": len(held_out),
        "held_out_bytes": sum(len(text.encode()) for text in held_out),
        "held_out_sha256": sha256_of(text.encode() for text in held_out),
    }


def _row_facts(rows: Rows) -> dict[str, Any]:
    if isinstance(rows, StreamedRows):  # never read whole
        return {}
    texts = [row.text if isinstance(row, Window) else json.dumps(row.messages, sort_keys=True) for row in rows]
    return {
        "rows": len(rows),
        "kind": "windows of text" if rows and isinstance(rows[0], Window) else "conversations",
        "sha256": sha256_of(text.encode() for text in texts),
    }


def facts_of(known: Known, config: CardConfig, target: Path) -> CardFacts:
    """What the card of one model folder of a run says."""
    run, results, made = known.run, known.results, known.provenance
    values, names = plain_names(run)
    trained = results.get("trained", results)
    benchmarks = results.get("benchmarks", {})
    name = config.name or known.folder.resolve().name
    threads = (made.get("made_with") or [{"threads": 1}])[-1]["threads"]
    return CardFacts(
        name=redacted(name),
        summary=_summary(known, name),
        verb=made.get("verb", "distill"),
        run_file=dump_yaml(values),
        command=f"OMP_NUM_THREADS={threads} tokenkit {made.get('verb', 'distill')} run.yaml",
        files=_files(run, values, names),
        license=config.license,
        language=config.language,
        base_models=_bases(made),
        relation="quantized" if _ternary_layers(results) else "finetune",
        datasets=list(dict.fromkeys([*config.datasets, *_hub_datasets(run)])),
        tags=_tags(made, results),
        made_with=made.get("made_with", []),
        sizes=_sizes(made, folder_facts(known.folder / "model"), folder_facts(target)),
        differences=_config_differences(made, known.folder / "model"),
        made=_made(results),
        objective=_objective(run, results),
        data=_data(known),
        curve=curve_of(known.losses),
        evaluation=_evaluation(results, trained),
        place=_place(run, made),
        benchmarks=_rows(benchmarks.get("trained", ())),
        teacher_benchmarks=_rows(benchmarks.get("teacher", ())),
        over_tasks=benchmarks.get("beside_teacher", {}),
        resources=_resources(known),
        limits=_limits(known, target),
    )


def _summary(known: Known, name: str) -> str:
    run, results = known.run, known.results
    text = f"trained for {results.get('steps', 0):,} steps"
    if "data" in run:
        text += f" on {_text(run['data'])}"
    teachers = [short_name(one["source"]) for one in known.provenance.get("teachers", ())]
    begun = known.provenance.get("student", {}).get("source")
    start = f", which began as `{short_name(begun)}`," if begun else ""
    taught = f" under the teacher{'s' if len(teachers) > 1 else ''} `{'`, `'.join(teachers)}`" if teachers else ""
    return redacted(f"`{name}`{start} was {text}{taught}, with tokenkit.")


def _text(data: Mapping[str, Any]) -> str:
    """The training text as a stranger may read it: of a mixture each name and its weight."""
    if data.get("source") is not None:
        return _source(data["source"])
    return ", ".join(f"{_source(one)} × {one['weight']:g}" for one in data.get("mixture", ()))


def _source(values: Mapping[str, Any]) -> str:
    """A source of text as a stranger may read it: the name alone."""
    known = {key: value for key, value in values.items() if key in SourceConfig.model_fields}
    source = SourceConfig.model_validate(known)
    hub = source.hub if source.hub and Path(source.hub).exists() else None
    local = source.path or source.saved or hub
    return describe(source) if local is None else Path(local).name


def _files(run: Mapping[str, Any], values: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    """The local files and folders that a run reads, under the names that its run file has for them."""
    written = {run.get("output")}
    absolute = [name for path, name in names.items() if path not in written]
    return sorted({re.sub(r"\.py:\w+$", ".py", name) for name in [*absolute, *_relative(values)]})


def _relative(value: Any, key: str = "") -> list[str]:
    if isinstance(value, Mapping):
        return [path for name, item in value.items() for path in _relative(item, name)]
    if isinstance(value, list):
        return [path for item in value for path in _relative(item, key)]
    if not isinstance(value, str) or key not in READ:
        return []
    path = Path(re.sub(r"\.py:\w+$", ".py", value))
    return [value] if not path.is_absolute() and path.exists() else []


def _bases(made: Mapping[str, Any]) -> list[str]:
    """Hub ids of the models that this one was made of."""
    models = [made["student"]] if "student" in made else []
    found = [one["source"] for one in [*models, *made.get("teachers", ())] if not one["local"]]
    return [source for source in dict.fromkeys(found) if HUB_ID.fullmatch(source)]


def _hub_datasets(run: Mapping[str, Any]) -> list[str]:
    data = run.get("data", {})
    hubs = [one.get("hub") for one in [data.get("source") or {}, *data.get("mixture", ())]]
    return [hub for hub in dict.fromkeys(hubs) if hub and not Path(hub).exists() and HUB_ID.fullmatch(hub)]


def _ternary_layers(results: Mapping[str, Any]) -> int:
    return len((results.get("ternary") or {}).get("converted", ()))


def _tags(made: Mapping[str, Any], results: Mapping[str, Any]) -> list[str]:
    """Only what the run did."""
    facts = {
        "distillation": made.get("taught", False),
        "tokenizer-transfer": bool(results.get("transfer")),
        "pruned": bool((results.get("student") or {}).get("pruned")),
        "bitnet": _ternary_layers(results) > 0,
        "1.58-bit": _ternary_layers(results) > 0,
    }
    return ["tokenkit", *(tag for tag, holds in facts.items() if holds)]


def _sizes(made: Mapping[str, Any], whole: Mapping[str, Any], target: Mapping[str, Any]) -> list[list[str]]:
    """A packed folder stores four weights a byte: its parameters are counted in the folder that is not packed."""
    rows = [["", "parameters", "stored MB", "formats"]]
    rows.append(_size("this model", {**target, "parameters": whole["parameters"]}))
    for teacher in made.get("teachers", ()):
        rows.append(_size(f"teacher {redacted(short_name(teacher['source']))}", teacher))
    return rows


def _size(name: str, facts: Mapping[str, Any]) -> list[str]:
    parameters, stored = facts.get("parameters"), facts.get("stored_bytes")
    return [
        name,
        "–" if parameters is None else f"{parameters:,}",
        "–" if stored is None else f"{stored / MB:,.3f}",
        ", ".join(facts.get("formats", ())) or "–",
    ]


def _config_differences(made: Mapping[str, Any], folder: Path) -> list[list[str]]:
    teachers = made.get("teachers", ())
    if len(teachers) != 1 or "config" not in teachers[0]:
        return []
    own, theirs = folder_facts(folder)["config"], teachers[0]["config"]
    keys = [key for key in differences(theirs, own) if key.split(".")[0] not in NOT_COMPARED]
    return [[key, _shown(_at(theirs, key)), _shown(_at(own, key))] for key in keys]


def _at(values: Any, path: str) -> Any:
    for key in path.split("."):
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def _shown(value: Any, longest: int = 60) -> str:
    text = "–" if value is None else str(value)
    return text if len(text) <= longest else f"{text[:longest]}…"


def _made(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    student, transfer, ternary = (results.get(key) or {} for key in ("student", "transfer", "ternary"))
    if student:
        kinds = {key: f"{len(student[key])} kinds of tensors" for key in ("copied", "random") if student[key]}
        told = {"teacher's layers": student["layers"], **kinds, "pruned": student["pruned"]}
        found += [(key, _shown(value, 400)) for key, value in told.items() if value]
    if transfer:
        sides = f"{redacted(short_name(transfer['source']))} → {redacted(short_name(transfer['target']))}"
        found.append(("tokenizer", f"{sides}, {transfer['rows']:,} rows by {transfer['initializer']}"))
    if ternary:
        share = f"{ternary['ternary_weights']:,} of {ternary['parameters']:,} weights are -1, 0 or 1"
        found.append(("ternary", f"{share}, in {_ternary_layers(results)} matrices"))
    if "attention" in results:
        found.append(("attention", results["attention"]))
    return found


def _objective(run: Mapping[str, Any], results: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    for name in results.get("losses", ()):
        options = run["losses"].get(name) or {}
        entry = LOSSES.get(name)
        about = "a loss of the user's own" if entry is None else sys.modules[entry.fn.__module__].__doc__ or ""
        found.append((f"`{name}` × {options.get('weight', 1.0):g}", about.strip().splitlines()[0]))
    for path, digest in results.get("plugins", {}).items():
        found.append((f"`{Path(path).name}`", f"sha256 {digest}"))
    return found


def _data(known: Known) -> list[tuple[str, str]]:
    run, data, counts = known.run, known.provenance.get("data", {}), known.provenance.get("counts", {})
    found = [("text", _text(run["data"]))] if "data" in run else []
    if "rows" in data:
        found.append(("rows", f"{data['rows']:,} {data['kind']}, sha256 {data['sha256']}"))
    if data.get("read"):
        found.append(("rows read", ", ".join(f"{count:,} of {name}" for name, count in data["read"].items())))
    if data:
        found.append(("held out", f"{data['held_out_documents']:,} documents, {data['held_out_bytes']:,} bytes"))
    if counts:
        padding = counts["positions"] - counts["tokens"]
        found.append(
            (
                "tokens",
                f"{counts['tokens']:,} valid ({counts['learnt']:,} of them learnt) and {padding:,} of padding, in "
                f"{counts['steps']:,} steps",
            )
        )
    return found


def _evaluation(results: Mapping[str, Any], trained: Mapping[str, Any]) -> list[Measured]:
    """Teacher, student before training, student after it."""
    found = []
    if results.get("teacher_bits_per_byte") is not None:
        found.append(Measured("teacher", {"bits_per_byte": results["teacher_bits_per_byte"]}, is_teacher=True))
    for name, values in (("before training", results.get("zero_shot", {})), ("this model", trained)):
        known = {key: value for key, value in values.items() if direction_of(key) and isinstance(value, int | float)}
        if known:
            found.append(Measured(name, known))
    return found


def _place(run: Mapping[str, Any], made: Mapping[str, Any]) -> Place | None:
    source = run.get("eval", {}).get("source")
    if source is None:
        return None
    hub = source.get("hub")
    num_bytes = made.get("data", {}).get("held_out_bytes")
    name = f"{_source(source)} (held out{'' if num_bytes is None else f', {num_bytes:,} bytes'})"
    is_id = hub is not None and not Path(hub).exists()
    return Place(hub if is_id else "text", name, source.get("split") if hub is not None else None)


def _rows(rows: Sequence[Mapping[str, Any]]) -> list[EvalRow]:
    return [row_of(values) for values in rows]


def _resources(known: Known) -> list[tuple[str, str]]:
    """Time of training and the most memory, from metrics.jsonl."""
    timed = [(float(line["step"]), float(line["time/step"])) for line in known.metrics if "time/step" in line]
    found = [("training", f"{training_seconds(timed):,.1f} s for {timed[-1][0]:,.0f} steps")] if timed else []
    speeds = [line["tokens_per_second"] for line in known.metrics if "tokens_per_second" in line]
    if speeds:
        found.append(("speed", f"{sum(speeds) / len(speeds):,.0f} learnt tokens per second"))
    names = {"memory/cuda_peak": "GPU memory at most", "memory/cpu_peak": "resident memory (RSS) at most"}
    for key, name in names.items():
        values = [line[key] for line in known.metrics if key in line]
        if values:
            found.append((name, f"{max(values) / MB:,.0f} MB"))
    return found


def _limits(known: Known, target: Path) -> list[str]:
    run, results = known.run, known.results
    beside = " and in the benchmarks above" if results.get("benchmarks") else ""
    found = [
        f"Measured on the held-out text{beside}, and on nothing else: neither safety nor bias, truth of facts or other "
        "languages.",
        f"One run, of seed {(run.get('train') or {}).get('seed', 0)}: what another seed changes is not known from it.",
    ]
    trained_in, stored = results.get("trained_bits_per_byte"), run.get("export_dtype", "float32")
    if trained_in is not None and (target.name != "model" or stored != "float32"):
        what = "packed" if target.name != "model" else stored
        found.append(f"{figure(trained_in)} bits per byte are those of the float32 weights, not of {what} ones.")
    return found


def distilled(
    run: DistillRun, objective: Objective, data: Mapping[str, Any], counts: Mapping[str, int]
) -> dict[str, Any]:
    """What is noted of a finished run of `tokenkit distill`; of a recorded teacher only its name."""
    found: dict[str, Any] = {"student": _quietly(run.model), "data": dict(data)}
    if run.record is not None:
        name = Record(run.record).manifest.teacher
        found["teachers"] = [{"source": name, "local": Path(name).exists()}]
    else:
        choices = [run.teacher] if run.teacher is not None else [*run.teachers] or [run.model]
        found["teachers"] = [_quietly(choice) for choice in choices]
    return found | {"counts": dict(counts), "taught": bool(objective.needs("teacher"))}


def _quietly(choice: ModelChoice) -> dict[str, Any]:
    """Where a model is of a kind that cannot be counted, its name is what is left."""
    try:
        return model_facts(choice)
    except UserError:
        return {"source": choice.source, "revision": choice.revision, "local": Path(choice.source).exists()}
