"""The roles of a family, read from its chat template by writing small conversations with it."""

import functools
import re

from tokenkit.config import UserError
from tokenkit.tokenizers.conversation import Message
from tokenkit.tokenizers.roles import Roles
from tokenkit.tokenizers.template import MARK, Refused, Template

UNIT = re.compile(r"<[^<>\n]*>|\[[^\[\]\n]*\]")  # what looks like a special token is never cut


def _between(template: Template, *roles: str, prompt: bool = False) -> list[str]:
    """What stands before, between and after the contents of messages of these roles."""
    messages: list[Message] = [{"role": role, "content": f"\ue000{i}\ue001"} for i, role in enumerate(roles)]
    cut = MARK.split(template.render(messages, prompt=prompt))
    if cut[1::2] != [str(i) for i in range(len(roles))]:
        raise Refused("it leaves turns out or moves them")
    return cut[::2]


@functools.lru_cache(maxsize=64)
def infer_roles(template: Template, name: str) -> Roles:
    """Headers, names and ends of turns, as they stand between the contents of probe conversations."""
    try:
        first, ask, answer, _, end = _between(template, "user", "assistant", "user", "assistant")
        tail = _between(template, "user", "assistant", "user")[-1]
        prompted = _between(template, "user", "assistant", "user", prompt=True)[-1]
    except Refused as error:
        raise UserError(f"{name}: the chat template cannot write user and assistant turns ({error})") from None
    tokens = dict(template.tokens)
    eot = _common_start(answer, end)
    user_header = answer[len(eot) :]
    closing = _common_start(tail, prompted)
    assistant_header = prompted[len(closing) :] if ask.endswith(prompted[len(closing) :]) else ask[len(closing) :]
    user_eot = ask[: len(ask) - len(assistant_header)]
    start = _common_start(user_header, assistant_header)
    end_header = _common_end(user_header[len(start) :], assistant_header[len(start) :])
    user = user_header[len(start) : len(user_header) - len(end_header)]
    assistant = assistant_header[len(start) : len(assistant_header) - len(end_header)] if assistant_header else ""
    bos = tokens.get("bos_token", "")
    return Roles(
        specials=tuple(dict.fromkeys(unit for unit in UNIT.findall(first + ask + answer + end))),
        bos=bos if first.startswith(bos) else "",
        pad=tokens.get("pad_token", ""),
        start_header=start,
        end_header=end_header,
        eos=tokens.get("eos_token", ""),
        eot=eot,
        user_eot=None if user_eot == eot else user_eot,
        system=_system_name(template, bos, start, end_header) or user,
        user=user,
        assistant=assistant,
    )


def _system_name(template: Template, bos: str, start: str, end_header: str) -> str:
    """The name in the header of a system turn; "" where the family has none."""
    try:
        before = _between(template, "system", "user")[0].removeprefix(bos)
    except Refused:  # an answer, too
        return ""
    if not before.startswith(start) or not end_header:
        return ""
    name, found, _ = before[len(start) :].partition(end_header)
    return name if found else ""


def _common_start(a: str, b: str) -> str:
    """What both begin with, without half a special token and, where they part inside a word, without its beginning."""
    size = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    for text in (a, b):
        size = min([size, *(unit.start() for unit in UNIT.finditer(text) if unit.start() < size < unit.end())])
    if size < len(a) and size < len(b):
        while size and a[size - 1].isalnum():
            size -= 1
    return a[:size]


def _common_end(a: str, b: str) -> str:
    """What both end with, under the same rules."""
    size = next((i for i, (x, y) in enumerate(zip(a[::-1], b[::-1])) if x != y), min(len(a), len(b)))
    for text in (a, b):
        cuts = [len(text) - unit.end() for unit in UNIT.finditer(text) if unit.start() < len(text) - size < unit.end()]
        size = min([size, *cuts])
    if size < len(a) and size < len(b):
        while size and a[len(a) - size].isalnum():
            size -= 1
    return a[len(a) - size :]
