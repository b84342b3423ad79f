"""A conversation in one form for every family: messages, and the parts of them that people or models wrote."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tokenkit.config import UserError
from tokenkit.tokenizers.base import utf8

Message = dict[str, Any]  # role, content and, by role, reasoning_content, tool_calls, tool_call_id, name
PartKind = Literal["reasoning", "content", "name", "arguments", "value"]

ROLES = ("system", "user", "assistant", "tool")
REASONING = re.compile(r"(<think>\n*)(.*?)(\n*</think>\n*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Part:
    """A text inside a message that is not template: bytes `start`.. of all parts of the conversation in order."""

    message: int
    kind: PartKind
    call: int  # which tool call of the message; -1 outside of calls
    text: str
    start: int
    item: int = -1  # which argument of the call, for a value


def as_messages(messages: object) -> list[Message]:
    """The conversation with contents as strings and call arguments as mappings; UserError for what is none."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError(f"messages: expected a non-empty list of messages, found {type(messages).__name__}")
    return [_message(message, index) for index, message in enumerate(messages)]


def parts_of(messages: list[Message]) -> list[Part]:
    """Every part of canonical messages, in order; arguments of calls as a whole, then value by value."""
    found: list[Part] = []
    start = 0
    for index, message in enumerate(messages):
        for kind, call, item, text in _texts(message):
            found.append(Part(index, kind, call, text, start, item))
            start += len(text.encode())
    return found


def with_parts(messages: list[Message], texts: Mapping[tuple[int, PartKind, int], Any]) -> list[Message]:
    """The messages with the named parts replaced."""
    copies = []
    for index, message in enumerate(messages):
        copy = dict(message)
        content = texts.get((index, "content", -1))
        cut = _reasoning(message)
        if cut is not None:
            reasoning = texts.get((index, "reasoning", -1), cut[1])
            copy["content"] = cut[0] + reasoning + cut[2] + (cut[3] if content is None else content)
        elif content is not None:
            copy["content"] = content
        if "reasoning_content" in message and (index, "reasoning", -1) in texts:
            copy["reasoning_content"] = texts[index, "reasoning", -1]
        if "tool_calls" in message:
            copy["tool_calls"] = [_call(call, texts, index, n) for n, call in enumerate(message["tool_calls"])]
        copies.append(copy)
    return copies


def _reasoning(message: Message) -> tuple[str, str, str, str] | None:
    if message["role"] != "assistant" or "reasoning_content" in message:
        return None
    return reasoning_inside(message["content"])


def reasoning_inside(content: str) -> tuple[str, str, str, str] | None:
    """A content cut into what opens its reasoning, the reasoning, what closes it, and the rest; None without one."""
    found = REASONING.match(content)
    return None if found is None else (found[1], found[2], found[3], content[found.end() :])


def merged_system(messages: list[Message]) -> list[Message]:
    """For families without a system turn: its text before the first user's, two newlines between."""
    if messages[0]["role"] != "system" or len(messages) < 2 or messages[1]["role"] != "user":
        return messages
    joined = messages[0]["content"] + "\n\n" + messages[1]["content"]
    return [{**messages[1], "content": joined}, *messages[2:]]


def spoken_tools(messages: list[Message], tools: list[dict[str, Any]] | None) -> list[Message]:
    """For families without tool turns: tools, calls and results written into system, assistant and user texts."""
    spoken: list[Message] = []
    for message in messages:
        if message["role"] == "tool":
            result = f"<tool_response>\n{message['content']}\n</tool_response>"
            if spoken and spoken[-1]["role"] == "user":
                spoken[-1] = {**spoken[-1], "content": spoken[-1]["content"] + "\n" + result}
            else:
                spoken.append({"role": "user", "content": result})
        elif "tool_calls" in message:
            calls = [_spoken_call(call["function"]) for call in message["tool_calls"]]
            content = "\n".join([text for text in (message["content"], *calls) if text])
            spoken.append({k: v for k, v in message.items() if k != "tool_calls"} | {"content": content})
        else:
            spoken.append(message)
    if tools:
        text = "# Tools\n\n" + "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        if spoken[0]["role"] == "system":
            spoken[0] = {**spoken[0], "content": spoken[0]["content"] + "\n\n" + text}
        else:
            spoken.insert(0, {"role": "system", "content": text})
    return spoken


def _spoken_call(function: Message) -> str:
    arguments = function["arguments"]
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return f'<tool_call>\n{{"name": "{function["name"]}", "arguments": {written}}}\n</tool_call>'


def _texts(message: Message) -> Iterator[tuple[PartKind, int, int, str]]:
    cut = _reasoning(message)
    if "reasoning_content" in message:
        yield "reasoning", -1, -1, message["reasoning_content"]
    elif cut is not None:
        yield "reasoning", -1, -1, cut[1]
    yield "content", -1, -1, message["content"] if cut is None else cut[3]
    for number, call in enumerate(message.get("tool_calls", [])):
        yield "name", number, -1, call["function"]["name"]
        arguments = call["function"]["arguments"]
        yield "arguments", number, -1, json.dumps(arguments, ensure_ascii=False)
        for item, value in enumerate(arguments.values()):
            yield "value", number, item, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _call(call: Message, texts: Mapping[tuple[int, PartKind, int], Any], index: int, number: int) -> Message:
    function = dict(call["function"])
    for kind in ("name", "arguments"):
        if (index, kind, number) in texts:
            function[kind] = texts[index, kind, number]
    return {**call, "function": function}


def _message(message: object, index: int) -> Message:
    place = f"message {index}"
    if not isinstance(message, Mapping):
        raise UserError(f"{place}: expected a mapping with role and content, found {type(message).__name__}")
    role = {"developer": "system", "ipython": "tool"}.get(message.get("role", ""), message.get("role"))
    if role not in ROLES:
        raise UserError(f"{place}: role {role!r} is unknown; write one of {', '.join(ROLES)}")
    found: Message = {**message, "role": role, "content": _content(message.get("content"), place)}
    if not message.get("reasoning_content"):
        found.pop("reasoning_content", None)
    calls = found.pop("tool_calls", None)
    if calls:
        found["tool_calls"] = [_function_call(call, f"{place}, tool call {n}") for n, call in enumerate(calls)]
    return found


def _content(content: object, place: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        utf8(content, place)
        return content
    if isinstance(content, Sequence) and all(isinstance(c, Mapping) and c.get("type") == "text" for c in content):
        return "".join(c["text"] for c in content)
    raise UserError(f"{place}: content is neither text nor a list of texts; images and sounds cannot be tokenised here")


def _function_call(call: object, place: str) -> Message:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UserError(f"{place}: expected function: {{name, arguments}}, found {call!r}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except json.JSONDecodeError as error:
            raise UserError(f"{place}: arguments are not JSON ({error.msg}): {arguments[:40]!r}") from None
    if not isinstance(arguments, Mapping):
        raise UserError(f"{place}: arguments are a {type(arguments).__name__}; write a mapping of names to values")
    outer = {key: value for key, value in call.items() if key in ("id",)} if isinstance(call, Mapping) else {}
    return {**outer, "type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}
