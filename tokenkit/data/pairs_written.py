"""Questions and answers that a teacher is brought to write: what it reads before each, and where each ends."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tokenkit.config import Config, UserError
from tokenkit.data.synthetic import Row, text_of
from tokenkit.models.engines import Engine
from tokenkit.models.sample import Sampled
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.tokenizers.chat import encode_pieces, render

PairMode = Literal["instruct", "qa"]
FIELDS = re.compile(r"\{(text|question)\}")
ALONE = "Write the {what} alone, without anything before or after it."


class PairConfig(Config):
    """How a pair is asked for. `{text}` stands for a text of `prompts`, `{question}` for what was written first."""

    chat: bool = False
    """Both are asked of the teacher as a user of its chat template would; else they are continued as text."""
    question: str | None = None
    """What the teacher reads before it writes the question or instruction; every mode has its own."""
    answer: str | None = None
    """What it reads before it writes the answer."""
    user: str | None = None
    """What the user says in the row that is written; the assistant says the answer."""
    question_until: list[str] | None = None
    """Whichever of these comes first ends the question, and is not part of it."""
    answer_until: list[str] | None = None


INSTRUCT = PairConfig(
    question="Instruction:",
    answer="Instruction: {question}\nResponse:",
    user="{question}",
    question_until=["\n"],
    answer_until=["\nInstruction:"],
)
INSTRUCT_CHAT = PairConfig(
    question="Write one instruction that a person might give to an assistant. " + ALONE.format(what="instruction"),
    answer="{question}",
    user="{question}",
    question_until=[],
    answer_until=[],
)
QA = PairConfig(
    question="{text}\n\nQuestion:",
    answer="{text}\n\nQuestion: {question}\nAnswer:",
    user="{text}\n\n{question}",
    question_until=["\n"],
    answer_until=["\n"],
)
QA_CHAT = PairConfig(
    question="{text}\n\nWrite one question that this text answers. " + ALONE.format(what="question"),
    answer="{text}\n\n{question}",
    user="{text}\n\n{question}",
    question_until=[],
    answer_until=[],
)
DEFAULTS: dict[tuple[PairMode, bool], PairConfig] = {
    ("instruct", False): INSTRUCT,
    ("instruct", True): INSTRUCT_CHAT,
    ("qa", False): QA,
    ("qa", True): QA_CHAT,
}


def completed(config: PairConfig, mode: PairMode) -> PairConfig:
    """With the mode's own words where none are given."""
    own = {key: value for key, value in config.model_dump().items() if value is not None}
    return DEFAULTS[mode, config.chat].model_copy(update=own)


def needs_text(config: PairConfig) -> bool:
    """Whether texts of a source stand in what the teacher reads."""
    return any("{text}" in (words or "") for words in (config.question, config.answer, config.user))


def filled(words: str, values: Mapping[str, str]) -> str:
    """The words with `{text}` and `{question}` replaced at once, so that braces inside a text are left alone."""
    return FIELDS.sub(lambda found: values[found[1]], words)


def asked(tokenizer: Tokenizer, words: str, *, chat: bool) -> list[int]:
    """The ids that the teacher reads."""
    if chat:
        pieces = render(tokenizer, [{"role": "user", "content": words}], prompt=True)
        return encode_pieces(tokenizer, pieces).encoding.ids.tolist()
    return [tokenizer.start_id(), *tokenizer.encode(words).ids.tolist()]


def ends_at(tokenizer: Tokenizer, marks: Sequence[str]) -> Callable[[list[int]], bool]:
    """Whether new ids spell one of the marks."""
    spelled = [mark.encode() for mark in marks]
    longest = max(map(len, spelled), default=0)

    def over(ids: list[int]) -> bool:
        # what ended before the last token was seen then, so a mark ends in that token
        tail = b"".join(tokenizer.token_bytes[i] for i in ids[-1 - longest :])
        return any(mark in tail for mark in spelled)

    return over


def written(tokenizer: Tokenizer, ids: list[int], marks: Sequence[str]) -> str:
    """The text before the first mark, without white space around it."""
    text = text_of(tokenizer, ids)
    ends = [text.find(mark) for mark in marks if mark in text]
    return text[: min(ends, default=len(text))].strip()


def check_words(config: PairConfig) -> None:
    """UserError where the answer is not asked for by its question, so that the two would have nothing in common."""
    for key, words in (("answer", config.answer), ("user", config.user)):
        if "{question}" not in (words or ""):
            raise UserError(f"pairs.{key}: {words!r} has no {{question}} in it; write where the question stands")


@dataclass(frozen=True)
class PairWriter:
    """Brings a teacher to write pairs: all questions of a batch first, then their answers."""

    engine: Engine
    tokenizer: Tokenizer
    config: PairConfig

    def rows(self, texts: Sequence[str], numbers: Sequence[int]) -> list[Row | None]:
        """The conversations of the sequences of these numbers; None where question or answer is empty."""
        told = [{"text": text} for text in texts]
        questions = self._ask(self.config.question, self.config.question_until, told, numbers, 0)
        for values, (question, _) in zip(told, questions, strict=True):
            values["question"] = question
        asked = [place for place, values in enumerate(told) if values["question"]]
        about = [told[place] for place in asked], [numbers[place] for place in asked], 1
        answers = self._ask(self.config.answer, self.config.answer_until, *about)
        rows: list[Row | None] = [None] * len(numbers)
        for place, (answer, drawn) in zip(asked, answers, strict=True):
            if answer:
                rows[place] = self._row(told[place], answer, [questions[place][1], drawn])
        return rows

    def _ask(
        self,
        words: str | None,
        marks: list[str] | None,
        told: Sequence[Mapping[str, str]],
        numbers: Sequence[int],
        stream: int,
    ) -> list[tuple[str, Sampled]]:
        ends = marks or []
        prompts = [asked(self.tokenizer, filled(words or "", values), chat=self.config.chat) for values in told]
        until = ends_at(self.tokenizer, ends) if ends else None
        found = self.engine.draw(prompts, numbers, stream=stream, until=until)
        return [(written(self.tokenizer, one.ids, ends), one) for one in found]

    def _row(self, values: Mapping[str, str], answer: str, drawn: Sequence[Sampled]) -> Row:
        user = filled(self.config.user or "", values)
        return {
            "messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}],
            "drawn": [one.ids for one in drawn],
            "ended": drawn[-1].ended,
            "logp": math.fsum(one.logp for one in drawn),
        }
