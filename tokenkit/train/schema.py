"""The sections of a run file that say how to train."""

import math
import re
from typing import Any, Literal

from pydantic import Field, model_validator

from tokenkit.config import Config, UserError


class ParameterGroup(Config):
    """Parameters whose dotted name a regular expression finds, with a learning rate of their own."""

    pattern: str
    lr_scale: float = Field(1.0, ge=0)


class OptimizerConfig(Config):
    """AdamW and its schedule."""

    learning_rate: float = Field(1e-3, gt=0)
    """The peak."""
    weight_decay: float = Field(0.0, ge=0)
    """On matrices; vectors (norms, biases) are never decayed."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    schedule: Literal["linear", "cosine", "constant", "polynomial", "wsd", "one_cycle", "inverse_sqrt"] = "cosine"
    """Course of the learning rate after the warm-up, down to `lr_min_ratio` of its peak."""
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
    """Learning-rate scales by name; the first pattern that matches counts."""
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


class LoraConfig(Config):
    """Low-rank adapters on linear layers. Hu+ 2021, 2106.09685."""

    rank: int = Field(64, ge=1)
    alpha: float = 64.0
    """The update is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: list[str] | Literal["all-linear"] = "all-linear"
    """Last parts of the names of linear layers (`q_proj`), or globs over dotted names."""


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


class NoiseConfig(Config):
    """Noise while training, none of it while measuring; 0 leaves every bit as it is."""

    teacher_logits: float = Field(0.0, ge=0)
    """Normal noise on the teacher's logits: its deviation as a share of theirs over the vocabulary, at each position.
    Sau and Balasubramanian 2016, 1610.09650."""
    features: float = Field(0.0, ge=0)
    """The same on the teacher's states that losses read: a share of their deviation over the channels."""
    neftune: float = Field(0.0, ge=0)
    """Uniform noise within alpha / sqrt(length x channels) on the student's input embeddings, by each row's own length.
    Jain+ 2023, 2310.05914."""
    gradient: float = Field(0.0, ge=0)
    """Normal noise of variance eta / (1 + t)^0.55 on the gradients, after clipping. Neelakantan+ 2015, 1511.06807."""
    weights: float = Field(0.0, ge=0)
    """Normal noise on what is trained while a step's gradients are taken: a share of each tensor's root mean square."""


class CompileConfig(Config):
    """torch.compile, applied in place, so that checkpoints are the same with and without."""

    backend: str = "inductor"
    """A backend that torch knows; inductor needs a C++ compiler, and Triton on a GPU."""
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None = None
    """inductor: what it optimises for."""
    dynamic: bool | None = None
    """Sizes as variables, so that a new length is not compiled anew; null: after the first change of size."""
    regional: bool = True
    """Compile one layer and use it for all, instead of the whole body: shorter to start."""
    teacher: bool = False
    """Compile the teacher too."""


class ProfileConfig(Config):
    """Steps that torch's profiler looks at; a trace and a table go into the run folder, under `profile`."""

    wait: int = Field(1, ge=0)
    """Steps before it starts."""
    warmup: int = Field(1, ge=0)
    """Steps that it runs through without keeping them."""
    active: int = Field(3, ge=1)
    """Steps that are kept."""
    top: int = Field(20, ge=1)
    """Operations in the table, those with most time of their own first."""

    @property
    def last(self) -> int:
        """The step after which it is done."""
        return self.wait + self.warmup + self.active


class BestConfig(Config):
    """Which measured value tells the best checkpoint."""

    metric: str
    """A name among what is measured."""
    direction: Literal["max", "min"] = "max"

    def better(self, value: float, than: float | None) -> bool:
        """Whether a value goes before the best so far; NaN never does."""
        if than is None:
            return not math.isnan(value)
        return value > than if self.direction == "max" else value < than


class EarlyStoppingConfig(Config):
    """When a run ends before its last step."""

    patience: int | None = Field(None, ge=1)
    """After this many measurements in a row without a new best."""
    target: float | None = None
    """As soon as the best value reaches this."""


class LoopConfig(Config):
    """How long, on how much, and what is kept."""

    steps: int = Field(ge=1)
    """Optimizer steps."""
    schedule_steps: int | None = Field(None, ge=1)
    """Steps that every schedule is laid out over; null: `steps`. Where it is set, a run may be made longer later."""
    batch_size: int = Field(16, ge=1)
    """Rows of text per optimizer step."""
    accumulation: int = Field(1, ge=1)
    """Microbatches a step is cut into; the step stays the same."""
    seed: int = 0
    """Decides the order of rows, dropout, and where adapters begin."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of the forward pass; weights, sums and the optimizer are float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where torch sees one."""
    optimizer: OptimizerConfig = OptimizerConfig()
    balance: BalanceConfig = BalanceConfig()
    """How the gradients of several losses are added up; none: by their weights alone."""
    noise: NoiseConfig = NoiseConfig()
    compile: CompileConfig | None = None
    """Compile the student; null: do not."""
    liger: bool = False
    """Liger kernels in the student's layers (needs CUDA and the extra `gpu`)."""
    log_every: int = Field(10, ge=1)
    """Steps between lines of metrics.jsonl."""
    diagnose_every: int | None = Field(None, ge=1)
    """Steps between looks at each loss's gradient by itself: norms, cosines, and how often two oppose each other."""
    noise_scale: bool = False
    """With them, estimate the gradient noise scale tr(S) / |g|^2 in rows from the microbatches. McCandlish+ 2018,
    1812.06162."""
    profile: ProfileConfig | None = None
    """Profile some steps; null: none."""
    collect_garbage_every: int | None = Field(1, ge=1)
    """Measurements between those around which garbage is collected and a GPU's cache emptied; null: never."""
    save_every: int = Field(100, ge=1)
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = Field(2, ge=1)
    """The newest so many stay on disk."""
    eval_at: list[int] = []
    """Steps after which the run is measured; 0 is before the first."""
    eval_every: int | None = Field(None, ge=1)
    """Steps between measurements; the last step is measured too."""
    best: BestConfig | None = None
    """Keep the checkpoint that measures best, beside the newest ones."""
    early_stopping: EarlyStoppingConfig | None = None
    """End the run when it no longer gets better, or is good enough."""
    stop_after: int | None = Field(None, ge=1)
    """Leave, as if interrupted, after this step; the schedule still runs to `steps`."""

    @property
    def horizon(self) -> int:
        """Steps that schedules are laid out over."""
        return self.schedule_steps or self.steps

    @model_validator(mode="after")
    def _splits(self) -> "LoopConfig":
        if self.accumulation > self.batch_size:
            raise UserError(
                f"train.accumulation: {self.accumulation} microbatches cannot be cut from a batch of {self.batch_size}"
            )
        if self.steps > self.horizon:
            raise UserError(
                f"train.steps: {self.steps:,} are more than train.schedule_steps ({self.horizon:,}); raise the latter "
                "before the run begins"
            )
        if self.noise_scale and (self.diagnose_every is None or self.accumulation < 2):
            raise UserError(
                "train.noise_scale: is estimated from the microbatches of the steps that train.diagnose_every names; "
                "set that, and train.accumulation to 2 or more"
            )
        if self.profile is not None and self.profile.last > self.steps:
            raise UserError(
                f"train.profile: wait, warmup and active are {self.profile.last} steps, train.steps is {self.steps}; "
                "make the profile shorter or the run longer"
            )
        if self.compile is not None and not self.compile.regional and self.noise.neftune:
            raise UserError("train.noise.neftune: needs train.compile.regional=true, which leaves the embedding alone")
        if self.early_stopping is not None and self.best is None:
            raise UserError("train.early_stopping: needs train.best.metric, the value that should get better")
        return self


class TrainConfig(LoopConfig):
    """How long, on how much, what of a language model is trained, and what is kept."""

    mode: Literal["full", "lora", "embeddings"] = "full"
    """What is trained beside the embeddings: everything, adapters, or nothing."""
    lora: LoraConfig = LoraConfig()
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
