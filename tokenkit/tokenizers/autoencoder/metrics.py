"""How near a reconstruction is to its text, in the checklist's measures and in one that survives an insertion."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from rapidfuzz.distance import Levenshtein


@dataclass(frozen=True)
class Closeness:
    """Shares are in [0, 1]; distances count code points."""

    char_accuracy_positional: float
    """Positions with equal characters over the length of the original: one insertion spoils the rest."""
    char_accuracy_aligned: float
    """1 - Levenshtein distance over the longer length."""
    character_error_rate: float
    word_accuracy_positional: float
    word_accuracy_bag: float
    edit_distance: int
    exact: bool

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def closeness(original: str, reconstruction: str) -> Closeness:
    """How near a reconstruction is; an empty original is right if the reconstruction is empty too."""
    distance = Levenshtein.distance(original, reconstruction)
    words, others = original.split(), reconstruction.split()
    bag = sum((Counter(words) & Counter(others)).values())
    longest = max(len(original), len(reconstruction))
    return Closeness(
        char_accuracy_positional=_share(sum(map(str.__eq__, original, reconstruction)), original, reconstruction),
        char_accuracy_aligned=1 - distance / longest if longest else 1.0,
        character_error_rate=distance / max(1, len(original)),
        word_accuracy_positional=_share(sum(map(str.__eq__, words, others)), words, others),
        word_accuracy_bag=_share(bag, words, others),
        edit_distance=distance,
        exact=original == reconstruction,
    )


def _share(right: int, original: str | list[str], reconstruction: str | list[str]) -> float:
    return right / len(original) if original else float(not reconstruction)
