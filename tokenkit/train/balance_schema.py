"""The `balance:` section of a run file: how several losses share a step."""

import math
import re
from typing import Any

from pydantic import Field, model_validator

from tokenkit.config import Config, UserError

BALANCES: dict[str, dict[str, Any]] = {  # methods that are a whole, with the options of each
    "none": {},
    "magnitude": {},
    "ema": {"alpha": 0.95},
    "uncertainty": {"s_init": 0.0, "learning_rate": 0.01},
    "approx_gradmag": {},
    "approx_gradmag_preserve_mag": {},
    "gradnorm": {"alpha": 0.12, "learning_rate": 0.025},
    "fixed_ratio": {"alpha": 0.95, "main": None, "every": 1},
    "project_aux": {"main": None, "every": 1},
    "drop_conflict": {"main": None, "every": 1},
    "mgda": {"every": 1},
    "cagrad": {"c": 0.4, "every": 1},
}
LINK = re.compile(r"(identity|pcgrad|gradmag)|(gradmag|gradclip):((?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)")
GRADMAG_EPS = 1e-8


class BalanceConfig(Config):
    """How several losses share a step: one word, or a method with its options."""

    method: str = "none"
    """none, magnitude, ema, uncertainty, approx_gradmag, approx_gradmag_preserve_mag, gradnorm, fixed_ratio,
    project_aux, drop_conflict, mgda, cagrad; or a chain over whole gradients, of identity, pcgrad, gradmag[:EPS] and
    gradclip:MAX_NORM, joined by `+`."""
    alpha: float | None = Field(None, ge=0, lt=1)
    """ema, fixed_ratio: share of the old statistics that stays; gradnorm: how strongly losses that lag are pushed."""
    main: str | None = None
    """fixed_ratio, project_aux, drop_conflict: the loss that the others are measured against; null: the first."""
    every: int | None = Field(None, ge=1)
    """fixed_ratio, project_aux, drop_conflict, mgda, cagrad: steps between looks at the gradients; in between the
    factors stay as they were."""
    c: float | None = Field(None, ge=0, lt=1)
    """cagrad: how far from the plain sum the update may go, as a share of its length."""
    s_init: float | None = None
    """uncertainty: where every s begins."""
    learning_rate: float | None = Field(None, gt=0)
    """uncertainty, gradnorm: Adam's, for s or for the weights."""

    @model_validator(mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        keys = {"method": value} if isinstance(value, str) else value
        if not isinstance(keys, dict):
            return keys
        options = BALANCES.get(str(keys.get("method")), {})
        return {**keys, **{key: default for key, default in options.items() if keys.get(key) is None}}

    @model_validator(mode="after")
    def _known(self) -> "BalanceConfig":
        options = {key for own in BALANCES.values() for key in own}
        given = {key for key in options if self.__dict__[key] is not None}
        foreign = sorted(given - set(BALANCES.get(self.method, {})))
        if self.method not in BALANCES:
            parse_chain(self.method)
        if foreign:
            own = ", ".join(BALANCES.get(self.method, {})) or "none"
            raise UserError(f"train.balance.{foreign[0]}: no option of {self.method!r}, which has {own}")
        return self


def parse_chain(method: str) -> list[tuple[str, float]]:
    """The links of a chain such as `pcgrad+gradclip:1`, with their values; UserError with the right form."""
    links = []
    for word in method.split("+"):
        match = LINK.fullmatch(word.strip())
        value = float(match[3] or GRADMAG_EPS) if match else 0.0
        if match is None or not 0 < value < math.inf:
            where = "" if word == method else f" in {method!r}"
            raise UserError(
                f"train.balance: {word!r}{where} is not known; write one of {', '.join(BALANCES)}, "
                "or a chain of identity, pcgrad, gradmag[:EPS], gradclip:MAX_NORM, such as pcgrad+gradclip:1.0"
            )
        links.append((match[1] or match[2], value))
    return links
