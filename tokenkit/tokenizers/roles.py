"""What begins, ends and heads a turn in a model family: read from its chat template, or from a table of families."""

import json
from dataclasses import dataclass

from tokenkit.config import UserError
from tokenkit.tokenizers.base import Tokenizer


@dataclass(frozen=True, slots=True)
class Roles:
    """Template text of every role, as it stands in a rendered conversation; "" where a family has none.

    The literals in `specials` are special tokens, everything else in the roles is ordinary template text.
    """

    specials: tuple[str, ...]
    bos: str = ""
    pad: str = ""
    start_header: str = ""
    end_header: str = ""
    eos: str = ""
    eot: str = ""
    user_eot: str | None = None  # None: as `eot`
    system: str = ""
    user: str = ""
    assistant: str = ""

    def end_of_turn(self, role: str) -> str:
        """What closes a turn."""
        return self.eot if role == "assistant" or self.user_eot is None else self.user_eot

    def jinja(self) -> str:
        """A chat template that writes turns of system, user and assistant in these roles; it refuses tools."""
        bos, prompt = json.dumps(self.bos, ensure_ascii=False), json.dumps(self.header("assistant"), ensure_ascii=False)
        turns = [
            (
                role,
                json.dumps(self.header(role), ensure_ascii=False),
                json.dumps(self.end_of_turn(role), ensure_ascii=False),
            )
            for role in ("system", "user", "assistant")
        ]
        cases = "".join(
            f"{{%- {'if' if number == 0 else 'elif'} m['role'] == '{role}' %}}{{{{ {header} + m['content'] + {end} }}}}"
            for number, (role, header, end) in enumerate(turns)
        )
        refused = "{%- else %}{{ raise_exception('only system, user and assistant turns') }}{%- endif %}"
        calls = "{%- if m.get('tool_calls') %}{{ raise_exception('no tool calls') }}{%- endif %}"
        tools = "{%- if tools %}{{ raise_exception('no tools') }}{%- endif %}"
        body = f"{tools}{{{{- {bos} }}}}{{%- for m in messages %}}{calls}{cases}{refused}{{%- endfor %}}"
        return body + f"{{%- if add_generation_prompt %}}{{{{ {prompt} }}}}{{%- endif %}}"

    def find_header(self, text: str) -> tuple[str, str, str, str, str] | None:
        """Template text cut at its last header: what is before, start, name, end, what is after."""
        if self.start_header:
            before, found, rest = text.rpartition(self.start_header)
            name, end, after = rest.partition(self.end_header) if self.end_header else (rest, "", "")
            return (before, found, name, end, after) if found and end == self.end_header else None
        names = {name for name in (self.system, self.user, self.assistant) if name}
        at = max(((text.rfind(name + self.end_header), len(name), name) for name in names), default=(-1, 0, ""))
        if at[0] < 0:
            return None
        begin = at[0] + at[1]
        return text[: at[0]], "", at[2], self.end_header, text[begin + len(self.end_header) :]

    def header(self, role: str) -> str:
        """What stands before the content of a message of `system`, `user` or `assistant`; "" without headers."""
        names = {"system": self.system, "user": self.user, "assistant": self.assistant}
        return self.start_header + names[role] + self.end_header if names[role] else ""


# Families whose tokenizer folders often come without a template; where one is there, `infer_roles` reads it instead.
KINDS: dict[str, Roles] = {
    "Qwen2": Roles(
        ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        pad="<|endoftext|>",
        start_header="<|im_start|>",
        end_header="\n",
        eos="<|endoftext|>",
        eot="<|im_end|>\n",
        system="system",
        user="user",
        assistant="assistant",
    ),
    "Qwen3": Roles(
        ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        bos="<|endoftext|>",
        pad="<|endoftext|>",
        start_header="<|im_start|>",
        end_header="\n",
        eos="<|endoftext|>",
        eot="<|im_end|>\n",
        system="system",
        user="user",
        assistant="assistant",
    ),
    "Llama3": Roles(
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"),
        bos="<|begin_of_text|>",
        pad="<|end_of_text|>",
        start_header="<|start_header_id|>",
        end_header="<|end_header_id|>\n\n",
        eos="<|eot_id|>",  # what ends a text that was rendered is the end of its last turn
        eot="<|eot_id|>",
        system="system",
        user="user",
        assistant="assistant",
    ),
    **{
        name: Roles(
            ("<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>", "<pad>"),
            bos="<bos>",
            pad="<pad>",
            start_header="<start_of_turn>",
            end_header="\n",
            eos="<eos>",
            eot="<end_of_turn>\n",
            system="user",  # the family has no system turn
            user="user",
            assistant="model",
        )
        for name in ("Gemma2", "Gemma3")
    },
    "Phi3": Roles(
        ("<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
        pad="<|endoftext|>",
        end_header="\n",
        eos="<|endoftext|>",
        eot="<|end|>\n",
        system="<|user|>",
        user="<|user|>",
        assistant="<|assistant|>",
    ),
    "GPT2": Roles(("<|endoftext|>",), pad="<|endoftext|>", eos="<|endoftext|>", eot="<|endoftext|>"),
    **{
        name: Roles(("<s>", "</s>", "<unk>"), bos="<s>", pad="</s>", eos="</s>", eot="</s>")
        for name in ("TinyLlama", "Mistral")
    },
}


def kind_roles(kind: str) -> Roles:
    """The roles of a family by its name in spec strings."""
    if kind not in KINDS:
        raise UserError(f"tokenizer kind {kind!r}: unknown; write one of {', '.join(KINDS)}")
    return KINDS[kind]


KIND_KEY = "tokenkit_kind"  # in tokenizer_config.json: the family whose special tokens a tokenizer was given


def kind_of(tokenizer: Tokenizer) -> str | None:
    """The family of a tokenizer without chat template: as noted in its folder, else the first whose specials it has."""
    noted = tokenizer.config.get(KIND_KEY)
    if noted is not None:
        return noted
    fitting = (kind for kind, roles in KINDS.items() if set(roles.specials) <= set(tokenizer.special_tokens))
    return next(fitting, None)


def family_roles(tokenizer: Tokenizer) -> Roles:
    """The roles of a tokenizer without chat template; where its family is unknown, texts between bos and eos."""
    kind = kind_of(tokenizer)
    if kind is not None:
        return kind_roles(kind)
    literals = {index: text for text, index in tokenizer.special_tokens.items()}
    bos, eos, pad = ("" if i is None else literals[i] for i in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id))
    return Roles(tuple(dict.fromkeys(text for text in (bos, eos, pad) if text)), bos=bos, pad=pad, eos=eos, eot=eos)
