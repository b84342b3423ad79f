"""Spec strings and mappings of a tokenizer: read from the right, written back, every mistake one line."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenkit.config import Config, UserError, build, load, resolved
from tokenkit.tokenizers.roles import KINDS
from tokenkit.tokenizers.spec import ANY_KEY, KEYS, LAST_KEY, TokenizerSpec

STRINGS = {
    "byte": {},
    "/path/to/custom/tokenizer": {},
    "google/gemma-2-2b-it:source=Gemma2": {"source": "Gemma2"},
    "google/gemma-2-2b-it:source=Gemma2:target=Qwen2": {"source": "Gemma2", "target": "Qwen2"},
    "Qwen/Qwen2.5-1.5B:source=Qwen2:target=Gemma2": {"source": "Qwen2", "target": "Gemma2"},
    "meta-llama/Llama-3.2-3B-Instruct:source=Llama3:target=Llama3:conversion=byte": {
        "source": "Llama3",
        "target": "Llama3",
        "conversion": "byte",
    },
    "tok/gpt2:source=GPT2:conversion=prebyteified": {"source": "GPT2", "conversion": "prebyteified"},
    "TinyLlama/v1:source=TinyLlama:conversion=manual_add_prefix_space": {
        "source": "TinyLlama",
        "conversion": "manual_add_prefix_space",
    },
    "gpt2:conversion=longest_prefix:revision=main": {"conversion": "longest_prefix", "revision": "main"},
    r"C:\models\gemma:target=Qwen2": {"target": "Qwen2"},
    "http://host:8080/x?y=z:source=GPT2": {"source": "GPT2"},
    "ranks.tiktoken:target=Qwen2:pattern=(?i:'s|'t)| ?\\p{L}+|a:b=c": {
        "target": "Qwen2",
        "pattern": "(?i:'s|'t)| ?\\p{L}+|a:b=c",
    },
    'gpt2:tokens_to_add=["<a:b>", "c]"]:target=Llama3': {"tokens_to_add": ("<a:b>", "c]"), "target": "Llama3"},
}


@pytest.mark.parametrize("text", STRINGS)
def test_strings_of_guides(text):
    spec = TokenizerSpec.parse(text)
    said = {key: value for key, value in spec if key != "name" and value not in (None, ())}
    assert said == STRINGS[text]
    assert text.startswith(spec.name)
    assert not set(said) or text[len(spec.name)] == ":"


MISTAKES = {
    "x:soruce=GPT2": "unknown key 'soruce'; did you mean 'source'",
    "x:source=GTP2": "source 'GTP2': unknown; did you mean 'GPT2'",
    "x:target=qwen2": "target 'qwen2': unknown; did you mean 'Qwen2'",
    "x:target=Zebra": "target 'Zebra': unknown; write one of Qwen2, Qwen3, Llama3",
    "x:conversion=bytes": "conversion 'bytes': unknown; did you mean 'byte'",
    "x:colour=red": "unknown key 'colour'; write one of source, target",
    "x:source=GPT2:target": "'source=GPT2:target' is not key=value",
    "x:source=GPT2:source=GPT2": "source stands twice",
    "x:source=": "nothing stands behind source=",
    "x:pattern=": "nothing stands behind pattern=",
    "x:tokens_to_add=a": "not a list of strings",
    "x:tokens_to_add=[1]": "not a list of strings",
    ":target=Qwen2": "no name",
    "": "no name",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_mistakes_are_one_line(text):
    for attempt in (lambda: TokenizerSpec.parse(text), lambda: build(Section, {"tokenizer": text})):
        with pytest.raises(UserError, match=re.escape(MISTAKES[text])) as caught:
            attempt()
        assert "\n" not in str(caught.value)


class Section(Config):
    tokenizer: TokenizerSpec | None = None


def test_run_files_take_strings_and_mappings():
    spec = TokenizerSpec(name="byte", target="Qwen2", tokens_to_add=("<x>",))
    for value in (
        {"name": "byte", "target": "Qwen2", "tokens_to_add": ["<x>"]},
        {"name": "byte:target=Qwen2", "tokens_to_add": ["<x>"]},
        'byte:target=Qwen2:tokens_to_add=["<x>"]',
        spec,
    ):
        assert build(Section, {"tokenizer": value}).tokenizer == spec
    overrides = ["tokenizer.name=byte:target=Qwen2", "tokenizer.tokens_to_add=[<x>]"]
    assert load(Section, overrides).tokenizer == spec
    assert load(Section, []).tokenizer is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"name": "x", "soruce": "GPT2"}, "tokenizer.soruce: unknown key; did you mean 'source'"),
        ({"source": "GPT2"}, "tokenizer.name: missing"),
        ({"name": "x:source=GPT2", "source": "GPT2"}, "source stands here and as a key of its own"),
        ({"name": "x", "revision": "a:b"}, "revision 'a:b'"),
        (3, "tokenizer: input should be"),
    ],
)
def test_mistakes_in_mappings(value, message):
    with pytest.raises(UserError, match=re.escape(message)):
        build(Section, {"tokenizer": value})


def test_a_saved_run_names_the_tokenizer_in_one_string():
    section = build(Section, {"tokenizer": {"name": "gpt2", "target": "Qwen2"}})
    assert resolved(section) == {"tokenizer": "gpt2:target=Qwen2"}
    assert build(Section, resolved(section)) == section
    assert resolved(build(Section, {"tokenizer": "byte"})) == {"tokenizer": "byte"}


NAMES = st.text(min_size=1).filter(lambda name: not (LAST_KEY.search(name) or ANY_KEY.search(name)))
SPECS = st.builds(
    TokenizerSpec,
    name=NAMES | st.sampled_from(["byte", r"C:\a", "a:b", "http://x:1/y=z"]),
    revision=st.none() | st.from_regex(r"[\w/=.\[\]-]+", fullmatch=True),
    source=st.none() | st.sampled_from([*KINDS]),
    target=st.none() | st.sampled_from([*KINDS]),
    conversion=st.none() | st.sampled_from(["byte", "byteified", "longest_prefix"]),
    tokens_to_add=st.lists(st.text() | st.sampled_from([f"<:{key}=>" for key in KEYS])).map(tuple),
    pattern=st.none() | st.text(min_size=1) | st.sampled_from([f"(?:{key}=x)" for key in KEYS]),
)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(spec=SPECS)
def test_parse_inverts_str(spec):
    assert TokenizerSpec.parse(str(spec)) == spec
    assert TokenizerSpec.model_validate(spec.model_dump(mode="json")) == spec
