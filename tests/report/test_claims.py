"""What benchmarks write, and what two sets of results say of each other."""

import json
import re

import pytest

from tokenkit.config import UserError
from tokenkit.report.claim_tables import claim_markdown, claims_tables, comparison_lines, plot_claim
from tokenkit.report.claims import (
    absent,
    changed_orderings,
    machine_class,
    make_claim,
    measured,
    orderings_of,
    read_claims,
    save_claim,
    spread,
)


def row(what, beside, unit, ours, peer, **options):
    return measured(what, beside, unit, [float(x) for x in ours], [float(x) for x in peer], **options)


def claim(rows, name="alignment"):
    return make_claim(name, "A sentence.", "python benchmarks/x.py", rows, {"trl": "1.16.0"})


def test_a_ratio_says_how_many_times_as_good_ours_is():
    assert spread([2.0, 1.0, 4.0], [4.0, 4.0, 4.0]).model_dump() == {"median": 2.0, "min": 1.0, "max": 4.0}
    assert spread([6.0], [3.0], "more").median == 2.0


def test_orderings_are_decided_where_every_repeat_says_so():
    rows = [
        row("a", "b", "s", [1, 1, 1], [2, 3, 4]),
        row("c", "b", "s", [1, 3, 2], [2, 2, 2]),
        row("d", "b", "tokens", [1.0], [2.0], better="more"),
        row("e", "b", "chunks", [5], [5], better="equal"),
        absent("f", "b", "s", "not installed", [1.0]),
    ]
    found = orderings_of(rows)
    assert [(o.first, o.second, round(o.ratio, 2), o.decided) for o in found] == [
        ("a", "b", 3.0, True),
        ("c", "b", 1.0, False),
        ("b", "d", 2.0, True),
    ]


def test_changed_orderings_need_one_side_that_was_sure():
    sure, unsure = row("a", "b", "s", [1, 1], [2, 2]), row("a", "b", "s", [1, 3], [2, 2])
    other, barely = row("a", "b", "s", [2, 2], [1, 1]), row("a", "b", "s", [2.2, 2.0], [2, 2.1])
    assert changed_orderings([claim([sure])], [claim([sure])]) == ([], [], 1)
    changed, alone, same = changed_orderings([claim([sure])], [claim([other])])
    assert (len(changed), alone, same) == (1, [], 0)
    assert changed[0].startswith("alignment: a before b by s, 2 times; now b before a by s")
    assert changed_orderings([claim([unsure])], [claim([barely])])[0] == []
    assert len(changed_orderings([claim([other])], [claim([unsure])])[0]) == 1
    assert changed_orderings([claim([sure])], [claim([sure], "memory")]) == (
        [],
        [
            "alignment: only the first has: a before b by s, 2 times",
            "memory: only the second has: a before b by s, 2 times",
        ],
        0,
    )


def test_results_are_read_as_they_were_written_and_hold_no_path(tmp_path):
    rows = [row("a", "b", "s", [1, 1, 1], [2, 3, 4], note="n"), absent("f", "b", "s", "not installed")]
    written = claim(rows)
    save_claim(tmp_path / "alignment.json", written)
    assert read_claims(tmp_path) == [written]
    text = (tmp_path / "alignment.json").read_text("utf-8")
    assert not re.search(r'"/|/tmp|/home', text)
    machine = machine_class()
    assert machine.cores >= 1
    assert machine.memory_gib >= 1


def test_what_is_no_result_is_said_in_one_line(tmp_path):
    with pytest.raises(UserError, match="holds no results; run `make bench`"):
        read_claims(tmp_path / "absent")
    (tmp_path / "x.json").write_text(json.dumps({"claim": "x"}))
    with pytest.raises(UserError, match=r"x\.json: title: Field required"):
        read_claims(tmp_path)
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match=r"x\.json: the file: Invalid JSON"):
        read_claims(tmp_path)


def test_tables_say_what_is_absent_and_pictures_have_a_ground(tmp_path):
    shown = claim([row("a", "b", "s", [1e-4, 1e-4], [2, 3]), absent("f", "b", "s", "not installed", [1234.5])])
    page = claim_markdown(shown, "benchmarks/alignment.svg")
    assert "| f | b | s | 1,234 | – | absent: not installed | 1 |" in page
    assert "| a | b | s | 1.0e-04 | 2.5 | 25000.00 (20000.00 to 30000.00) | 2 |" in page
    assert "`python benchmarks/x.py`" in page
    assert claims_tables([shown]).renderables[0].row_count == 2
    assert plot_claim(shown, tmp_path / "a.svg")
    picture = (tmp_path / "a.svg").read_text("utf-8")
    assert "#f7f8fa" in picture
    assert plot_claim(shown, tmp_path / "b.svg")
    assert (tmp_path / "b.svg").read_text("utf-8") == picture
    assert not plot_claim(claim([absent("f", "b", "s", "why")]), tmp_path / "c.svg")


def test_the_last_line_counts():
    assert comparison_lines([], [], 3) == ["3 orderings are the same, none changed"]
    assert comparison_lines(["x"], ["y"], 3)[-1] == "3 orderings are the same, 1 changed, 1 in one of the two alone"
