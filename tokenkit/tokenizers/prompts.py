"""Prompts in a neutral form: text with placeholders that every family replaces by its own roles; and ways to frame one.

The neutral form is for files that somebody wrote with placeholders. Messages are rendered by `chat.render`, where
nothing that a user writes can be taken for a placeholder.
"""

import re
from typing import Literal

from tokenkit.tokenizers.base import Tokenizer
from tokenkit.tokenizers.chat import Piece, render, roles_of
from tokenkit.tokenizers.roles import Roles

PromptMode = Literal[
    "surround_instruct",
    "direct_encode",
    "direct_encode_no_force_eos",
    "direct_encode_no_force_bos",
    "direct_encode_no_force_bos_no_force_eos",
]
NAMES = ("bos", "pad", "start_header", "end_header", "eos", "eot", "system_name", "user_name", "assistant_name")
PLACEHOLDER = re.compile(r"<\|<(" + "|".join(NAMES) + r")>\|>")


def prompt_pieces(tokenizer: Tokenizer, prompt: str, mode: PromptMode, *, placeholders: bool = False) -> list[Piece]:
    """One prompt as pieces: asked as a user (`surround_instruct`), or as it is with bos before and eos after.

    `direct_encode` makes sure of both, the `no_force` modes leave one or both out. With `placeholders`, `<|<eot>|>` and
    its like stand for the family's roles; else they are text, as special tokens' literals are.
    """
    if mode == "surround_instruct" and not placeholders:
        return render(tokenizer, [{"role": "user", "content": prompt}], prompt=True)
    if mode == "surround_instruct":
        prompt = neutral_prompt([{"role": "user", "content": prompt}], prompt=True)
    roles = roles_of(tokenizer)
    pieces = neutral_pieces(roles, prompt) if placeholders else [Piece(prompt, 1, template=False, trained=True)]
    if "no_force_bos" not in mode and roles.bos and not (pieces and pieces[0].text == roles.bos):
        pieces.insert(0, Piece(roles.bos, 0))
    closed = bool(pieces) and pieces[-1].template and pieces[-1].text in (roles.eot, roles.eos)
    if mode.endswith(("direct_encode", "direct_encode_no_force_bos")) and roles.eos and not closed:
        pieces.append(Piece(roles.eos, 2 + len(PLACEHOLDER.findall(prompt)) * 2))
    return [piece for piece in pieces if piece.text]


def neutral_pieces(roles: Roles, text: str) -> list[Piece]:
    """The text cut at placeholders, each with its place: the same in every family; an empty role leaves nothing."""
    cut = PLACEHOLDER.split(text)
    start, pieces = 0, []
    for place, part in enumerate(cut):
        if place % 2:
            pieces.append(Piece(_replacement(roles, part), place))
        else:
            pieces.append(Piece(part, place, start, template=False, trained=True))
            start += len(part.encode())
    return [piece for piece in pieces if piece.text]


def _replacement(roles: Roles, name: str) -> str:
    found = {
        "bos": roles.bos,
        "pad": roles.pad,
        "start_header": roles.start_header,
        "end_header": roles.end_header,
        "eos": roles.eos,
        "eot": roles.eot,
        "system_name": roles.system,
        "user_name": roles.user,
        "assistant_name": roles.assistant,
    }
    return found[name]


def neutral_prompt(messages: list[dict[str, str]], *, prompt: bool = False) -> str:
    """Messages of system, user and assistant in the neutral form; with `prompt`, up to where the assistant answers."""
    header = "<|<start_header>|><|<{}_name>|><|<end_header>|>"
    turns = [header.format(m["role"]) + m["content"] + "<|<eot>|>" for m in messages]
    return "<|<bos>|>" + "".join(turns) + (header.format("assistant") if prompt else "")
