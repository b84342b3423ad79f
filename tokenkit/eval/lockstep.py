"""An ensemble as something that scores texts and continuations and writes, whatever its members share."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from tokenkit.eval.bits_per_byte import EvalConfig, bits_per_byte
from tokenkit.eval.byte_ensemble import continue_bytes, score_bytes, score_pairs
from tokenkit.eval.combine import Combination
from tokenkit.eval.ensemble import Ensemble
from tokenkit.eval.next_byte import END, ByteModel
from tokenkit.models.sample import DrawConfig, Drawing, positions_of
from tokenkit.models.temperature import TemperatureConfig


@runtime_checkable
class Lockstep(Protocol):
    """Several models as one."""

    unit: str
    """What is drawn: token or byte."""

    def figures(self, documents: Sequence[str]) -> dict[str, Any]:
        """Bits per byte of the ensemble and of each member by itself (`members`, in their order)."""
        ...

    def scores(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Of each (context, continuation) the log-probability in nats, and whether it is the likeliest all the way."""
        ...

    def logp(self, text: str) -> float:
        """Log-probability of a whole text, in nats."""
        ...

    def write(
        self,
        prompts: "Sequence[str | Sequence[list[int]]]",
        draw: DrawConfig,
        *,
        count: int,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """One continuation per prompt, of `count` new tokens or bytes at most."""
        ...


def drawing(draw: DrawConfig, count: int, end: int, barred: tuple[int, ...] = ()) -> Drawing:
    """How `count` symbols are drawn at most; `end` ends."""
    return Drawing(draw, draw.temperature.over(count), count, 0, frozenset({end}), barred)


def drawn_at(temperature: float, top_p: float = 1.0) -> DrawConfig:
    """A constant temperature; 0 takes the likeliest."""
    return DrawConfig(temperature=TemperatureConfig(start=temperature), top_p=top_p)


class TokenLockstep:
    """Over slots of tokens."""

    unit = "token"

    def __init__(self, ensemble: Ensemble, reading: EvalConfig) -> None:
        self.ensemble, self.reading = ensemble, reading

    def figures(self, documents: Sequence[str]) -> dict[str, Any]:
        """Members are scored as `tokenkit eval` scores them, with tokens of their own."""
        joint = self.ensemble.bits_per_byte(documents, self.reading)
        options = self.reading.windows()
        alone = [bits_per_byte(m.view, m.tokenizer, [*documents], **options) for m in self.ensemble.members]
        return {
            "slots": len(self.ensemble.slots.spelled),
            "members": [{"bits_per_byte": found.value, "tokens": found.num_tokens} for found in alone],
            "bits_per_byte": joint.value,
            "bytes": joint.num_bytes,
            "tokens": joint.num_tokens,
        }

    def scores(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Read up to as many tokens as every member has positions."""
        found = [positions_of(member.view.model) for member in self.ensemble.members]
        positions = min((n for n in found if n is not None), default=self.reading.context_tokens)
        return self.ensemble.scores(pairs, positions=positions)

    def logp(self, text: str) -> float:
        """In the sliding context of `reading`."""
        return -self.ensemble.bits_per_byte([text], self.reading).nats

    def write(
        self,
        prompts: "Sequence[str | Sequence[list[int]]]",
        draw: DrawConfig,
        *,
        count: int,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """`count` tokens at most."""
        slots = self.ensemble.slots
        return self.ensemble.continued(prompts, drawing(draw, count, slots.end, slots.silent()), seed=seed, stop=stop)


class ByteLockstep:
    """Over bytes."""

    unit = "byte"

    def __init__(self, models: Sequence[ByteModel], combine: Combination, context_bytes: int) -> None:
        self.models, self.combine, self.context_bytes = models, combine, context_bytes

    def figures(self, documents: Sequence[str]) -> dict[str, Any]:
        """Members are scored byte by byte, on the same bytes after the same context."""
        joint, own = score_bytes(self.models, self.combine, documents, context_bytes=self.context_bytes)
        members = [{"bits_per_byte": found.bits_per_byte, "dropped": found.dropped} for found in own]
        return {"members": members, "bits_per_byte": joint.bits_per_byte, "bytes": joint.num_bytes}

    def scores(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Read up to `context_bytes` bytes."""
        return score_pairs(self.models, self.combine, pairs, context_bytes=self.context_bytes)

    def logp(self, text: str) -> float:
        """In a sliding context of `context_bytes`."""
        return -score_bytes(self.models, self.combine, [text], context_bytes=self.context_bytes)[0].nats

    def write(
        self,
        prompts: "Sequence[str | Sequence[list[int]]]",
        draw: DrawConfig,
        *,
        count: int,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """`count` bytes at most."""
        return continue_bytes(self.models, self.combine, prompts, drawing(draw, count, END), seed=seed, stop=stop)
