"""The `optimizer:` section of a run file."""

from typing import Literal

from pydantic import Field, model_validator

from tokenkit.config import Config, UserError

OptimizerName = Literal[
    "adamw", "lion", "muon", "soap", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lion_8bit", "paged_lion_8bit"
]


class ParameterGroup(Config):
    """Parameters whose dotted name a regular expression finds, with a learning rate of their own."""

    pattern: str
    """Searched for anywhere in the name; the first group that matches counts."""
    lr_scale: float = Field(1.0, ge=0)
    """Of the learning rate, at every step."""
    weight_decay_scale: float = Field(1.0, ge=0)
    """Of the weight decay; what is never decayed stays so."""


class OptimizerConfig(Config):
    """The optimizer and its schedule."""

    name: OptimizerName = "adamw"
    """What moves the weights. muon moves the matrices inside a model and leaves the rest to adamw. lion and soap are of
    pytorch_optimizer, those of 8 bits and in pages of bitsandbytes: both are in the extra `optim`."""
    fused: bool = True
    """adamw, also beside muon: one kernel for all parameters of a group."""
    learning_rate: float = Field(1e-3, gt=0)
    """The peak."""
    weight_decay: float = Field(0.0, ge=0)
    """On matrices and embeddings; norms, biases and other vectors are never decayed."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Shares of the running means of gradients that a step leaves as they were; muon's own momentum is 0.95."""
    eps: float = Field(1e-8, gt=0)
    schedule: Literal[
        "linear",
        "cosine",
        "linear_warmup_cosine_decay",
        "constant",
        "polynomial",
        "wsd",
        "one_cycle",
        "inverse_sqrt",
    ] = "cosine"
    """Course of the learning rate after the warm-up, down to `lr_min_ratio` of its peak. linear_warmup_cosine_decay is
    another name of cosine."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises linearly to its peak (one_cycle: on a cosine; 0 is 30 % of the run)."""
    warmup_ratio: float = Field(0.0, ge=0, lt=1)
    """The same as a share of the run's steps; give one of the two."""
    lr_min_ratio: float = Field(0.0, ge=0, le=1)
    """Where the learning rate ends, as a share of its peak."""
    power: float = Field(1.0, gt=0)
    """polynomial: the exponent of the share of steps that is left; 1 is a line."""
    decay_share: float = Field(0.2, gt=0, le=1)
    """wsd (warm-up, stable, decay): share of the run's steps, the last ones, in which the rate falls on a line."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Gradients are scaled down to this norm, over all parameters together; null: never."""
    param_groups: list[ParameterGroup] = []
    """Scales of learning rate and weight decay by name; the first pattern that matches counts."""
    projector_lr_scale: float = Field(2.0, gt=0)
    """Learning-rate scale of maps that losses have learnt along, unless a pattern matches them."""

    @model_validator(mode="after")
    def _one_warmup(self) -> "OptimizerConfig":
        if self.warmup_ratio and self.warmup_steps:
            raise UserError(
                f"train.optimizer.warmup_ratio: {self.warmup_ratio} beside warmup_steps {self.warmup_steps}; give one, "
                "and warmup_steps=0 with a ratio"
            )
        return self

    def warmup(self, steps: int) -> int:
        """Steps of warm-up in a run of `steps`."""
        return self.warmup_steps or round(self.warmup_ratio * steps)
