"""What of the student a run of `tokenkit distill` trains: the body, adapters, tables or rows of them, and when."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from tokenkit.config import UserError
from tokenkit.models.adapter import read_adapter
from tokenkit.models.expand import expansion_of
from tokenkit.models.load import input_matrix
from tokenkit.models.lora import attach_lora
from tokenkit.models.lora_files import load_lora
from tokenkit.models.lora_targets import whole_modules
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.train.schema import TrainConfig
from tokenkit.train.trained import Trained, check_prefix, tables_of
from tokenkit.transfer.apply import TransferReport
from tokenkit.transfer.new_rows import new_rows
from tokenkit.verbs.distill_run import DistillRun


def choose_trained(model: PreTrainedModel, config: TrainConfig, *, shared_body: bool) -> None:
    """Of the body all, adapters, or nothing; the tables as `train.embeddings` says. Attaches the adapters.

    With a `shared_body` modules that are trained whole remember what the teacher sees.
    """
    model.requires_grad_(config.mode == "full")
    if config.mode == "lora":
        _check_saved(model, config)
        if config.lora.begin is not None:
            _go_on_from(model, config.lora.begin, shared_body)
        else:
            attach_lora(model, **config.lora.model_dump(exclude={"begin"}), originals=shared_body)
    named = _saved_tables(model, config.lora.modules_to_save) if config.mode == "lora" else []
    for table in tables_of(model):
        table.requires_grad_(config.embeddings != "none" or any(table is one for one in named))


def _go_on_from(model: PreTrainedModel, folder: Path, shared_body: bool) -> None:
    """Attaches adapters that were trained before, to be trained on."""
    whole = sorted(read_adapter(folder).whole)
    if whole and shared_body:
        raise UserError(
            f"train.lora.begin: {folder} has {whole[0]} whole, which a student that is its own teacher would change in "
            "both; write a `teacher:` of its own"
        )
    load_lora(model, folder)


def freeze(model: PreTrainedModel, names: Sequence[str]) -> None:
    """Takes these tensors, under whichever name they have, out of what is trained."""
    frozen = set(names)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in frozen:
            parameter.requires_grad_(False)


def trained_of(
    run: DistillRun, model: PreTrainedModel, source: Tokenizer, target: Tokenizer | None, report: TransferReport | None
) -> Trained | None:
    """Which gradients count at which step; None where all do. UserError where nothing would be trained."""
    config = run.train
    if run.hypernet is None and not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            f"train.embeddings: {config.embeddings} beside train.mode={config.mode}, which leaves nothing to train; "
            "write train.embeddings=all, or train.mode=lora or full"
        )
    check_prefix(config)
    if config.embeddings != "new_rows" and config.prefix is None:
        return None
    if run.hypernet is not None:
        key = "train.prefix" if config.embeddings != "new_rows" else "train.embeddings: new_rows"
        raise UserError(f"{key}: beside hypernet, which makes every row anew; leave one of them out")
    rows = None
    if target is not None and report is not None:
        size, override = len(input_matrix(model)), run.transfer.override
        rows = new_rows(source, target, source_rows=report.source_rows, rows=size, override=override)
    return Trained(model, embeddings=config.embeddings, prefix=config.prefix, new_rows=rows)


def has_base(run: DistillRun, model: PreTrainedModel) -> bool:
    """Whether what was trained is adapters, and the model that they belong to is `model.source` as it lies there."""
    made_here = run.student is not None or run.model.adapter is not None or expansion_of(model) is not None
    return run.train.mode == "lora" and not made_here


def _saved_tables(model: PreTrainedModel, names: Sequence[str]) -> list[Tensor]:
    """The tables that are named among the modules that are trained whole."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    modules = [model.get_submodule(name) for name in whole_modules(model, names)]
    return [table for module in modules if module in ends for table in module.parameters()]


def _check_saved(model: PreTrainedModel, config: TrainConfig) -> None:
    names = config.lora.modules_to_save
    if config.embeddings == "new_rows" and _saved_tables(model, names):
        raise UserError(
            f"train.lora.modules_to_save: {', '.join(names)} has a table as a whole, where train.embeddings=new_rows "
            "trains some of its rows; leave one of them out"
        )
