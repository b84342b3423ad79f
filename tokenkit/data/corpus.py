"""The `data:` section of a run file, and the rows and documents that it names: of one source, or of several."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from tokenkit.align.modes import ModeName
from tokenkit.config import Config, UserError
from tokenkit.data.example import Row, SpecialTokens, Window, cut, iterate_windows
from tokenkit.data.messages import Dialogue, iterate_dialogues, read_dialogues
from tokenkit.data.mixture import WeightedSource, check_mixture, names_of
from tokenkit.data.order import MixedRows
from tokenkit.data.source import SourceConfig, describe, iterate_documents, read_documents
from tokenkit.data.stream import Rows, StreamedRows
from tokenkit.tokenizers.chat import TrainOn

SAMPLE_BYTES = 16_000_000  # of a stream, where documents are wanted and not rows


class DataConfig(Config):
    """Training text, cut by bytes so that every tokenizer sees the same text at the same step."""

    source: SourceConfig | None = None
    """Where it comes from; or `mixture` in its place."""
    mixture: list[WeightedSource] = []
    """Several sources in shares of the rows, each with the keys of `source`. None ends before another: each runs
    through epochs of its own."""
    mix_languages: bool = True
    """false: all rows of a step are of one language, and languages have their shares of the steps."""
    window_bytes: int = Field(512, ge=4)
    """Bytes of text in one row; a byte-level student needs about as many positions. Of conversations: tokens."""
    packing: bool = False
    """Short rows are read together, up to `window_bytes` of text in one, and none sees another. A row of a batch is
    then such a pack."""
    streaming: bool = False
    """Text is read as it comes, and never held whole; rows are shuffled inside of a buffer."""
    shuffle_buffer: int = Field(1000, ge=1)
    """Of a stream: rows among which the order is drawn; 1 keeps the order of the source."""
    workers: int = Field(0, ge=0)
    """Processes that tokenise and align coming steps while a step is computed; rows and their order stay the same."""
    format: Literal["text", "chat"] = "text"
    """`chat`: each row of the source holds messages (under `source.field`, by default `messages`)."""
    learn_after: str | None = None
    """Of text: what stands up to the last occurrence of this marker is read and not learnt (`"### Response:\\n"`)."""
    train_on: TrainOn = "assistant"
    """Of conversations: what the student learns to write."""
    template_options: dict[str, Any] = {}
    """Variables of the chat templates, such as enable_thinking or date_string."""
    chunks: ModeName = "unconstrained"
    """What chunks are joined to before any loss sees them: whole words, or up to ends of little tokenization bias."""
    bias: Path | None = None
    """For `unbiased`: the folder that `tokenkit tokenizer-info` wrote for this pair."""
    bias_threshold: float = Field(0.1, ge=0, le=1)
    mined: Path | None = None
    """For losses over MinED's token map: the folder of `tokenkit mined-mapping`; without one it is made at start."""
    special_tokens_mode: SpecialTokens = "identity"
    """Special tokens of both sides are compared by their places; or none is; or all but padding tokens are."""

    @model_validator(mode="after")
    def _one(self) -> "DataConfig":
        if (self.source is None) == (not self.mixture):
            raise UserError("data: give either source={path: ...}, or mixture=[{path: ..., weight: 1}, ...]")
        check_mixture(self.mixture, mix_languages=self.mix_languages)
        if not self.mix_languages and not self.mixture:
            raise UserError("data.mix_languages: false, but there is one source; write a mixture, or leave it out")
        return self

    @property
    def sources(self) -> Sequence[SourceConfig]:
        """The one source, or those of the mixture."""
        return self.mixture if self.source is None else [self.source]

    @property
    def pack_bytes(self) -> int | None:
        """Bytes of text that are read together; None without packing."""
        return self.window_bytes if self.packing else None

    def describe(self) -> str:
        """What the text is called in messages and reports."""
        if self.source is not None:
            return describe(self.source)
        total = sum(one.weight for one in self.mixture)
        names = zip(names_of(self.mixture), self.mixture, strict=True)
        return ", ".join(f"{100 * one.weight / total:.3g} % {name}" for name, one in names)


def read_training_rows(data: DataConfig) -> Rows:
    """The rows of the training text: windows of documents, or conversations. Of a stream nothing is read yet."""
    if data.streaming:
        reads = [partial(_streamed, data, source) for source in data.sources]
        return StreamedRows(reads, data.sources, data.shuffle_buffer, mix_languages=data.mix_languages)
    parts = [_held(data, source) for source in data.sources]
    return parts[0] if data.source is not None else MixedRows(parts, data.mixture, data.mix_languages)


def read_texts(data: DataConfig) -> list[str]:
    """The documents of the training text, those of several sources mixed evenly, so that a part stands for the whole.

    Of a stream the first ones alone: as many as `max_bytes` of its sources say, else 16 MB in all.
    """
    if data.streaming:
        share = SAMPLE_BYTES // len(data.sources)
        cut = [one.model_copy(update={"max_bytes": one.max_bytes or share}) for one in data.sources]
        parts = [[*iterate_documents(source, streaming=True)] for source in cut]
    else:
        parts = [read_documents(source) for source in data.sources]
    places = sorted(((i + 0.5) / len(part), number, i) for number, part in enumerate(parts) for i in range(len(part)))
    return [parts[number][i] for _, number, i in places]


def _streamed(data: DataConfig, source: SourceConfig) -> Iterator[Row]:
    """The rows of one source, in its order, read as they are asked for."""
    if data.format == "text":
        return iterate_windows(iterate_documents(source, streaming=True), data.window_bytes, data.learn_after)
    return iterate_dialogues(source, _column(source), streaming=True)


def _held(data: DataConfig, source: SourceConfig) -> list[Window] | list[Dialogue]:
    """The same, all of them."""
    if data.format == "text":
        return cut(read_documents(source), data.window_bytes, data.learn_after)
    return read_dialogues(source, _column(source))


def _column(source: SourceConfig) -> str:
    return source.field if "field" in source.model_fields_set else "messages"
