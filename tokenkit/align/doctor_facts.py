"""What the doctor knows and what it says: plain data, before any rendering."""

from dataclasses import dataclass
from typing import Literal

from tokenkit.align.doctor_measure import Measured
from tokenkit.align.doctor_schemes import Profile
from tokenkit.align.doctor_vocabulary import Entries, ScriptCoverage

Level = Literal["ok", "note", "warning"]
Number = int | float | bool | str | None


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to know about a pair, in one sentence, with the numbers it rests on."""

    topic: str
    level: Level
    sentence: str
    numbers: dict[str, Number]


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What config.json and the headers of the weights say of a model."""

    name: str
    rows: int  # of the input embedding
    width: int
    matrices: int  # with one row per id: 1 where the output head is the input embedding, else 2
    bytes_per_weight: int
    parameters: int


@dataclass(frozen=True, slots=True)
class Side:
    """One tokenizer of the pair."""

    name: str
    bos: str | None
    eos: str | None
    pad: str | None
    entries: Entries
    profile: Profile


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that findings are made of."""

    source: Side
    target: Side
    same: bool  # the two tokenizers give the same ids
    scripts: tuple[ScriptCoverage, ...]
    probes: tuple[Measured, ...]
    all_probes: Measured
    corpus: Measured | None
    model: ModelFacts | None

    @property
    def running(self) -> Measured:
        """Running text: the corpus where one was given, else the built-in texts."""
        return self.all_probes if self.corpus is None else self.corpus

    @property
    def shared(self) -> int:
        """Ordinary target tokens that the source has with the same bytes: the rows that a transfer copies."""
        return sum(script.same for script in self.scripts)
