"""`tokenkit pretrain`: a small language model and its tokenizer from nothing, for demonstrations and tests."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tokenkit.config import Config, UserError, resolved
from tokenkit.data.ahead import made_ahead
from tokenkit.data.batch import Batches
from tokenkit.data.corpus import DataConfig, read_texts, read_training_rows
from tokenkit.data.source import read_documents
from tokenkit.data.stream import Rows
from tokenkit.eval.bits_per_byte import EvalConfig, bits_per_byte
from tokenkit.export.expanded import export_model
from tokenkit.export.huggingface import drafted
from tokenkit.models.attention import attention_of, check_attention, set_attention, whole_precision
from tokenkit.models.factorised_view import FactorisedView, attach_factorised
from tokenkit.models.latents import resize_and_init
from tokenkit.models.load import input_matrix
from tokenkit.models.packed import check_packing
from tokenkit.models.speller import Speller
from tokenkit.models.view import ModelView
from tokenkit.objective import LossesConfig, Objective
from tokenkit.report.card_facts import CardConfig
from tokenkit.tokenizers.autoencoder.learned import LearnedTokenizer
from tokenkit.tokenizers.base import Tokenizer, require_lossless
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.tokenizers.own import require_kept
from tokenkit.tokenizers.spec import TokenizerSpec
from tokenkit.tokenizers.train import train_tokenizer
from tokenkit.train.counted import Counted
from tokenkit.train.folder import RunFolder, write_json
from tokenkit.train.loop import train
from tokenkit.train.parallel import first, leaders, leads, processes, ranks
from tokenkit.train.schema import TrainConfig
from tokenkit.train.sharding import sharded
from tokenkit.train.sinks import Sinks
from tokenkit.train.tasks.distill import TextTask
from tokenkit.train.tasks.joint import JointBatches, JointTask
from tokenkit.verbs.card import begin_card, finish_card
from tokenkit.verbs.card_content import data_facts
from tokenkit.verbs.device import pick_device
from tokenkit.verbs.model import DTYPES


class NewTokenizer(Config):
    """A tokenizer learnt from the training text."""

    kind: Literal["bpe", "unigram"] = "bpe"
    vocab_size: int = Field(4096, ge=300)
    max_bytes: int | None = None
    """Learn from this many bytes of the text at most."""


class TokenizerChoice(Config):
    """A tokenizer to load, or one to learn."""

    load: TokenizerSpec | None = None
    """`NAME` or `NAME:target=KIND:conversion=...`, or these keys."""
    train: NewTokenizer | None = None

    @model_validator(mode="after")
    def _one(self) -> "TokenizerChoice":
        if (self.load is None) == (self.train is None):
            raise UserError("tokenizer: give either load=... or train={kind: bpe, vocab_size: 4096}")
        return self


class ReconstructionConfig(Config):
    """Joint training: the strings of tokens are to be read off their embedding rows again.

    What moves with the model is a linear map of rows to grid values and a copy of the auto-encoder's decoder; encoder,
    quantiser and tokenizer stay as they are, and so do all ids.
    """

    weight: float = Field(0.1, ge=0)
    """Of the reconstruction beside the language model's loss: how much rows are held to it; 0 is the plain run."""
    num_tokens: int = Field(512, ge=1)
    """Distinct tokens of a step that are read at most."""


class PretrainRun(Config):
    """A run file of `tokenkit pretrain`."""

    output: Path
    tokenizer: TokenizerChoice
    model: dict[str, Any] | None = None
    """Fields of a transformers config, `model_type: llama` among them; without it only the tokenizer is learnt."""
    embeddings: Literal["random", "digit_sum", "decoder"] = "random"
    """How the rows of a learned tokenizer begin: as the model draws them, or made of the auto-encoder's latents."""
    reconstruction: ReconstructionConfig | None = None
    """With a learned tokenizer: its strings are learnt along."""
    export_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    data: DataConfig
    train: TrainConfig | None = None
    eval: EvalConfig
    card: CardConfig = CardConfig()

    @model_validator(mode="after")
    def _whole(self) -> "PretrainRun":
        if (self.model is None) != (self.train is None):
            raise UserError("pretrain: give both model and train, or neither for a tokenizer alone")
        train = self.train
        if train is not None and (train.mode != "full" or train.embeddings != "all" or train.prefix is not None):
            raise UserError("pretrain: a new model is trained whole; leave train.mode, embeddings and prefix out")
        if self.data.format != "text":
            raise UserError("pretrain: data.format 'chat' is for distill; pretrain reads text")
        return self


def pretrain(run: PretrainRun, *, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Trains, measures and exports; the results that are also in `output/results.json`."""
    if run.model is None or run.train is None:
        return _tokenizer_alone(run, resume)
    with processes(run.train.parallel, pick_device(run.train.device, "train.device")):
        trained, leading = _trained(run, run.model, run.train, resume, quiet), leads()
    return _finished(run, trained) if leading else {}


def _tokenizer_alone(run: PretrainRun, resume: bool) -> dict[str, Any]:
    documents = read_texts(run.data)
    held_out = read_documents(run.eval.source)
    _claim(run, RunFolder(run.output), resume)
    tokenizer = _tokenizer(run, documents)
    results = {"vocab_size": tokenizer.vocab_size, "bytes_per_token": _bytes_per_token(tokenizer, held_out)}
    write_json(run.output / "results.json", results)
    return results


def _claim(run: PretrainRun, folder: RunFolder, resume: bool) -> None:
    folder.claim(resolved(run), resume=resume)
    begin_card(run.output, "pretrain")


@dataclass(frozen=True)
class _Trained:
    """What is left of the training for the export."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    task: TextTask
    folder: RunFolder
    results: dict[str, Any]
    spelled: float | None
    facts: dict[str, Any]
    counts: dict[str, int]


def _trained(
    run: PretrainRun, fields: dict[str, Any], config_train: TrainConfig, resume: bool, quiet: bool
) -> _Trained:
    documents = read_texts(run.data)
    held_out = read_documents(run.eval.source)
    folder = RunFolder(run.output, Sinks(config_train.sinks if leads() else [], config_train.project))
    first(lambda: _claim(run, folder, resume))
    first(lambda: str(_tokenizer(run, documents)))  # the others read what the first has made
    tokenizer = _tokenizer(run, documents)
    model = _model(fields, config_train, tokenizer)
    view = _embedded(run, model, tokenizer)
    if ranks().mesh is not None and (run.reconstruction is not None or isinstance(view, FactorisedView)):
        raise UserError(
            "train.parallel: a model that makes rows of a learned tokenizer's codes, or reads strings off its rows, is "
            "trained by one process; start it without torchrun"
        )
    rows = read_training_rows(run.data)
    if run.data.packing:
        check_packing(view, tokenizer.start_id())
    sizes = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "attention": f"{attention_of(model)} (student)",
        "training_bytes_available": sum(len(d.encode()) for d in documents),
        "held_out_bytes": sum(len(d.encode()) for d in held_out),
    }
    with sharded(view, None, ranks()):
        task, batches = view.whole(lambda: _task(run, view, tokenizer, rows))
        joint = task if isinstance(task, JointTask) else None
        spelled = None if joint is None else view.whole(lambda: joint.speller.exact(input_matrix(model)))
        measure = _measure(run, task.student, tokenizer, held_out)
        with made_ahead(batches, run.data.workers) as ahead:
            counted = Counted(ahead)
            progress = train(task, counted, config_train, folder, measure, label="pretrain", quiet=quiet)
        reached = {"steps": progress.step, "tokens": progress.num_tokens, "bytes": progress.num_bytes}
        results = {**leaders(measure()), **reached, **sizes}
    facts = data_facts(rows, held_out, batches.rows_read(progress.step))
    return _Trained(model, tokenizer, task, folder, results, spelled, facts, counted.counts)


def _finished(run: PretrainRun, trained: _Trained) -> dict[str, Any]:
    trained.folder.sinks.close()
    results, target, task = trained.results, run.output / "model", trained.task
    if not target.exists():
        export_model(trained.model, trained.tokenizer, target, dtype=DTYPES[run.export_dtype])
    if isinstance(task, JointTask):
        task.speller.save(run.output / "speller.safetensors")
        spelled = task.speller.exact(input_matrix(trained.model))
        results = {**results, "spelled_before": trained.spelled, "spelled": spelled}
    write_json(run.output / "results.json", results)
    finish_card(run.output, run.card, lambda: {"data": trained.facts, "counts": trained.counts})
    return results


def _tokenizer(run: PretrainRun, documents: list[str]) -> Tokenizer:
    kept = run.output / "tokenizer"
    if kept.is_dir():
        return load_tokenizer(str(kept))
    choice = run.tokenizer
    if choice.train is None:
        tokenizer = load_tokenizer(choice.load or "")
        require_lossless(tokenizer, "the tokenizer of a new model")
        require_kept(tokenizer, load_tokenizer)
    else:
        texts = _first(documents, choice.train.max_bytes)
        tokenizer = train_tokenizer(texts, choice.train.kind, choice.train.vocab_size)
    with drafted(kept) as draft:  # a run that is killed here finds no half of it
        tokenizer.save(draft)
    return tokenizer


def _first(documents: list[str], max_bytes: int | None) -> list[str]:
    taken, total = [], 0
    for document in documents:
        if max_bytes is not None and total >= max_bytes:
            break
        taken.append(document)
        total += len(document.encode())
    return taken


def _bytes_per_token(tokenizer: Tokenizer, documents: list[str]) -> float:
    tokens = sum(len(encoding) for encoding in tokenizer.encode_batch(documents))
    return sum(len(document.encode()) for document in documents) / tokens


def _model(fields: dict[str, Any], config_train: TrainConfig, tokenizer: Tokenizer) -> PreTrainedModel:
    fields = dict(fields)
    if "model_type" not in fields:
        raise UserError("model.model_type: missing; write model.model_type=llama")
    ids = {"bos_token_id": tokenizer.start_id(), "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    ids["vocab_size"] = _fixed(tokenizer).vocab_size
    try:
        config = AutoConfig.for_model(fields.pop("model_type"), **ids, **fields)
    except ValueError as error:
        raise UserError(f"model: {str(error).splitlines()[0]}") from None
    torch.manual_seed(config_train.seed)
    device = pick_device(config_train.device, "train.device")
    check_attention(config_train.attention, device, config_train.precision)
    model = AutoModelForCausalLM.from_config(config)
    set_attention(model, config_train.attention)
    return model.float().to(device if ranks().mesh is None else "cpu")  # what is spread over GPUs may not fit on one


def _fixed(tokenizer: Tokenizer) -> Tokenizer:
    """The part of a tokenizer whose ids have rows: all of it, or all but the codes."""
    return tokenizer.fixed if isinstance(tokenizer, LearnedTokenizer) else tokenizer


def _embedded(run: PretrainRun, model: PreTrainedModel, tokenizer: Tokenizer) -> ModelView:
    method, seed = None if run.embeddings == "random" else run.embeddings, run.train.seed if run.train else 0
    if not isinstance(tokenizer, LearnedTokenizer):
        for key, value in (("embeddings", method), ("reconstruction", run.reconstruction)):
            if value is not None:
                raise UserError(f"{key}: needs a learned tokenizer, and {tokenizer.name} has no latents; leave it out")
    elif tokenizer.codec.layout.num_codes:
        return attach_factorised(model, tokenizer, method=method, seed=seed)
    elif method is not None:
        resize_and_init(model, tokenizer, method=method, seed=seed)
    return ModelView(model)


def _task(run: PretrainRun, view: ModelView, tokenizer: Tokenizer, rows: Rows) -> tuple[TextTask, Batches]:
    assert run.train is not None
    joint, sizes = run.reconstruction, {"batch_size": run.train.batch_size, "seed": run.train.seed}
    packing = run.data.pack_bytes
    precision, losses = run.train.precision, {"clm": {}}
    if joint is None or joint.weight == 0 or not isinstance(tokenizer, LearnedTokenizer):
        objective = Objective.of(LossesConfig.model_validate(losses))
        task = TextTask(objective, view, _fixed(tokenizer), precision=precision)
        return task, Batches(rows, tokenizer, None, **sizes, pack_bytes=packing)
    speller = Speller(tokenizer.network(), tokenizer.codec, input_matrix(view.model))
    objective = Objective.of(LossesConfig.model_validate({**losses, "reconstruction": {"weight": joint.weight}}))
    task = JointTask(objective, view, _fixed(tokenizer), precision=precision, speller=speller)
    options = {"speller": speller, "num_tokens": joint.num_tokens, "pack_bytes": packing}
    return task, JointBatches(rows, tokenizer, None, **sizes, **options)


def _measure(run: PretrainRun, view: ModelView, tokenizer: Tokenizer, held_out: list[str]) -> Any:
    options = run.eval.windows()

    def measure() -> dict[str, float]:
        with whole_precision(view.model):
            found = view.whole(lambda: bits_per_byte(view, tokenizer, held_out, **options))
        return {"bits_per_byte": found.value, "bytes_per_token": found.bytes_per_token}

    return measure
