"""The run file of `tokenkit distill`."""

from pathlib import Path
from typing import Any, ClassVar

from pydantic import create_model

from tokenkit.config import Config
from tokenkit.data.batch import DataConfig
from tokenkit.eval.bits_per_byte import EvalConfig
from tokenkit.objective import LossesConfig, losses_config
from tokenkit.plugins.load import Plugin
from tokenkit.tokenizers.spec import TokenizerSpec
from tokenkit.train.schema import TrainConfig
from tokenkit.verbs.model import ExportType, ModelChoice
from tokenkit.verbs.own_losses import named_plugins
from tokenkit.verbs.transfer import TransferOptions


class ReportConfig(Config):
    """What the page shows beside the numbers."""

    prompts: list[str] = []
    """Texts that teacher, zero-shot and trained model continue."""
    max_new_tokens: int = 48
    """Length of a continuation in the teacher's tokens; other tokenizers get as many bytes."""
    text_bytes: int = 600
    """Bytes of held-out text that are shown in both tokenisations."""


class DistillRun(Config):
    """A run file of `tokenkit distill`."""

    own_losses: ClassVar[tuple[Plugin, ...]] = ()
    output: Path
    model: ModelChoice
    """The student before any change."""
    teacher: ModelChoice | None = None
    """Without one the student is taught by what it was before it changed its tokenizer."""
    record: Path | None = None
    """A folder of `tokenkit record`: taught from it, no teacher is loaded. One that is named beside it is compared with
    what was recorded."""
    target_tokenizer: TokenizerSpec | None = None
    """The student's new tokenizer: `NAME` or `NAME:target=KIND:conversion=...`, or these keys. None keeps its own."""
    transfer: TransferOptions = TransferOptions()
    expand_inputs: bool = False
    """Of a byte-level student: add to each byte's embedding the old one of the longest old token that ends there."""
    plugins: list[Path] = []
    """Python files with losses of your own, which this runs; their names become keys of `losses`."""
    losses: LossesConfig
    data: DataConfig
    train: TrainConfig
    eval: EvalConfig
    report: ReportConfig = ReportConfig()
    export_dtype: ExportType = "float32"

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
