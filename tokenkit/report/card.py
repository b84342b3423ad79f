"""The model card: metadata for the hub, and a page: what a model is, made of what, how good, how to repeat it."""

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from tokenkit.eval.harness import EvalRow
from tokenkit.eval.summary import Direction
from tokenkit.export.private import redacted
from tokenkit.report.card_facts import (
    CardFacts,
    best,
    direction_of,
    figure,
    retention,
)
from tokenkit.report.provenance import DISTRIBUTION, PACKAGE_LICENSE, UNKNOWN
from tokenkit.report.tables import markdown_table
from tokenkit.version import __version__

NO_LICENSE = (
    "**No licence was chosen for this model.** Without one others may not use it; set `card.license` in the run file. "
    "The licences of the models and data it was made of hold in any case."
)
PRIVACY = (
    "This card holds no absolute paths, access tokens, user or machine names: they are taken out when it is written. "
    "Writing it sent nothing anywhere; a model is uploaded only where `push_to_hub: true` stands in the run file."
)
TASK = "text-generation"


def render_card(facts: CardFacts) -> str:
    """README.md of a model folder; a section without facts is left out."""
    sections = (
        ("Student and teacher", _difference(facts)),
        ("Objective", _pairs(facts.objective)),
        ("Data", _pairs(facts.data)),
        ("Training", _training(facts)),
        ("Evaluation", _evaluation(facts)),
        ("Benchmarks", _benchmarks(facts)),
        ("Resources", _pairs(facts.resources)),
        ("Reproduce", _reproduce(facts)),
        ("Made with", _made_with(facts)),
        ("Limits", "".join(f"- {line}\n" for line in facts.limits)),
        ("Privacy", f"{PRIVACY}\n"),
    )
    body = "".join(f"## {title}\n\n{text}\n" for title, text in sections if text)
    note = "" if facts.license else f"{NO_LICENSE}\n\n"
    text = f"---\n{card_data(facts).to_yaml()}\n---\n\n# {facts.name}\n\n{facts.summary}\n\n{note}{body}"
    return redacted(text).rstrip() + "\n"


def card_data(facts: CardFacts) -> ModelCardData:
    """The metadata: only what is so, nothing that is merely likely."""
    bases = [*facts.base_models]
    return ModelCardData(
        model_name=facts.name,
        library_name="tokenkit",
        pipeline_tag=TASK,
        tags=[*facts.tags] or None,
        base_model=bases[0] if len(bases) == 1 else bases or None,
        base_model_relation=facts.relation if bases else None,
        datasets=[*facts.datasets] or None,
        language=[*facts.language] or None,
        license=facts.license,
        tokenkit_version=facts.made_with[-1]["version"] if facts.made_with else __version__,
        eval_results=eval_results(facts) or None,
    )


def eval_results(facts: CardFacts) -> list[EvalResult]:
    """One result for each task, dataset and metric of the model itself."""
    own = [measured for measured in facts.evaluation if not measured.is_teacher][-1:]
    found = []
    if facts.place is not None:
        place = facts.place
        found = [
            EvalResult(
                task_type=TASK,
                dataset_type=redacted(place.dataset),
                dataset_name=redacted(place.name),
                dataset_split=place.split,
                metric_type=metric,
                metric_name=_spoken(metric),
                metric_value=value,
            )
            for measured in own
            for metric, value in measured.values.items()
        ]
    return found + [_result(row) for row in facts.benchmarks if row.value is not None]


def _result(row: EvalRow) -> EvalResult:
    how = {
        "backend": f"{row.backend} {row.version}",
        "task_version": row.task_version,
        "num_fewshot": row.num_fewshot,
        "limit": row.limit,
    }
    return EvalResult(
        task_type=TASK,
        task_name=row.task,
        dataset_type=redacted(row.dataset),
        dataset_name=redacted(row.dataset),
        dataset_config=row.config or row.task,  # the hub merges results of one data set and one config
        dataset_split=row.split,
        dataset_revision=row.revision,
        dataset_args={key: value for key, value in how.items() if value not in (None, "")},
        metric_type=row.metric,
        metric_name=f"{row.task}: {_spoken(row.metric)}",
        metric_value=row.value,
    )


def _spoken(metric: str) -> str:
    return metric.replace("_", " ")


def _arrow(direction: Direction | None) -> str:
    return "" if direction is None else " ↓" if direction == "min" else " ↑"


def _pairs(pairs: Sequence[tuple[str, str]]) -> str:
    return "".join(f"- {name}: {value}\n" for name, value in pairs)


def _difference(facts: CardFacts) -> str:
    parts = [markdown_table(facts.sizes)] if len(facts.sizes) > 1 else []
    if facts.made:
        parts.append(_pairs(facts.made))
    if facts.differences:
        rows = [["configuration", "teacher", "student"], *facts.differences]
        parts.append(markdown_table(rows))
    return "\n".join(parts)


def _training(facts: CardFacts) -> str:
    curve = facts.curve
    if curve is None:
        return ""
    return (
        f"Loss over {curve.steps:,} steps: first {figure(curve.first)}, lowest {figure(curve.lowest)}, last "
        f"{figure(curve.last)}.\n\n```\n{curve.course}\n```\n"
    )


def _evaluation(facts: CardFacts) -> str:
    metrics = list(dict.fromkeys(metric for measured in facts.evaluation for metric in measured.values))
    if not metrics or facts.place is None:
        return ""
    ways = {metric: direction_of(metric) for metric in metrics}
    rows = [["", *(f"{_spoken(metric)}{_arrow(ways[metric])}" for metric in metrics)]]
    own = [measured for measured in facts.evaluation if not measured.is_teacher]
    bold = {metric: best([m.values.get(metric) for m in own], ways[metric]) for metric in metrics}
    for measured in facts.evaluation:
        place = None if measured.is_teacher else own.index(measured)
        cells = [figure(measured.values.get(metric)) for metric in metrics]
        rows.append([measured.name, *(_bold(c, place in bold[m]) for c, m in zip(cells, metrics))])
    teacher = next((measured for measured in facts.evaluation if measured.is_teacher), None)
    if teacher is not None and own:
        kept = [retention(own[-1].values.get(m), teacher.values.get(m), ways[m]) for m in metrics]
        rows.append(["retention", *kept])
    text = f"On {facts.place.name}; ↓ lower is better, ↑ higher is better.\n\n{markdown_table(rows)}"
    return text + ("\nRetention is how good the model is beside its teacher; 100 % is as good.\n" if teacher else "")


def _benchmarks(facts: CardFacts) -> str:
    if not facts.benchmarks:
        return ""
    teacher = {(row.task, row.metric): row.value for row in facts.teacher_benchmarks}
    rows = [["task", "metric", "shots", "limit", "this model", "teacher", "retention"]]
    for row in facts.benchmarks:
        known = teacher.get((row.task, row.metric))
        bold = best([row.value, known], row.direction)
        rows.append(
            [
                row.task,
                f"{_spoken(row.metric)}{_arrow(row.direction)}" if row.metric else "–",
                "–" if row.num_fewshot is None else str(row.num_fewshot),
                "all" if row.limit is None else f"{row.limit:,}",
                _bold(figure(row.value), 0 in bold) if row.value is not None else row.note or "–",
                _bold(figure(known), 1 in bold),
                retention(row.value, known, row.direction),
            ]
        )
    measured = {f"{row.backend} ({row.version})" for row in facts.benchmarks if row.value is not None}
    by = f"\nMeasured by {', '.join(sorted(measured))}.\n" if measured else ""
    return markdown_table(rows) + by + _over_tasks(facts.over_tasks)


def _over_tasks(found: Mapping[str, float | int]) -> str:
    if not found:
        return ""
    return (
        f"\nBeside the teacher, over {found['tasks']:.0f} tasks: mean {100 * found['mean']:.1f} %, geometric mean "
        f"{100 * found['geometric_mean']:.1f} % (100 % is as good; ratios turned so that more is better).\n"
    )


def _bold(cell: str, on: bool) -> str:
    return f"**{cell}**" if on and cell != "–" else cell


def _reproduce(facts: CardFacts) -> str:
    began = facts.made_with[-1] if facts.made_with else {"version": __version__, "commit": UNKNOWN}
    files = "".join(f"- `{name}`\n" for name in facts.files)
    beside = f"Beside it lie, under these names:\n\n{files}\n" if files else ""
    return (
        f"In an empty folder, with {DISTRIBUTION} {began['version']} (commit {_commit(began)}), save the run file "
        f"below as `run.yaml`. {beside}Then:\n\n```sh\n{facts.command}\n```\n\n"
        "On a CPU, with the same versions and as many threads, the losses are the same to the last bit.\n\n"
        f"```yaml\n{facts.run_file.rstrip()}\n```\n"
    )


def _commit(made: Mapping[str, Any]) -> str:
    dirty = ", with changes that are not committed" if made.get("dirty") else ""
    return f"{made['commit']}{dirty}"


def _made_with(facts: CardFacts) -> str:
    parts = []
    for number, made in enumerate(facts.made_with):
        versions = ", ".join(f"{name} {version}" for name, version in made["libraries"].items())
        when = "" if len(facts.made_with) == 1 else "The run began with " if number == 0 else "It went on with "
        parts.append(
            f"{when}{DISTRIBUTION} {made['version']} ({PACKAGE_LICENSE}), commit {_commit(made)}; "
            f"Python {made['python']} on {made['system']}, {made['device']}, {made['threads']} threads.\n\n"
            f"{versions}.\n"
        )
    return "\n".join(parts)
