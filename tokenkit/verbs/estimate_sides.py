"""Student and teacher of a run as models without memory, and how many tokens of each a microbatch has."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from tokenkit.config import UserError
from tokenkit.data.corpus import DataConfig
from tokenkit.data.example import iterate_windows
from tokenkit.data.source import is_dataset, iterate_documents
from tokenkit.models.attention import set_attention
from tokenkit.models.load import BASE, quiet
from tokenkit.models.memory import parameter_bytes
from tokenkit.models.quantize import GROUP, quantised_names
from tokenkit.models.sharing import share_blocks
from tokenkit.models.student import build_student
from tokenkit.models.ternary_saved import QUANTIZATION
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.tokenizers.spec import TokenizerSpec
from tokenkit.train.schema import TrainConfig
from tokenkit.verbs.distill_run import DistillRun
from tokenkit.verbs.model import ModelChoice
from tokenkit.verbs.trained_part import choose_trained

SAMPLE_BYTES, SAMPLE_WINDOWS = 400_000, 512
BYTES_PER_TOKEN = 4.0  # where the text is not on this machine; a guess that is said to be one
SHARE = {"int8": 0.25, "int4": (0.5 + 4 / GROUP) / 4}  # of what a matrix takes in float32


@dataclass(frozen=True)
class Lengths:
    """Tokens of the rows of a microbatch, padded to the longest."""

    usual: float
    longest: int
    guessed: str = ""
    """What is not known, where the length is a guess."""


def config_of(choice: ModelChoice) -> PreTrainedConfig:
    """The configuration of a model on this machine; UserError where it is not here. No weight is read."""
    folder = Path(choice.source)
    source = folder / BASE if (folder / BASE).is_dir() else choice.source
    options = {"revision": choice.revision, "trust_remote_code": choice.trust_remote_code}
    try:
        with quiet():
            config = AutoConfig.from_pretrained(source, local_files_only=True, **options)
    except (OSError, ValueError):
        raise UserError(f"the configuration of {choice.source} is not on this machine yet") from None
    vars(config).pop(QUANTIZATION, None)
    return config


def tokenizer_of(choice: ModelChoice) -> Tokenizer:
    """The tokenizer that a model comes with."""
    folder = Path(choice.source)
    beside = str(folder / BASE) if (folder / BASE).is_dir() else choice.source
    return load_tokenizer(choice.tokenizer or TokenizerSpec(name=beside))


def empty_model(config: PreTrainedConfig, train: TrainConfig) -> PreTrainedModel:
    """The float32 model of a configuration; called where tensors have no memory."""
    with quiet():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    set_attention(model, train.attention)
    return model


def empty_student(
    run: DistillRun, config: PreTrainedConfig, target: Tokenizer | None, *, checkpointing: bool
) -> PreTrainedModel:
    """The student of a run, of a configuration, in the mode that it trains in; called where tensors have no memory.

    Pruned widths and matrices on their way to ternary count as what they are before.
    """
    model = empty_model(_with_rows(config, run, target), run.train)
    if run.student is not None and run.student.share_layers is not None:
        share_blocks(model, run.student.share_layers)
    return trained_as(model, run.train, checkpointing=checkpointing, shared_body=has_shared_body(run))


def student_config(run: DistillRun) -> PreTrainedConfig:
    """The configuration of the student's shape, before its vocabulary changes."""
    config = config_of(run.model)
    if run.student is None or run.student.prune is not None:
        return config
    with torch.device("meta"), quiet():
        teacher = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        return build_student(teacher, run.student, seed=run.train.seed).model.config


def trained_as(
    model: PreTrainedModel, train: TrainConfig, *, checkpointing: bool, shared_body: bool = False
) -> PreTrainedModel:
    """The model with what is not trained frozen, adapters attached, and its activations kept or not."""
    choose_trained(model, train, shared_body=shared_body)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


def has_shared_body(run: DistillRun) -> bool:
    """Whether the teacher is the student's own body with its adapters off and its old tables."""
    taught = run.record is not None or run.teacher is not None or run.teachers
    return not taught and run.train.mode != "full" and run.student is None and run.ternary is None


def _with_rows(config: PreTrainedConfig, run: DistillRun, target: Tokenizer | None) -> PreTrainedConfig:
    """The configuration with a row for each id of the target, and tables of their own where they are untied."""
    if target is not None:
        text = config.get_text_config()
        text.vocab_size = config.vocab_size = target.vocab_size
        text.pad_token_id = config.pad_token_id = None  # an id of the old tokenizer
        if run.transfer.untie:
            text.tie_word_embeddings = config.tie_word_embeddings = False
    return config


def held_bytes(model: PreTrainedModel, choice: ModelChoice) -> int:
    """What a teacher's weights take as it is loaded."""
    whole = parameter_bytes(model)
    if choice.quantize is None:
        return whole
    linear = sum(_weight_bytes(model.get_submodule(name)) for name in quantised_names(model))
    return round(whole - linear * (1 - SHARE[choice.quantize]))


def _weight_bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters(recurse=False) if p.ndim > 1)


def sample_windows(data: DataConfig) -> list[str]:
    """Windows of the beginning of the text; none of conversations, or where the text may not be on this machine."""
    source = data.sources[0]
    if data.format != "text" or is_dataset(source):
        return []
    small = source.model_copy(update={"max_bytes": min(source.max_bytes or SAMPLE_BYTES, SAMPLE_BYTES)})
    windows = iterate_windows(iterate_documents(small), data.window_bytes, data.learn_after)
    texts = [window.text for window in islice(windows, SAMPLE_WINDOWS)]
    random.Random(0).shuffle(texts)
    return texts


def lengths_of(data: DataConfig, tokenizer: Tokenizer, texts: Sequence[str], rows: int) -> Lengths:
    """How long the rows of microbatches of so many rows are in a tokenizer's ids."""
    if data.format == "chat":
        return Lengths(float(data.window_bytes), data.window_bytes)
    if not texts:
        guess = data.window_bytes / (1 if all(map(_is_byte, tokenizer.token_bytes[:256])) else BYTES_PER_TOKEN)
        return Lengths(guess, round(guess), guessed="the text is not on this machine")
    counts = [len(encoding.ids) for encoding in tokenizer.encode_batch([*texts])]
    if data.packing:
        filled = data.window_bytes * sum(counts) / sum(len(text.encode()) for text in texts)
        return Lengths(filled, round(filled))
    longest = [max(counts[start : start + rows]) for start in range(0, len(counts), rows)]
    return Lengths(sum(longest) / len(longest), max(longest))


def _is_byte(token: bytes) -> bool:
    return len(token) <= 1


def teachers_of(run: DistillRun) -> list[ModelChoice]:
    """The models that a run loads as teachers beside its student."""
    if run.record is not None:
        return []
    return [run.teacher] if run.teacher is not None else [*run.teachers] or [run.model]
