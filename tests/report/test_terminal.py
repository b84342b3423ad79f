"""Tables keep every figure whole at any width; a pipe gets plain text, and a line now and then."""

import ast
import copy
import datetime
import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

import tokenkit
from tokenkit.align.doctor import diagnose
from tokenkit.align.doctor_facts import Finding
from tokenkit.align.doctor_show import render
from tokenkit.eval.audit_facts import Audit, Part
from tokenkit.eval.size_difference import difference
from tokenkit.models.count import inventory_of
from tokenkit.plugins.checks import Check
from tokenkit.report import progress as progress_module
from tokenkit.report.audit import render_audit
from tokenkit.report.claim_tables import claims_tables
from tokenkit.report.claims import Claim, Machine, Row
from tokenkit.report.content import Bar
from tokenkit.report.inventory import render_difference, render_inventory
from tokenkit.report.progress import progress, stages
from tokenkit.report.tables import bits_per_byte_table
from tokenkit.report.terminal import fitted, show
from tokenkit.tokenizers.bytelevel import ByteTokenizer
from tokenkit.verbs.benchmarks import benchmark_table
from tokenkit.verbs.check_loss import table as check_table
from tokenkit.verbs.eval_lockstep import lockstep_table
from tokenkit.verbs.evaluate import SHOWN, before_after_table
from tokenkit.verbs.presets import presets_view

FIGURE = re.compile(r"(?<![\w./-])(?:\d[\d,.]*\d|\d)(?![\w/-])")  # not the 3.1 of a model's name
SHAPES = "gpt2:n_layer=2,n_embd=64,n_head=4"
NAME = "a_model_folder/with_a_long_name/model"


def demo(sd: float | None = 0.012) -> RenderableType:
    kinds = ("teacher", "zero_shot", "clm", "alm")
    return bits_per_byte_table(
        [
            Bar(group=group, label=kind, kind=kind, bits_per_byte=1.234 + place, sd=sd)
            for group in ("unigram", "byte")
            for place, kind in enumerate(kinds)
        ]
    )


def audit() -> RenderableType:
    breaker = {"token": "▁some_planted_token", "id": 123456, "score": 0.4567, "wins": 1234, "wins_other": 56}
    finding = Finding("planted tokens", "warning", "Row 123456 wins 45.7 % of 1,234 contexts.", {})
    facts = {"rows": 151936, "width": 4096, "tokens": 151669}
    return render_audit(Audit(NAME, facts, Part((finding,)), (breaker | {"norm_z": 12.3, "absolute": 7.8},)))


def lockstep() -> RenderableType:
    members = [{"model": NAME, "bits_per_byte": 1.2345}, {"model": "other", "bits_per_byte": 2.3456}]
    return lockstep_table(
        {"members": members, "weights": [0.25, 0.75], "combine": "mean", "mode": "bytes", "bits_per_byte": 1.1111}
    )


def before_after() -> RenderableType:
    now = {name: 1234567 if name in ("bytes", "tokens") else 0.8765 for name in SHOWN}
    return before_after_table({**now, "before": dict(now)})


def tasks() -> RenderableType:
    row = {"metric": "acc_norm,none", "direction": "max", "note": ""}
    rows = [{**row, "task": task, "value": value} for task, value in (("arc_challenge", 0.4321), ("hellaswag", 0.5432))]
    beside = {"mean": 0.9876, "geometric_mean": 0.9765}
    return benchmark_table(
        {"trained": rows, "before": rows, "teacher": rows, "beside_before": beside, "beside_teacher": beside}
    )


def checks() -> RenderableType:
    found = [
        Check("gradients are finite", True, "largest 1.234e-05 of 4,096"),
        Check("masked", False, "0.5 where 0 was"),
    ]
    return check_table({"my_own_loss_of_a_long_name": found})


def claims() -> RenderableType:
    machine = Machine(processor="x86-64", cores=2, memory_gib=8)
    row = Row(
        what="alignment of a long text", beside="another package", unit="MB/s", better="more", ours=12.34, peer=1.234
    )
    return claims_tables(
        [
            Claim(
                claim="alignment", title="Alignment: throughput", sentence="", command="", machine=machine,
                date=datetime.date(2026, 1, 1), versions={}, rows=[row], orderings=[],
            )
        ]
    )  # fmt: skip


TABLES: dict[str, Callable[[], RenderableType]] = {
    "report/tables.py": demo,
    "align/doctor_show.py": lambda: render(diagnose(ByteTokenizer(), ByteTokenizer())),
    "report/audit.py": audit,
    "report/inventory.py": lambda: Group(
        render_inventory(inventory_of(SHAPES)),
        render_difference(difference(inventory_of(SHAPES), inventory_of("gpt2:n_layer=1"))),
    ),
    "verbs/check_loss.py": checks,
    "verbs/eval_lockstep.py": lockstep,
    "verbs/evaluate.py": before_after,
    "verbs/benchmarks.py": tasks,
    "verbs/presets.py": presets_view,
    "report/claim_tables.py": claims,
}


def printed(shown: RenderableType, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(fitted(shown, width))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def figures(shown: RenderableType) -> list[str]:
    """Every figure in the cells of the tables."""
    if isinstance(shown, Group):
        return [figure for part in shown.renderables for figure in figures(part)]
    if not isinstance(shown, Table):
        return []
    cells = [Text.from_markup(str(cell)).plain for column in shown.columns for cell in column.cells]
    return [figure for cell in cells for figure in FIGURE.findall(cell)]


@pytest.mark.parametrize("place", TABLES)
def test_every_figure_is_whole_at_any_width(place: str) -> None:
    made = TABLES[place]()
    wanted = figures(made)
    assert wanted
    for width in (40, 60, 80):
        text = printed(copy.deepcopy(made), width)
        assert max(cell_len(line.rstrip()) for line in text.splitlines()) <= width
        found = FIGURE.findall(text)
        assert [figure for figure in dict.fromkeys(wanted) if found.count(figure) < wanted.count(figure)] == []
        assert "…" not in text


def test_every_maker_of_tables_is_tried() -> None:
    """Whoever makes a table stands in the list above."""
    package = Path(tokenkit.__file__).parent
    makers = set()
    for path in package.rglob("*.py"):
        text = path.read_text("utf-8")
        imports = (
            [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)] if "rich" in text else []
        )
        if any(node.module == "rich.table" for node in imports):
            makers.add(str(path.relative_to(package)))
    assert makers - {"report/terminal.py"} == set(TABLES)


def test_a_table_that_fits_stays_a_table() -> None:
    assert "┃" in printed(demo(None), 80)
    assert "zero-shot: 2.234 ± 0.012" in printed(demo(), 40)


def test_a_pipe_gets_plain_text_as_wide_as_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    for columns in (40, 60):
        monkeypatch.setenv("COLUMNS", str(columns))
        show(audit())
        text = capsys.readouterr().out
        assert "\x1b" not in text
        assert 30 < max(map(cell_len, text.splitlines())) <= columns


def test_without_a_terminal_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    now = iter(range(0, 1000, 10))
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(now))
    with progress("alm", 2000, done=1000, quiet=False) as advance:
        for _ in range(7):
            advance(says="loss 1.2")
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == ["alm: 1,003 of 2,000, loss 1.2", "alm: 1,006 of 2,000, loss 1.2"]


def test_quiet_says_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(progress_module, "EVERY", 0.0)
    with stages(quiet=True) as begin:
        begin("counting", 3)(2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("width", [40, 60, 80])
def test_a_bar_is_one_line_at_any_width(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr(progress_module, "terminal", lambda stderr: console)
    with progress("alm", 20000, quiet=False) as advance:
        advance(1234, says="loss 1.2345  5,000 tokens/s")
    lines = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", file.getvalue()).replace("\r", "\n").splitlines()
    drawn = [line for line in lines if "1234/20000" in line]
    assert drawn
    assert max(map(cell_len, drawn)) <= width
