"""The `lora:` section of a run file."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from tokenkit.config import Config, UserError


class LoraConfig(Config):
    """Low-rank adapters on linear layers. Hu+ 2021, 2106.09685."""

    begin: Path | None = None
    """A folder of PEFT's adapters that training goes on from: their layers, ranks and settings count, and not the keys
    below."""
    rank: int = Field(64, ge=1)
    alpha: float = 64.0
    """The update is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: list[str] | Literal["all-linear"] = "all-linear"
    """Last parts of the names of linear layers (`q_proj`), or globs over dotted names."""
    target_regex: list[str] = []
    """Instead of `targets`: regular expressions that match whole dotted names (`.*self_attn.*_proj`)."""
    layers: list[str] = []
    """Layers that are adapted, counted from 0: ranges with both ends (`0-8`) and single numbers (`12`); empty: all."""
    rslora: bool = False
    """Scale by alpha over the root of the rank. Kalajdzievski 2023, 2312.03732."""
    dora: bool = False
    """Learn the length of each row of the adapted matrix apart from its direction. Liu+ 2024, 2402.09353."""
    modules_to_save: list[str] = []
    """Last parts of the names of modules, or dotted names, that are trained whole beside the adapters, and saved with
    them."""

    @model_validator(mode="after")
    def _one_choice(self) -> "LoraConfig":
        if self.target_regex and self.targets != "all-linear":
            raise UserError(
                f"train.lora.target_regex: {', '.join(self.target_regex)} beside targets; give one of the two"
            )
        return self
