"""Conversations as training rows: both sides write the same messages in their own words; only answers are learnt."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tokenkit.config import UserError
from tokenkit.data.source import SourceConfig, describe, read_rows
from tokenkit.tokenizers.conversation import Message, as_messages


@dataclass(frozen=True, slots=True)
class Dialogue:
    """One conversation of a source, and the tools that its assistant may call."""

    document: int
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    start_byte: int = 0  # as a window has it: a conversation is never cut at its beginning


def read_dialogues(source: SourceConfig, field: str = "messages") -> list[Dialogue]:
    """The conversations of a source, in a fixed order; UserError where there are none."""
    found = list(iterate_dialogues(source, field))
    if not found:
        raise UserError(f"{describe(source)}: no conversation in it; write a .jsonl file with {field!r} in each line")
    return found


def iterate_dialogues(source: SourceConfig, field: str = "messages", *, streaming: bool = False) -> Iterator[Dialogue]:
    """The conversations of a source as they are read; tools stand beside the messages, under `tools`."""
    budget = source.max_bytes
    for document, (place, row) in enumerate(read_rows(source, field, streaming=streaming)):
        try:
            messages = as_messages(row[field])
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
        tools = row.get("tools") or None
        if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            raise UserError(f"{place}: tools: expected a list of JSON schemas")
        if budget is not None and budget <= 0:
            return
        if not any(message["role"] == "assistant" for message in messages):
            raise UserError(f"{place}: no message of an assistant, so nothing to learn; leave it out")
        yield Dialogue(document, messages, tools)
        budget = None if budget is None else budget - sum(len(m["content"].encode()) for m in messages)
