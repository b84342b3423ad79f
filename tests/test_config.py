"""Run files: the traps of YAML are closed, overrides land where they say, and every mistake is one line."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenkit.config import Config, UserError, build, differences, dump_yaml, load, override, parse_yaml, resolved


class Inner(Config):
    learning_rate: float = 1e-3
    steps: int = 5


class Outer(Config):
    name: str
    train: Inner = Inner()
    optional: Inner | None = None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("6E3", 6e3),
        ("[en, no, de, yes, on]", ["en", "no", "de", "yes", "on"]),
        ("1:30", "1:30"),
        ("007", "007"),
        ("1.", 1.0),
        (".5", 0.5),
        ("-3", -3),
        ("null", None),
        ("", None),
        ("2026-11-20", "2026-11-20"),
        ("'1e-5'", "1e-5"),
    ],
)
def test_yaml_reads_what_is_written(text, value):
    found = parse_yaml(text)
    assert found == value
    assert type(found) is type(value)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1), inner, max_size=3),
    max_leaves=8,
)


@given(plain)
@settings(deadline=None, derandomize=True)
def test_what_is_dumped_is_read_back(value):
    assert parse_yaml(dump_yaml(value)) == value


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["name=x", "train.stepz=3"], ["train.stepz", "did you mean 'steps'"]),
        (["name=x", "optional.learningrate=3"], ["optional.learningrate", "did you mean 'learning_rate'"]),
        (["name=x", "zzz=3"], ["zzz: unknown key", "name, train, optional"]),
        (["name=x", "train.steps=many"], ["train.steps", "integer", "'many'"]),
        (["name=x", "train.learning_rate=[1]"], ["train.learning_rate", "number", "[1]"]),
        (["train.steps=2"], ["name: missing", "name=..."]),
        (["name=x", "train=3"], ["train", "3"]),
        (["name=x", "train.steps.more=3"], ["train.steps", "integer"]),
        (["no_such_file.yaml"], ["no_such_file.yaml", "no such run file"]),
        (["a.yaml", "b.yaml"], ["b.yaml", "second run file"]),
        (["name=x", "=3"], ["key.path=value"]),
        (["name={a: 1, a: 2}"], ["stands twice"]),
        (["name=[1"], ["not valid YAML"]),
    ],
)
def test_mistakes_are_one_line(words, parts):
    with pytest.raises(UserError) as caught:
        load(Outer, words)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_a_run_file_and_overrides(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("name: a\ntrain:\n  learning_rate: 1e-5\n", "utf-8")
    run = load(Outer, [str(path), "+train.steps=7", "++optional.steps=1"])
    assert run == Outer(name="a", train=Inner(learning_rate=1e-5, steps=7), optional=Inner(steps=1))
    assert build(Outer, parse_yaml(dump_yaml(resolved(run)))) == run


def test_twice_the_same_key_in_a_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("name: a\nname: b\n", "utf-8")
    with pytest.raises(UserError, match=r"run.yaml, line 2: the key 'name' stands twice"):
        load(Outer, [str(path)])


def test_a_config_is_closed_and_frozen():
    run = Outer(name="x")
    with pytest.raises(ValueError, match="frozen"):
        run.name = "y"


def test_override_into_a_value_is_refused():
    with pytest.raises(UserError, match="holds 3, which has no keys inside"):
        override({"a": 3}, "a.b=1")


def test_differences_name_dotted_keys():
    a, b = {"x": 1, "y": {"z": 2, "same": 0}}, {"x": 1, "y": {"z": 3, "same": 0}, "new": None}
    assert differences(a, b) == ["y.z", "new"]
