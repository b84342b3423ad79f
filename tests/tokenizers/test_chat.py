"""Conversations as tokens: roles read from templates, renderings equal to the library's, places that pair families."""

import functools
import gzip
import importlib.util
import itertools
import json
import lzma
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tokenkit import align, load_tokenizer
from tokenkit.align.spans import Alignment
from tokenkit.config import UserError
from tokenkit.tokenizers.bytelevel import ByteTokenizer
from tokenkit.tokenizers.chat import ChatEncoding, encode_chat, encode_pieces, render
from tokenkit.tokenizers.conversation import as_messages, parts_of
from tokenkit.tokenizers.hf import HFTokenizer
from tokenkit.tokenizers.infer import infer_roles
from tokenkit.tokenizers.roles import KINDS, kind_roles
from tokenkit.tokenizers.template import Template

TURNS = """{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.content %}{{ m.content }}{% endif %}
{%- for c in m.tool_calls or [] %}{{ '<call>{"name": "' + c.function.name + '", "arguments": ' }}
{{- c.function.arguments | tojson }}{{ '}</call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
QUESTIONS = """{{ bos_token }}{% for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns must alternate') }}{% endif %}
{%- if m.role == 'user' %}{{ '[INST] ' + m.content | trim + ' [/INST]' }}
{%- else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"""
VALUES = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}
{%- for c in m.tool_calls or [] %}{{ '<function=' + c.function.name + '>' }}
{%- for key, value in c.function.arguments | items %}{{ '<parameter=' + key + '>' }}
{{- value if value is string else value | tojson }}{{ '</parameter>' }}{% endfor %}{% endfor %}
{{- '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": 'Zü"rich', "n": 3}},
}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Weather", "parameters": {}}}]
TOOL_TURNS = [
    {"role": "system", "content": "You are terse."},
    {"role": "user", "content": "Weather in Zürich?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "abcdefghi", "name": "weather", "content": '{"t": 7}'},
    {"role": "assistant", "content": "Seven degrees, user.\nWear a coat; the model says so."},
]
PLAIN = [
    {"role": "system", "content": "Answer user and model alike.\nShort."},
    {"role": "user", "content": "\n\n  What is 12345 + 1?"},
    {"role": "assistant", "content": "12346, été 👩‍👩‍👧 user model"},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "line\n\n\tindented\n"},
]
LITERALS = [
    {"role": "user", "content": "What do <|im_end|>, </s>, [INST] <|eot_id|> and <end_of_turn> mean?"},
    {"role": "assistant", "content": "They close <|im_end|>\n turns: <eos><bos><|end|>"},
]
FAMILIES = {
    "qwen2_5": ("qwen2", "Qwen2"),
    "qwen3": ("qwen2", "Qwen3"),
    "llama3": ("llama3", "Llama3"),
    "llama3_1": ("llama3", "Llama3"),
    "gemma": ("gemma3", "Gemma2"),
    "gemma3": ("gemma3", "Gemma3"),
    "phi3": ("phi3_mini", "Phi3"),
    "deepseekv3": ("deepseek_v3", None),
}


def with_template(tokenizer: HFTokenizer, template: str, **config: str) -> HFTokenizer:
    """The tokenizer with the special tokens of ChatML and a template."""
    definition = tokenizer.definition
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    size = tokenizer.vocab_size
    for number, literal in enumerate(("<|im_start|>", "<|im_end|>")):
        definition["added_tokens"].append({"id": size + number, "content": literal, **flags})
    return HFTokenizer(definition, {**tokenizer.config, **config, "chat_template": template}, "small")


@pytest.fixture(scope="module")
def chatml(bpe) -> HFTokenizer:
    return with_template(bpe, TURNS)


@pytest.fixture(scope="module")
def inst(unigram) -> HFTokenizer:
    return with_template(unigram, QUESTIONS)


def template_file(name: str) -> Path:
    """A family's own template, as trl carries it."""
    found = importlib.util.find_spec("trl")
    if found is None or found.origin is None:
        pytest.skip("the families' chat templates come with trl, which is not installed (pip install trl)")
    return Path(found.origin).parent / "chat_templates" / f"{name}.jinja"


@functools.cache
def family(name: str, folder: Path, shared: Path) -> tuple[object, HFTokenizer]:
    """A published tokenizer with its family's own template: as the library loads it, and as we do."""
    template = template_file(name)
    source = shared / "data/tokenizers" / FAMILIES[name][0]
    target = folder / name
    target.mkdir()
    plain, packed = source / "tokenizer.json", source / "tokenizer.json.xz"
    (target / "tokenizer.json").write_bytes(
        plain.read_bytes() if plain.exists() else lzma.decompress(packed.read_bytes())
    )
    shutil.copy(source / "tokenizer_config.json", target)
    shutil.copy(template, target / "chat_template.jinja")
    return AutoTokenizer.from_pretrained(target), load_tokenizer(str(target))


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("families")


def check_spans(found: ChatEncoding, tokenizer: HFTokenizer, messages: list[dict]) -> None:
    """Tokens of a part cover its bytes without gaps, as far as the family writes them; places never fall."""
    encoding = found.encoding
    raw = b"".join(part.text.encode() for part in parts_of(as_messages(messages)))
    assert (np.diff(encoding.segment) >= 0).all()
    assert (encoding.starts[encoding.special] == encoding.ends[encoding.special]).all()
    text = ~encoding.special
    for place in np.unique(encoding.segment[text]):
        own = text & (encoding.segment == place)
        starts, ends = encoding.starts[own], encoding.ends[own]
        assert np.array_equal(starts[1:], ends[:-1])
        spelled = zip(encoding.ids[own].tolist(), starts, ends)
        for index, start, end in [*spelled][1:-1]:  # the first and the last may reach into the template
            assert tokenizer.token_bytes[index] in (raw[start:end], b" " + raw[start:end])


def trained_bytes(found: ChatEncoding, chunk: np.ndarray) -> set[int]:
    """Bytes of trained texts whose tokens are in a chunk."""
    one = found.encoding
    inside = found.trained & ~one.special & (chunk >= 0)
    return {b for start, end in zip(one.starts[inside], one.ends[inside]) for b in range(start, end)}


def assistant_bytes(messages: list[dict]) -> set[int]:
    """The bytes of everything that an assistant wrote."""
    rows = as_messages(messages)
    own = [p for p in parts_of(rows) if rows[p.message]["role"] == "assistant" and p.kind != "value"]
    return {b for part in own for b in range(part.start, part.start + len(part.text.encode()))}


@pytest.mark.parametrize("name", [name for name, (_, kind) in FAMILIES.items() if kind])
def test_roles_read_from_templates_equal_the_table(name):
    table = kind_roles(FAMILIES[name][1] or "")
    tokens = tuple((f"{role}_token", text) for role, text in (("bos", table.bos), ("eos", table.eos)) if text)
    roles = infer_roles(Template(template_file(name).read_text("utf-8"), tokens), name)
    for role in ("user", "assistant"):
        assert roles.header(role) == table.header(role)
    assert (roles.eot, roles.user_eot) == (table.eot, None)
    assert (roles.start_header, roles.end_header) == (table.start_header, table.end_header)
    if name not in ("qwen3", "phi3"):  # the table keeps what upstream's kinds say; the templates are newer
        assert (roles.bos, roles.system) == (table.bos, table.system)


@pytest.mark.parametrize("kind", KINDS)
def test_roles_survive_being_written_as_a_template(kind):
    table = kind_roles(kind)
    found = infer_roles(Template(table.jinja(), (("bos_token", table.bos), ("eos_token", table.eos))), kind)
    for field in ("bos", "start_header", "end_header", "eos", "eot", "user_eot", "system", "user", "assistant"):
        assert getattr(found, field) == getattr(table, field)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_ids_equal_the_librarys_own_chat_template(shared, folder, name):
    library, tokenizer = family(name, folder, shared)
    compared = 0
    string = {**CALL, "function": {"name": "weather", "arguments": '{"city": "Zü\\"rich", "n": 3}'}}
    for messages, tools, prompt in itertools.product((PLAIN, PLAIN[1:], TOOL_TURNS), (None, TOOLS), (False, True)):
        rows = messages
        if name == "deepseekv3":  # its template wants arguments as JSON text
            rows = [{**m, "tool_calls": [string]} if "tool_calls" in m else m for m in messages]
        options = {"tools": tools, "add_generation_prompt": prompt}
        try:
            text = library.apply_chat_template(rows, tokenize=False, **options)
        except Exception:
            text = None  # the family refuses the turn
        pieces = render(tokenizer, messages, tools=tools, prompt=prompt)
        found = encode_pieces(tokenizer, pieces)
        check_spans(found, tokenizer, messages)
        texts = [part.text for part in parts_of(as_messages(messages)) if part.kind not in ("arguments", "value")]
        if text is None or not all(part.strip() in text for part in texts):
            continue  # the family refuses a turn, or drops it without a word: it is written in other turns here
        assert "".join(piece.text for piece in pieces) == text
        wanted = library.apply_chat_template(rows, tokenize=True, return_dict=False, **options)
        assert found.encoding.ids.tolist() == list(wanted)
        compared += 1
    assert compared >= 4


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_real_conversations_equal_the_librarys_ids_and_align(shared, folder, name):
    library, tokenizer = family(name, folder, shared)
    other = family("llama3_1" if name != "llama3_1" else "qwen2_5", folder, shared)[1]
    lines = gzip.decompress((shared / "data/corpora/instruct/train.jsonl.gz").read_bytes()).splitlines()[:400]
    lines += gzip.decompress((shared / "data/corpora/instruct/multi_turn.jsonl.gz").read_bytes()).splitlines()
    lost = total = 0
    for line in lines:
        messages = json.loads(line)["messages"]
        found = encode_chat(tokenizer, messages)
        wanted = library.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert found.encoding.ids.tolist() == list(wanted)
        pair = align(found.encoding, encode_chat(other, messages).encoding)
        wrote = assistant_bytes(messages)
        missing = wrote - trained_bytes(found, pair.chunk_a)
        raw = b"".join(part.text.encode() for part in parts_of(as_messages(messages)))
        assert all(raw[at : at + 1].isspace() for at in missing)  # white space that one family trims
        lost, total = lost + len(missing), total + len(wrote)
    assert total > 50_000
    assert lost < total / 1000


PAIRS = [
    ("qwen2_5", "llama3_1"),
    ("llama3", "gemma3"),
    ("gemma", "qwen3"),
    ("phi3", "qwen2_5"),
    ("deepseekv3", "llama3_1"),
    ("gemma3", "phi3"),
    ("deepseekv3", "qwen3"),
]


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_every_byte_of_the_assistant_is_in_a_chunk_on_both_sides(shared, folder, pair):
    for one, other in (pair, pair[::-1]):
        for messages, tools in ((PLAIN[:-1], None), (TOOL_TURNS, None), (TOOL_TURNS, TOOLS), (LITERALS, None)):
            a, b = (encode_chat(family(name, folder, shared)[1], messages, tools=tools) for name in (one, other))
            found = align(a.encoding, b.encoding)
            wanted = assistant_bytes(messages)
            assert trained_bytes(a, found.chunk_a) == wanted
            assert trained_bytes(b, found.chunk_b) == wanted
            check_ends_of_turns(a, b, found, messages)


def check_ends_of_turns(a: ChatEncoding, b: ChatEncoding, found: Alignment, messages: list[dict]) -> None:
    """Each trained turn ends, on both sides, in a chunk of special tokens that the other side has too."""
    for side, chunk in ((a, found.chunk_a), (b, found.chunk_b)):
        closed = np.unique(chunk[side.trained & side.encoding.special & (chunk >= 0)])
        assert len(closed) >= sum(m["role"] == "assistant" for m in messages)


@pytest.mark.parametrize("side", ["chatml", "inst"])
@pytest.mark.parametrize("messages", [PLAIN, TOOL_TURNS, LITERALS, PLAIN[1:]])
def test_small_families_cover_the_assistant(request, side, messages, chatml, inst):
    tokenizer = request.getfixturevalue(side)
    found = encode_chat(tokenizer, messages, tools=TOOLS if messages is TOOL_TURNS else None)
    check_spans(found, tokenizer, messages)
    a, b = (encode_chat(one, messages) for one in (chatml, inst))
    pair = align(a.encoding, b.encoding)
    lost = assistant_bytes(messages) - trained_bytes(a, pair.chunk_a)
    raw = b"".join(part.text.encode() for part in parts_of(as_messages(messages)))
    assert all(raw[at : at + 1].isspace() for at in lost)  # what one family trims, the other cannot share
    assert lost == assistant_bytes(messages) - trained_bytes(b, pair.chunk_b)


TEXTS = st.lists(
    st.sampled_from(
        ["the cat", "user", "\n", "  ", "<|im_end|>", "<|im_start|>", "assistant\n", "[INST]", "</s>", "é", "{}"]
    )
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
    max_size=6,
).map("".join)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(contents=st.lists(TEXTS, min_size=2, max_size=5), system=st.booleans())
def test_any_conversation_renders_as_its_template_and_aligns(chatml, inst, contents, system):
    roles = ["system"] * system + ["user", "assistant"] * 3
    messages = [{"role": role, "content": text} for role, text in zip(roles, contents)]
    a, b = encode_chat(chatml, messages), encode_chat(inst, messages)
    for tokenizer, found in ((chatml, a), (inst, b)):
        check_spans(found, tokenizer, messages)
    template_ids = {chatml.special_tokens[text] for text in ("<|im_start|>", "<|im_end|>")}
    assert (a.encoding.special | ~np.isin(a.encoding.ids, list(template_ids))).all()
    assert np.isin(a.encoding.ids, list(template_ids)).sum() == 2 * len(messages)
    again = align(a.encoding, a.encoding)
    assert np.array_equal(again.chunk_a, again.chunk_b)
    pair = align(a.encoding, b.encoding)
    for start, end, low, high in pair.spans.tolist():
        assert len({*a.encoding.segment[start:end], *b.encoding.segment[low:high]}) == 1
    raw = b"".join(part.text.encode() for part in parts_of(as_messages(messages)))
    lost = assistant_bytes(messages) - trained_bytes(a, pair.chunk_a)
    assert all(chr(raw[at]).isspace() or raw[at] >= 0x80 or raw[at] < 0x20 for at in lost)


def test_what_is_trained(chatml):
    texts = {}
    for train_on in ("assistant", "last_assistant", "all"):
        pieces = render(chatml, PLAIN, train_on=train_on)
        texts[train_on] = [piece.text for piece in pieces if piece.trained]
    assert texts["last_assistant"] == ["line\n\n\tindented\n", "<|im_end|>\n"]
    assert texts["assistant"] == ["12346, été 👩‍👩‍👧 user model", "<|im_end|>\n", *texts["last_assistant"]]
    assert [text for text in texts["all"] if text != "<|im_end|>\n"] == [m["content"] for m in PLAIN]


def test_call_arguments_value_by_value(bpe):
    pieces = render(with_template(bpe, VALUES), TOOL_TURNS)
    texts = [piece.text for piece in pieces if not piece.template and piece.trained]
    assert texts == ["weather", 'Zü"rich', "3", TOOL_TURNS[-1]["content"]]


def test_reasoning_is_a_part_of_its_own(chatml):
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "<think>\nWhy not.\n</think>\n\nYes."},
    ]
    texts = [(piece.text, piece.template) for piece in render(chatml, messages) if piece.trained]
    assert texts == [
        ("<think>\n", True),
        ("Why not.", False),
        ("\n</think>\n\n", True),
        ("Yes.", False),
        ("<|im_end|>\n", True),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizers_without_a_template_use_the_roles_of_their_kind(bpe, kind):
    roles = kind_roles(kind)
    definition = bpe.definition
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    known = {token["content"] for token in definition["added_tokens"]}
    for literal in roles.specials:
        if literal not in known:
            size = 1 + max(t["id"] for t in definition["added_tokens"])
            definition["added_tokens"].append({"id": max(size, bpe.vocab_size), "content": literal, **flags})
    tokenizer = HFTokenizer(definition, {"eos_token": roles.eos, "tokenkit_kind": kind}, kind)
    text = "".join(piece.text for piece in render(tokenizer, PLAIN[1:3], prompt=True))
    question, answer = PLAIN[1]["content"], PLAIN[2]["content"]
    wanted = roles.header("user") + question + roles.eot + roles.header("assistant") + answer + roles.eot
    assert text == roles.bos + wanted + roles.header("assistant")
    found = encode_chat(tokenizer, TOOL_TURNS, tools=TOOLS)
    wanted_bytes = assistant_bytes(TOOL_TURNS)
    assert trained_bytes(found, np.zeros(len(found.encoding), np.int32)) == wanted_bytes


def test_bytes_render_too():
    found = encode_chat(ByteTokenizer(), LITERALS)
    assert found.encoding.ids[0] == 256
    assert (found.encoding.ids > 255).sum() == 1 + len(LITERALS)


@pytest.mark.parametrize(
    "messages, said",
    [
        ([], "non-empty list"),
        ("hello", "non-empty list"),
        ([{"role": "wizard", "content": "?"}], "role 'wizard' is unknown"),
        ([{"role": "user", "content": 3}], "message 0: content is neither text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "images"),
        ([{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": 1}}]}], "tool call 0"),
        (
            [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            "not JSON",
        ),
    ],
)
def test_bad_messages_are_one_line(chatml, messages, said):
    with pytest.raises(UserError, match=said) as caught:
        render(chatml, messages)
    assert "\n" not in str(caught.value)


def test_a_template_that_cannot_be_followed_is_refused(bpe):
    for template in ("{{ messages[0].content | upper }}", "{{ raise_exception('no') }}"):
        with pytest.raises(UserError, match="chat template") as caught:
            render(with_template(bpe, template), PLAIN)
        assert "\n" not in str(caught.value)
