"""The run file of `tokenkit distill`."""

from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, create_model, model_validator

from tokenkit.config import Config, UserError, build
from tokenkit.data.batch import DataConfig
from tokenkit.eval.harness import Evaluation
from tokenkit.export.hub import HubConfig, check_push
from tokenkit.models.hypernet_layers import HypernetConfig
from tokenkit.models.student import StudentConfig
from tokenkit.models.ternary import TernaryConfig
from tokenkit.objective import LossesConfig, losses_config
from tokenkit.plugins.load import Plugin
from tokenkit.report.card_facts import CardConfig
from tokenkit.tokenizers.spec import TokenizerSpec
from tokenkit.train.on_policy import OnPolicyConfig
from tokenkit.train.schema import TrainConfig
from tokenkit.verbs.model import ExportType, ModelChoice, refuse_quantized
from tokenkit.verbs.own_losses import named_plugins
from tokenkit.verbs.stage_values import stage_values
from tokenkit.verbs.transfer import TransferOptions


class ReportConfig(Config):
    """What the page shows beside the numbers."""

    prompts: list[str] = []
    """Texts that teacher, zero-shot and trained model continue."""
    max_new_tokens: int = 48
    """Length of a continuation in the teacher's tokens; other tokenizers get as many bytes."""
    text_bytes: int = 600
    """Bytes of held-out text that are shown in both tokenisations."""


class WeightedTeacher(ModelChoice):
    """One of several teachers."""

    weight: float = Field(1.0, ge=0)
    """Its share among them."""


class StatisticsConfig(Config):
    """What whitening norms of a loss have to know of the teacher."""

    folder: Path | None = None
    """Where it is kept, for later runs too; null: in the run folder."""
    rows: int = Field(256, ge=1)
    """Rows of the training text that it is measured on."""


class DistillRun(Config):
    """A run file of `tokenkit distill`."""

    own_losses: ClassVar[tuple[Plugin, ...]] = ()
    output: Path
    model: ModelChoice
    """The student before any change."""
    teacher: ModelChoice | None = None
    """Without one the student is taught by what `model` was before every change."""
    teachers: list[WeightedTeacher] = []
    """Instead of one: the weighted mean of the probabilities of several, all with the student's tokenizer."""
    student: StudentConfig | None = None
    """How the student's shape differs from `model`, and where its weights come from."""
    ternary: TernaryConfig | None = None
    """Makes the matrices of the student's layers -1, 0 or 1 while it is trained: BitNet b1.58."""
    record: Path | None = None
    """A folder of `tokenkit record`: taught from it, no teacher is loaded. One that is named beside it is compared with
    what was recorded."""
    target_tokenizer: TokenizerSpec | None = None
    """The student's new tokenizer: `NAME` or `NAME:target=KIND:conversion=...`, or these keys. None keeps its own."""
    transfer: TransferOptions = TransferOptions()
    hypernet: HypernetConfig | None = None
    """The student's rows are what a network makes of trained ones, learnt along with them; in the end they are rows
    again. null: none."""
    expand_inputs: bool = False
    """Of a byte-level student: add to each byte's embedding the old one of the longest old token that ends there."""
    plugins: list[Path] = []
    """Python files with losses of your own, which this runs; their names become keys of `losses`."""
    losses: LossesConfig
    teacher_statistics: StatisticsConfig = StatisticsConfig()
    on_policy: OnPolicyConfig | None = None
    """A share of the rows goes on as the student, or the teacher, writes it. One tokenizer on both sides."""
    data: DataConfig
    train: TrainConfig
    eval: Evaluation
    report: ReportConfig = ReportConfig()
    export_dtype: ExportType = "float32"
    card: CardConfig = CardConfig()
    push_to_hub: bool = False
    """Upload the finished `model/` with its card. Nothing is sent anywhere otherwise."""
    hub: HubConfig | None = None
    stages: list[dict[str, Any]] = []
    """Instead of one training several, each on the model that the last one left: `name`, and keys of this file that are
    others there. They go to `output/NAME`."""

    @model_validator(mode="after")
    def _stages_fit(self) -> "DistillRun":
        if self.stages:
            self.by_stage()
        return self

    def by_stage(self) -> dict[str, "DistillRun"]:
        """The stages by name, each a whole run; the run itself, by no name, where it has none."""
        if not self.stages:
            return {"": self}
        given = self.model_dump(mode="json", exclude_unset=True)
        return {name: _built(name, values) for name, values in stage_values(given).items()}

    @model_validator(mode="after")
    def _fits(self) -> "DistillRun":
        check_push(self.push_to_hub, self.hub)
        refuse_quantized(self.model)
        if self.teachers and (self.teacher is not None or self.record is not None):
            raise UserError("teachers: beside teacher or record; keep one of them")
        if self.hypernet is not None and not self.hypernet.residual:
            raise UserError("hypernet.residual: false would forget the rows that the student begins with; leave it out")
        for key in ("on_policy", "expand_inputs"):
            if self.hypernet is not None and self.__dict__[key]:
                raise UserError(f"hypernet: beside {key}, which reads the student's own rows; leave one of them out")
        if self.ternary is not None and self.train.mode != "full":
            raise UserError(
                f"train.mode: {self.train.mode!r} beside ternary, which trains matrices; write train.mode=full"
            )
        if self.ternary is not None and self.ternary.warmup_steps > self.train.steps:
            raise UserError(
                f"ternary.warmup_steps: {self.ternary.warmup_steps:,}, but the run ends after {self.train.steps:,}, "
                "before its matrices are ternary; write that many or less"
            )
        return self

    @classmethod
    def grown(cls, values: dict[str, Any]) -> type[Any]:
        """With the losses of `plugins` among the keys of `losses`."""
        plugins = named_plugins(values)
        if not plugins:
            return cls
        own = {name: entry for plugin in plugins for name, entry in plugin.losses.items()}
        schema = create_model(cls.__name__, __base__=cls, __doc__=cls.__doc__, losses=(losses_config(own), ...))
        schema.own_losses = plugins
        return schema


def _built(name: str, values: dict[str, Any]) -> DistillRun:
    """The run of a stage; what is wrong with it, with the stage's name."""
    try:
        return build(DistillRun, values)
    except UserError as error:
        raise UserError(f"stages.{name}.{error}") from None
