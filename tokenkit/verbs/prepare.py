"""What a run of `tokenkit distill` begins with: student and teacher in memory, everything changed that is to change."""

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenkit.config import UserError
from tokenkit.data.records import TOKENIZER, Record
from tokenkit.models.expand import attach_expansion, old_inputs
from tokenkit.models.generate import generate
from tokenkit.models.load import head_matrix, input_matrix, output_head
from tokenkit.models.lora import attach_lora
from tokenkit.models.view import ModelView
from tokenkit.tokenizers.base import Tokenizer, require_lossless
from tokenkit.tokenizers.bytelevel import ByteTokenizer
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.train.schema import TrainConfig
from tokenkit.transfer.apply import transfer_model
from tokenkit.verbs.device import pick_device
from tokenkit.verbs.distill_run import DistillRun
from tokenkit.verbs.model import load_pair
from tokenkit.verbs.sides import Sides


def prepare(run: DistillRun) -> Sides:
    """Both sides in memory: the tokenizer swapped, the adapters attached, what is not trained frozen."""
    device = pick_device(run.train.device)
    torch.manual_seed(run.train.seed)  # adapters begin at random
    target = load_tokenizer(run.target_tokenizer) if run.target_tokenizer else None
    model, source = load_pair(run.model, device)
    for tokenizer in (source, target or source):
        require_lossless(tokenizer, "a student's tokenizer")
    live = run.record is None
    other = load_pair(run.teacher, device) if run.teacher and live else None
    shared_body = live and other is None and run.train.mode != "full"
    tables = _tables(model) if shared_body else {}
    if live and other is None and not shared_body:
        other = copy.deepcopy(model), source
    samples = continuations(run, *(other or (model, source)), source) if live else []
    if run.expand_inputs and (not isinstance(target, ByteTokenizer) or shared_body):
        raise UserError("expand_inputs: only with target_tokenizer=byte, and train.mode=full or a teacher of its own")
    old = old_inputs(model, source.token_bytes) if run.expand_inputs else None
    report = transfer_model(model, source, target, **run.transfer.model_dump()) if target else None
    if old is not None:
        attach_expansion(model, *old)
    _choose_trained(model, run.train)
    if run.record is not None:
        teacher, teacher_tokenizer = Record(run.record), load_tokenizer(str(run.record / TOKENIZER))
    elif other is None:
        teacher, teacher_tokenizer = ModelView(model, tables=tables, adapters=False), source
    else:
        teacher, teacher_tokenizer = ModelView(other[0].requires_grad_(False)), other[1]
    if run.train.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return Sides(ModelView(model), target or source, teacher, teacher_tokenizer, report, samples)


def _tables(model: PreTrainedModel) -> dict[str, Tensor]:
    """Copies of the embedding, the head and its bias as they are now; one copy where they are one matrix."""
    table, head, bias = input_matrix(model), head_matrix(model), output_head(model).bias
    copied = table.detach().clone()
    tables = {"input": copied, "head": copied if head is table else head.detach().clone()}
    return tables if bias is None else {**tables, "bias": bias.detach().clone()}


def _choose_trained(model: PreTrainedModel, train_config: TrainConfig) -> None:
    """Embedding and head are always trained; of the body all, adapters, or nothing."""
    model.requires_grad_(train_config.mode == "full")
    if train_config.mode == "lora":
        attach_lora(model, **train_config.lora.model_dump())
    for table in (input_matrix(model), head_matrix(model), output_head(model).bias):
        if table is not None:
            table.requires_grad_(True)


def continuations(run: DistillRun, model: PreTrainedModel, tokenizer: Tokenizer, unit: Tokenizer) -> list[str]:
    """Greedy continuations of the prompts, as long as `max_new_tokens` tokens of the `unit` tokenizer."""
    prompts = run.report.prompts
    if not prompts:
        return []
    ratio = len(tokenizer.encode(" ".join(prompts))) / max(1, len(unit.encode(" ".join(prompts))))
    return generate(model, tokenizer, prompts, max_new_tokens=max(1, round(run.report.max_new_tokens * ratio)))
