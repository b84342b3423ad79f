"""The page of a learned tokenizer's analysis: eleven pictures and what they are drawn from, in one file."""

from collections.abc import Mapping, Sequence
from typing import Any

from tokenkit.report.aligned import token
from tokenkit.report.charts import (
    Figure,
    Number,
    Scale,
    Series,
    bar_chart,
    column_chart,
    heat_map,
    histogram_chart,
    line_chart,
    point_chart,
    scale_of,
    short,
    small_multiples,
)
from tokenkit.report.page import page_templates

Values = Mapping[str, Any]
CLASSES = ("word with space", "upper case", "digits", "punctuation", "other")
MARKS = {1024: "1k", 8192: "8k", 32768: "32k", 65536: "64k"}
SHOWN_COLLISIONS, SHOWN_NEIGHBOURS = 12, 24
FIGURES = {
    "u1": "ids used at all (u1)",
    "u2": "perplexity of ids (u2)",
    "u3": "least digit entropy (u3)",
    "u3_mean": "mean digit entropy",
    "collisions": "strings sharing all codes",
    "collisions_first_code": "strings sharing the first",
    "learned_exact": "learned, exact",
    "learned_exact_types": "learned, exact, distinct",
}


def codebook_page(values: Values) -> str:
    """The page of what `analysis.json` holds: no script, nothing from elsewhere."""
    templates = page_templates()
    templates.filters["token"] = token
    templates.filters["short"] = short
    codes, neighbours = values.get("codes"), values.get("neighbours")
    return templates.get_template("codebook.html.jinja").render(
        values={**dict.fromkeys(("codes", "learned", "neighbours", "fingerprint")), **values},
        figures=figures(values),
        names=FIGURES,
        worst=codes["collisions"]["first_code"]["worst"][:SHOWN_COLLISIONS] if codes else [],
        neighbours=neighbours["sample"][:SHOWN_NEIGHBOURS] if neighbours else [],
    )


def figures(values: Values) -> list[Figure]:
    """The pictures that there is something to draw for."""
    found = [rank_frequency(values["usage"]), cumulative_coverage(values["usage"])]
    if "codes" in values:
        found += [digit_histograms(values["codes"]), digit_information(values["codes"])]
    if "learned" in values:
        found.append(exact_by_length(values["learned"]))
    found += training_course(values.get("history", {}))
    found.append(bytes_per_token(values))
    if "learned" in values:
        found += [logit_margins(values["learned"]), cell_margins(values["learned"])]
    if "codes" in values:
        found.append(collision_bars(values["codes"]))
    if "map" in values:
        found.append(grid_map(values["map"]))
    if values.get("baseline"):
        found.append(before_and_after(values["baseline"]["figures"], values["figures"]))
    return found


def rank_frequency(usage: Values) -> Figure:
    """Uses over rank, both on log scales."""
    sides = {"ids": usage["ranks"], "chunks": usage["chunk_ranks"]}
    lines = [Series(name, [(r, n) for r, n, _ in rows if n], tone) for tone, (name, rows) in enumerate(sides.items())]
    x = scale_of([r for line in lines for r, _ in line.points], "rank", log=True)
    y = scale_of([n for line in lines for _, n in line.points], "uses", log=True, room=0.06)
    return Figure("How often each is used", line_chart("uses over rank", lines, x, y), [(0, "ids"), (1, "chunks")])


def cumulative_coverage(usage: Values) -> Figure:
    """Share of the text that so many of the commonest ids and chunks are."""
    sides = {"ids": usage["ranks"], "chunks": usage["chunk_ranks"]}
    lines = [
        Series(name, [(r, share) for r, _, share in rows], tone) for tone, (name, rows) in enumerate(sides.items())
    ]
    x = scale_of([r for line in lines for r, _ in line.points], "size of the vocabulary", log=True)
    drawn = line_chart("coverage over size", lines, x, Scale(0, 1), {float(size): name for size, name in MARKS.items()})
    told = ", ".join(f"{name}: {usage['chunk_coverage'][str(size)]:.1%}" for size, name in MARKS.items())
    return Figure("Coverage", drawn, [(0, "ids"), (1, "chunks")], f"Chunks covered by the commonest {told}.")


def digit_histograms(codes: Values) -> Figure:
    """Share of strings on each level of each digit."""
    panels = [
        (f"{group + 1}.{place + 1}", mass)
        for group, digits in enumerate(codes["masses"])
        for place, mass in enumerate(digits)
    ]
    note = f"Code and digit below each; dashed: all levels alike. {codes['unreached_levels']} levels are never reached."
    return Figure("Digits", small_multiples("shares of levels", panels, len(codes["levels"])), note=note)


def digit_information(codes: Values) -> Figure:
    """What each digit tells of each other one."""
    matrix, size = codes["mutual_information_bits"], len(codes["levels"])
    labels = [f"{place // size + 1}.{place % size + 1}" for place in range(len(matrix))]
    apart = [value for row, values in enumerate(matrix) for column, value in enumerate(values) if row != column]
    most = max(apart, default=0.0)
    note = f"Bits that two digits have in common: {most:.3f} at most, {sum(apart) / max(1, len(apart)):.4f} on average."
    return Figure("Information shared by digits", heat_map("shared bits", matrix, labels, most, "bits"), note=note)


def exact_by_length(learned: Values) -> Figure:
    """Share of exact strings over their length, a line for each number of codes."""
    rows = learned["by_length"]
    lines = [
        Series(f"{kept} codes", [(int(n), row["exact_types"][str(kept)]) for n, row in rows.items()], tone, dots=True)
        for tone, kept in enumerate(learned["groups"])
    ]
    low = min((share for line in lines for _, share in line.points), default=0.0)
    x, y = (
        scale_of([int(n) for n in rows], "bytes of the chunk"),
        Scale(0 if low < 0.5 else 0.5 if low < 0.9 else 0.9, 1),
    )
    legend = [(line.tone, line.label) for line in lines]
    note = "Share of distinct chunks that network and quantiser alone give back."
    return Figure("Learned: exact by length", line_chart("exact over length", lines, x, y), legend, note)


def training_course(history: Mapping[str, Sequence[Sequence[Number]]]) -> list[Figure]:
    """What was logged in training, a picture each."""
    found = []
    for tone, (name, points) in enumerate(history.items()):
        pairs = [(float(step), float(value)) for step, value in points]
        if pairs:
            values = [value for _, value in pairs]
            log = min(values) > 0 and max(values) > 8 * min(values)
            drawn = line_chart(
                name,
                [Series(name, pairs, tone)],
                scale_of([s for s, _ in pairs], "step"),
                scale_of(values, "", log=log),
            )
            found.append(Figure(f"Training: {name.replace('_', ' ')}", drawn))
    return found


def bytes_per_token(values: Values) -> Figure:
    """Of this tokenizer and of others, corpus by corpus."""
    others = values.get("others", {})
    groups = {}
    for name, figures in values["corpora"].items():
        each = [figures["bytes_per_token"], *(other[name] for other in others.values())]
        groups[name] = [(tone, value, f"{value:.3f}") for tone, value in enumerate(each)]
    legend = [(tone, name) for tone, name in enumerate(["this tokenizer", *others])]
    return Figure("Bytes per token", bar_chart("bytes per token", groups), legend if others else [])


def logit_margins(learned: Values) -> Figure:
    """By how much the decoder's likeliest symbol leads at its weakest position."""
    margins = learned["logit_margins"]
    stacks = [("exact", margins["exact"]), ("not exact", margins["wrong"])]
    most = max(a + b for a, b in zip(margins["exact"], margins["wrong"]))
    drawn = histogram_chart(
        "leads", margins["edges"], stacks, "lead of the likeliest symbol (logits)", Scale(0, most or 1)
    )
    note = (
        f"At the weakest byte of each distinct chunk. {margins['exact_but_under']:.3%} are right by less than "
        f"{margins['required']:g}, and so are not trusted."
    )
    return Figure("Margins of the decoder", drawn, [(0, "exact"), (1, "not exact")], note)


def cell_margins(learned: Values) -> Figure:
    """How far latents are from the borders of their cells."""
    margins = learned["cell_margins"]
    drawn = histogram_chart(
        "distances",
        margins["edges"],
        [("share", margins["share"])],
        "distance (cell widths)",
        Scale(0, max(margins["share"]) or 1),
    )
    note = f"{margins['strings_under']:.3%} of the chunks have a digit nearer than {margins['required']:g} to a border."
    return Figure("Distance from the next cell", drawn, note=note)


def collision_bars(codes: Values) -> Figure:
    """How many codes have one string, two, three, ... ."""
    shared = codes["collisions"]["first_code"]
    sizes = {int(size): count for size, count in shared["histogram"].items()}
    columns = {str(size): sizes.get(size, 0) for size in range(1, 8)}
    columns["8+"] = sum(count for size, count in sizes.items() if size >= 8)
    most = max(columns.values())
    drawn = column_chart("collisions", columns, "strings on one code", Scale(0.5, 2 * max(most, 10), True))
    share = codes["collisions"]["all_codes"]["share"]
    note = f"Codes by their strings. {shared['share']:.2%} of the strings share the first, {share:.4%} all of them."
    return Figure("Collisions", drawn, note=note)


def grid_map(points: Sequence[Sequence[Any]]) -> Figure:
    """The commonest strings where their grid values differ the most."""
    tones = {name: tone for tone, name in enumerate(CLASSES)}
    drawn = point_chart("map of strings", [(x, y, tones[name], text) for x, y, name, text in points])
    legend = [(tones[name], name) for name in CLASSES if any(point[2] == name for point in points)]
    return Figure("Strings on the grid", drawn, legend, "The two main directions; point at one to read it.")


def before_and_after(before: Mapping[str, Number], after: Mapping[str, Number]) -> Figure:
    """The figures that both analyses have."""
    shared = [name for name in after if name in before]
    others = [max(before[name], after[name]) for name in shared if name not in FIGURES]
    groups = {}
    for name in shared:
        unit = 1.0 if name in FIGURES else max(others)  # shares against 1, bytes per token against the most
        label = FIGURES.get(name, name.replace("bytes_per_token/", "bytes per token, "))
        sides = ((4, before[name]), (0, after[name]))
        groups[label] = [(tone, value / unit, f"{value:.4g}") for tone, value in sides]
    return Figure("Before and after", bar_chart("before and after", groups), [(4, "before"), (0, "after")])
