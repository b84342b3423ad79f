"""The sections of a run file that say how to train."""

import math
from typing import Literal

from pydantic import Field, model_validator

from tokenkit.config import Config, UserError
from tokenkit.models.lora_config import LoraConfig
from tokenkit.train.balance_schema import BalanceConfig
from tokenkit.train.optimizer_schema import OptimizerConfig

LOOKING_BACK = {"gradnorm", "fixed_ratio", "project_aux", "drop_conflict", "mgda", "cagrad"}  # at gradients
BY_LENGTH = ("approx_gradmag", "gradmag", "gradclip")  # whose results go by how long a gradient is in itself


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


class ParallelConfig(Config):
    """How the processes of `torchrun` share a run: data x model of them; one process is 1 x 1."""

    data: int | None = Field(None, ge=1)
    """Processes, or groups of them, that read different rows and share the parameters among them (FSDP2); null: what
    the others leave."""
    model: int = Field(1, ge=1)
    """Processes that share each matrix of a layer (tensor parallelism)."""


class PrefixConfig(Config):
    """Optimizer steps before all others in which only a part is trained, at a learning rate of its own."""

    steps: int = Field(ge=1)
    """They come out of `train.steps`; the warm-up and the schedule of the others begin after them."""
    learning_rate: float = Field(gt=0)
    """Reached on a line over these steps."""
    trainable: Literal["non_overlapping_embeddings", "embeddings", "none"] = "non_overlapping_embeddings"
    """Of the tables: rows of tokens that the old tokenizer does not have; all rows; none."""
    layers: int = Field(0, ge=0)
    """So many of the student's first layers are trained in these steps too."""


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
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the forward pass; weights, sums and the optimizer are float32. float16 scales the loss as it goes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where torch sees one."""
    parallel: ParallelConfig = ParallelConfig()
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
    sinks: list[Literal["tensorboard", "trackio", "wandb"]] = []
    """Where the lines of metrics.jsonl go as well; each is a package of its own."""
    project: str = "tokenkit"
    """trackio, wandb: the project that runs are filed under."""
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
                f"train.accumulation: {self.accumulation} microbatches cannot be cut from a batch of "
                f"{self.batch_size}; write {self.batch_size} or less, or a larger train.batch_size"
            )
        if self.precision == "float16" and self.balance.method in LOOKING_BACK:
            raise UserError(
                f"train.precision: float16 finds its scale by steps that overflow, and train.balance.method="
                f"{self.balance.method} would remember their gradients; write bfloat16, or a balance of losses or steps"
            )
        if self.precision == "float16" and any(
            word.strip().partition(":")[0] in BY_LENGTH for word in self.balance.method.split("+")
        ):
            raise UserError(
                f"train.precision: float16 multiplies gradients until they are added up, and train.balance.method="
                f"{self.balance.method} goes by their lengths; write bfloat16, or a balance of losses or steps"
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
    embeddings: Literal["all", "new_rows", "none"] = "all"
    """Rows of embedding and head that are trained: all, those of tokens that the old tokenizer does not have, none."""
    lora: LoraConfig = LoraConfig()
    prefix: PrefixConfig | None = None
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"] = "auto"
    """How the student's attention is computed; auto: what transformers takes, which is sdpa where it can."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
