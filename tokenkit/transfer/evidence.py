"""What initialisers may ask for besides source rows and plan: a donor, texts, the live model, a hypernetwork."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel

from tokenkit.config import UserError
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.transfer.plan import Side
from tokenkit.transfer.rows import Rows

Made = TypeVar("Made")


@dataclass(frozen=True, eq=False)
class Texts:
    """Documents that a transfer may learn from, and what was learnt of them already: both sides ask for the same."""

    documents: list[str]
    _made: dict[Any, Any] = field(default_factory=dict)

    def once(self, key: Any, make: Callable[[], Made]) -> Made:
        """What `make` gives, made once per key."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


@dataclass(frozen=True, eq=False)
class Evidence:
    """What there is. Initialisers name the fields by their parameters; `donor` is the side's own matrix."""

    source_tokenizer: Tokenizer
    target_tokenizer: Tokenizer
    donor: Mapping[Side, Rows] = field(default_factory=dict)
    """Rows of a model whose ids are those of the target tokenizer; ids beyond its rows have none."""
    texts: Texts | None = None
    model: PreTrainedModel | None = None
    """The source model, as it is before the transfer."""
    hypernet: Path | None = None
    matrices: Mapping[Side, Rows] = field(default_factory=dict)
    """Both matrices of the source model, whichever side is made; of a tied one the input's alone."""

    def named(self, name: str, side: Side, initializer: str) -> Any:
        """The evidence of this name; UserError that says which key gives it."""
        found = self.donor.get(side) if name == "donor" else self.__dict__[name]
        if found is None:
            raise UserError(f"transfer.initializer: {initializer!r} needs {LACKING[name]}")
        return found


LACKING = {
    "donor": "rows of a model that has the target tokenizer; write transfer.donor=FOLDER",
    "texts": "text; write transfer.texts.path=FILE, or leave the text of the run to it",
    "model": "the model in memory, and this transfer streams its weights; leave in_memory out",
    "matrices": "both matrices of the model; pass Evidence(matrices=...)",
    "hypernet": "a trained hypernetwork; write transfer.hypernet=FOLDER, of `tokenkit train-hypernet`",
}
