"""A model family's own Jinja template, rendered, with the place of every part of the conversation in the result.

The template is run twice: over the messages, and over the same messages with a mark instead of every part. The second
text shows what is template; it is believed only if, with the parts put back, it equals the first text exactly.
"""

import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tokenkit.config import UserError
from tokenkit.tokenizers.conversation import (
    Message,
    Part,
    PartKind,
    merged_system,
    parts_of,
    spoken_tools,
    with_parts,
)

Tools = list[dict[str, Any]] | None
STYLES = ("mapping", "text", "values")  # call arguments as one mapping, as JSON text, value by value
MARK = re.compile("\ue000(\\d+)\ue001")
MARKED_MAPPING = re.compile(r"""\{\s*["']?\ue000(\d+)\ue001["']?\s*:\s*["']?\ue000\1\ue001["']?\s*\}""")


class Refused(Exception):
    """A template does not write a conversation, for the reason that is the message."""


@dataclass(frozen=True, slots=True)
class Template:
    """A Jinja chat template, the names of special tokens that it reads, and the options that it is run with."""

    source: str
    tokens: tuple[tuple[str, str], ...]  # ("bos_token", "<s>"), ...
    options: tuple[tuple[str, Any], ...] = ()

    def render(self, messages: list[Message], tools: Tools = None, *, prompt: bool = False) -> str:
        """The conversation as the family writes it; with `prompt`, up to where the assistant begins to answer.

        Refused where the template does not write it.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        variables: dict[str, Any] = {**dict(self.tokens), **dict(self.options), "tools": tools}
        variables |= {"chat_template": self.source, "add_generation_prompt": prompt}
        try:
            found, _ = render_jinja_template([messages], **variables)
        except Exception as error:  # a template is a program: it may raise anything
            raise Refused((str(error).splitlines() or [type(error).__name__])[0]) from None
        return found[0]


@dataclass(frozen=True, slots=True)
class Written:
    """A stretch of rendered text: template, or (part not None) what the family made of a part.

    `skipped` counts bytes at the part's beginning that the family leaves out. A `variant` other than 0 is text that
    differs from the part's, for instance escaped.
    """

    text: str
    part: Part | None = None
    skipped: int = 0
    variant: int = 0


def write(template: Template, name: str, messages: list[Message], tools: Tools, *, prompt: bool) -> list[Written]:
    """The rendered conversation in stretches; UserError where the template cannot write it or hides what it writes.

    Turns that the template refuses or drops are put into turns that it has: the system's text before the first
    user's, tool calls and results as text.
    """
    reason: str | None = None
    for adapted, adapted_tools in _adaptations(messages, tools):
        for style in STYLES if any("tool_calls" in message for message in messages) else STYLES[:1]:
            try:
                found = _located(template, messages, adapted, adapted_tools, style, prompt)
            except Refused as error:
                reason = reason or str(error)
                continue
            if found is not None:
                return found
            reason = reason or "it leaves parts of messages out or rewrites them"
    raise UserError(f"{name}: the chat template cannot render this conversation ({reason}); change its messages")


def _adaptations(messages: list[Message], tools: Tools) -> Iterator[tuple[Any, Tools]]:
    """Ways to write the conversation, the family's own first, as functions of the messages."""
    yield (lambda rows: rows), tools
    yield merged_system, tools
    if tools or any(m["role"] == "tool" or "tool_calls" in m for m in messages):
        yield (lambda rows: spoken_tools(rows, tools)), None
        yield (lambda rows: merged_system(spoken_tools(rows, tools))), None


def _located(
    template: Template, messages: list[Message], adapt: Any, tools: Tools, style: str, prompt: bool
) -> list[Written] | None:
    actual = template.render(adapt(_with_arguments(messages, style)), tools, prompt=prompt)
    parts = parts_of(messages)
    marks: dict[Any, Any] = {}
    for number, part in enumerate(parts):
        mark, where = f"\ue000{number}\ue001", (part.message, part.kind, part.call)
        if part.kind == "arguments":
            marks[where] = {"mapping": {mark: mark}, "text": mark, "values": {}}[style]
        elif part.kind == "value":
            if style == "values":
                names = messages[part.message]["tool_calls"][part.call]["function"]["arguments"]
                marks[part.message, "arguments", part.call][[*names][part.item]] = mark
        elif part.text.strip():  # white space alone may be trimmed together with template text beside it
            marks[where] = mark
    pattern = template.render(adapt(with_parts(messages, marks)), tools, prompt=prompt)
    cut = MARK.split(MARKED_MAPPING.sub("\ue000\\1\ue001", pattern))
    literals, numbers = cut[0::2], [int(number) for number in cut[1::2]]
    calls = {"values": "value"}.get(style, "arguments")
    needed = {n for n, part in enumerate(parts) if part.kind in ("content", "name", calls) and part.text.strip()}
    return None if needed - {*numbers} else _matched(literals, [parts[number] for number in numbers], actual)


def _with_arguments(messages: list[Message], style: str) -> list[Message]:
    """For templates that expect call arguments as JSON text: the messages with such."""
    if style != "text":
        return messages
    texts: dict[tuple[int, PartKind, int], Any]
    texts = {(p.message, p.kind, p.call): p.text for p in parts_of(messages) if p.kind == "arguments"}
    return with_parts(messages, texts)


@functools.lru_cache(maxsize=4096)
def _variants(kind: str, text: str) -> tuple[tuple[str, int, int], ...]:
    """What a template may make of a part: (text, bytes left out at the beginning, variant), likeliest first."""
    if kind == "arguments":
        value = json.loads(text)
        written = [
            text,
            json.dumps(value, ensure_ascii=False, separators=(",", ":")),
            json.dumps(value, ensure_ascii=False, indent=4),
            json.dumps(value, ensure_ascii=False, indent=2),
            json.dumps(value),
            str(value),
        ]
        found = {option: (option, 0, variant) for variant, option in reversed([*enumerate(written)])}
        return tuple(sorted(found.values(), key=lambda choice: choice[2]))
    found = {}
    for kept in (text, text.strip(), text.strip("\n"), text.lstrip("\n"), text.rstrip(), text.lstrip()):
        found.setdefault(kept, (kept, len(text[: text.index(kept)].encode()), 0))
    escaped = json.dumps(text, ensure_ascii=False)[1:-1]
    found.setdefault(escaped, (escaped, 0, 1))
    return tuple(found.values())


def _matched(literals: list[str], parts: list[Part], actual: str) -> list[Written] | None:
    """The stretches whose texts join to `actual`: every part in some variant, found by depth-first search."""
    if not actual.startswith(literals[0]):
        return None
    options = [_variants(part.kind, part.text) for part in parts]
    chosen: list[int] = []  # the variant of every part so far
    ends = [len(literals[0])]
    first = 0  # the variant to try next
    while True:
        depth = len(chosen)
        if depth == len(parts):
            if ends[-1] == len(actual):
                break
        else:
            follows = literals[depth + 1]
            for number in range(first, len(options[depth])):
                stretch = options[depth][number][0] + follows
                if actual.startswith(stretch, ends[-1]):
                    chosen.append(number)
                    ends.append(ends[-1] + len(stretch))
                    first = 0
                    break
            if len(chosen) > depth:
                continue
        if not chosen:
            return None
        first = chosen.pop() + 1
        ends.pop()
    found = [Written(literals[0])]
    for part, choices, number, literal in zip(parts, options, chosen, literals[1:], strict=True):
        text, skipped, variant = choices[number]
        found += [Written(text, part, skipped, variant), Written(literal)]
    return [stretch for stretch in found if stretch.text]
