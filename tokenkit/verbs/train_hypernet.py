"""`tokenkit train-hypernet`: a network that makes the rows of any tokenizer for one model; the model stays as it is."""

from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from tokenkit.config import Config, UserError, resolved
from tokenkit.data.ahead import made_ahead
from tokenkit.data.corpus import DataConfig, read_texts, read_training_rows
from tokenkit.data.source import read_documents
from tokenkit.data.stream import Rows
from tokenkit.eval.bits_per_byte import EvalConfig, bits_per_byte
from tokenkit.models.hypernet import FILE, NUM_BYTES, Hypernet, hypernet_for, matrices_of
from tokenkit.models.hypernet_layers import HypernetConfig
from tokenkit.models.load import logit_settings
from tokenkit.models.packed import check_packing
from tokenkit.models.view import ModelView
from tokenkit.objective import LossesConfig, Objective
from tokenkit.tokenizers.base import Tokenizer, require_lossless
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.tokenizers.sampler import SamplerConfig, TokenizerSampler
from tokenkit.tokenizers.spec import TokenizerSpec
from tokenkit.train.counted import Counted
from tokenkit.train.folder import RunFolder, write_json
from tokenkit.train.loop import train
from tokenkit.train.parallel import first, leads, processes
from tokenkit.train.schema import LoopConfig
from tokenkit.train.sinks import Sinks
from tokenkit.train.tasks.hypernet import HypernetObjective, HypernetTask, SampledBatches
from tokenkit.transfer.evidence import Evidence
from tokenkit.transfer.hypernet import predicted
from tokenkit.transfer.initialize import Choice, RowMaker, all_rows
from tokenkit.transfer.plan import TransferPlan, plan_transfer
from tokenkit.transfer.rows import TensorRows
from tokenkit.transfer.specials import Side
from tokenkit.verbs.device import pick_device
from tokenkit.verbs.model import ModelChoice, load_pair

SIDES: tuple[Side, Side] = ("input", "head")


class HypernetEval(EvalConfig):
    """Held-out text, and real tokenizers that the model reads it with, rows by the network."""

    tokenizers: list[TokenizerSpec] = Field(min_length=1)
    """None of them is trained on; beside each the figure of fast vocabulary transfer."""


class TrainHypernetRun(Config):
    """A run file of `tokenkit train-hypernet`."""

    output: Path
    model: ModelChoice
    """The network makes rows for this model alone."""
    hypernet: HypernetConfig = HypernetConfig()
    sampler: SamplerConfig = SamplerConfig()
    """The tokenizers that are trained on, drawn from the training text."""
    steps_per_tokenizer: int = Field(1, ge=1)
    """Steps that a drawn tokenizer serves."""
    negatives: int | None = Field(1024, ge=1)
    """Tokens beside those of a step that its softmax runs over, each standing for several; null: all of them."""
    copies: bool = True
    """Tokens that the model's own tokenizer has keep their rows, as in a transfer; false: they are predicted too."""
    lexical_weight: float = Field(0.0, ge=0)
    """Of the distance between predicted and own rows of such tokens, where they are predicted; the paper's is 0.5."""
    identity_steps: int = Field(0, ge=0)
    """First steps in which only that distance is learnt: for a network without a residual connection."""
    losses: LossesConfig = LossesConfig.model_validate({"clm": {}})
    data: DataConfig
    train: LoopConfig
    eval: HypernetEval

    @model_validator(mode="after")
    def _fits(self) -> "TrainHypernetRun":
        if self.hypernet.architecture == "identity":
            raise UserError("hypernet.architecture: 'identity' learns nothing; write transformer, mlp or linear")
        if self.data.format != "text" or self.data.chunks != "unconstrained":
            raise UserError("data: a hypernetwork is trained on text, format=text and chunks=unconstrained")
        for key in ("lexical_weight", "identity_steps"):
            if self.copies and self.__dict__[key]:
                raise UserError(f"{key}: {self.__dict__[key]} beside copies=true, where such rows are not predicted")
        return self


def train_hypernet(run: TrainHypernetRun, *, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Trains the network, writes `output/hypernet.safetensors`; the results that are also in `output/results.json`.

    Of several processes each has the model and the network, and reads its part of every step.
    """
    with processes(run.train.parallel, pick_device(run.train.device, "train.device")):
        return _trained(run, resume, quiet)


def _trained(run: TrainHypernetRun, resume: bool, quiet: bool) -> dict[str, Any]:
    model, source = load_pair(run.model, pick_device(run.train.device, "train.device"))
    require_lossless(source, "the tokenizer of a hypernetwork's model")
    if run.negatives is not None and "softcap" in logit_settings(model):
        raise UserError("negatives: a model that caps its logits needs the whole vocabulary; write negatives=null")
    documents, held_out = read_texts(run.data), read_documents(run.eval.source)
    view = ModelView(model)
    network = _network(run, view, source)
    objective = Objective.of(run.losses)
    objective.check_text()
    objective.check_vocabularies(run.sampler.vocab_size, source.vocab_size, same_tokenizer=False)
    task = HypernetTask(
        HypernetObjective.around(objective, run.lexical_weight, run.identity_steps),
        network,
        view,
        source,
        copies=run.copies,
        precision=run.train.precision,
    )
    batches = _batches(run, task, source, documents, read_training_rows(run.data))
    if run.data.packing:
        check_packing(view, source.start_id())
    measured = HeldOut(run.eval, view, source, held_out)
    folder = RunFolder(run.output, Sinks(run.train.sinks if leads() else [], run.train.project))
    first(lambda: folder.claim(resolved(run), resume=resume))
    measure = partial(measured.by_network, network)
    with made_ahead(batches, run.data.workers) as ahead:
        progress = train(task, Counted(ahead), run.train, folder, measure, label="hypernet", quiet=quiet)
    folder.sinks.close()
    facts = {"model": run.model.source, "source_tokenizer": source.fingerprint, "steps": progress.step}
    if leads() and not (run.output / FILE).exists():
        network.save(run.output / FILE, facts)
    results = {
        "steps": progress.step,
        "tokens": progress.num_tokens,
        "bytes": progress.num_bytes,
        "parameters": sum(p.numel() for p in task.trainable().values()),
        "own_tokenizer": measured.own(),
        "fvt": measured.by_initializer("fvt"),
        "hypernet": measured.by_network(network),
    }
    if not leads():
        return {}
    write_json(run.output / "results.json", results)
    return results


def _network(run: TrainHypernetRun, view: ModelView, source: Tokenizer) -> Hypernet:
    made = hypernet_for(run.hypernet, view.model, source.vocab_size, seed=run.train.seed)
    spelled = {spelling for spelling in source.token_bytes if len(spelling) == 1}
    made.byte_rows.requires_grad_(len(spelled) < NUM_BYTES)  # else nothing ever asks for them
    return made


def _batches(
    run: TrainHypernetRun, task: HypernetTask, source: Tokenizer, documents: list[str], rows: Rows
) -> SampledBatches:
    return SampledBatches(
        rows,
        source,
        source if task.objective.needs("teacher") else None,
        batch_size=run.train.batch_size,
        seed=run.train.seed,
        sampler=TokenizerSampler(documents, run.sampler, seed=run.train.seed),
        source=source,
        source_rows=min(map(len, matrices_of(task.student.model))),
        longest=run.hypernet.max_seq_length,
        negatives=run.negatives,
        every=run.steps_per_tokenizer,
        pack_bytes=run.data.pack_bytes,
    )


class HeldOut:
    """Bits per byte of a frozen model under real tokenizers, with rows of an initialiser or a network."""

    def __init__(self, config: HypernetEval, view: ModelView, source: Tokenizer, documents: list[str]):
        self.config, self.view, self.source, self.documents = config, view, source, documents
        self.matrices = [TensorRows(matrix.detach()) for matrix in matrices_of(view.model)]
        rows = min(matrix.shape[0] for matrix in self.matrices)
        self.targets: dict[str, tuple[Tokenizer, TransferPlan]] = {}
        for spec in config.tokenizers:
            target = load_tokenizer(spec)
            require_lossless(target, "a tokenizer to measure with")
            self.targets[_short(spec, self.targets)] = target, plan_transfer(source, target, source_rows=rows)

    def own(self) -> float:
        """Bits per byte with the model's own tokenizer and rows."""
        return self._measured(self.view, self.source)

    def by_initializer(self, name: str) -> dict[str, float]:
        """Bits per byte by tokenizer, rows by an initialiser that needs no evidence."""

        def maker(side: Side, matrix: TensorRows, plan: TransferPlan, target: Tokenizer) -> RowMaker:
            return Choice(name).maker(side, matrix, plan, Evidence(self.source, target))

        return self._by_tokenizer(maker)

    def by_network(self, network: Hypernet) -> dict[str, float]:
        """Bits per byte by tokenizer, rows by the network as it stands."""

        def maker(side: Side, matrix: TensorRows, plan: TransferPlan, target: Tokenizer) -> RowMaker:
            return predicted(network, matrix, self.matrices, plan, self.source, target, side=side)

        return self._by_tokenizer(maker)

    def _by_tokenizer(self, maker: Callable[[Side, TensorRows, TransferPlan, Tokenizer], RowMaker]) -> dict[str, float]:
        found = {}
        for name, (target, plan) in self.targets.items():
            rows = [
                all_rows(maker(side, matrix, plan, target), matrix, plan, len(plan))
                for side, matrix in zip(SIDES, self.matrices)
            ]
            view = ModelView(self.view.model, tables={"input": rows[0], "head": rows[-1]})
            found[f"bits_per_byte/{name}"] = self._measured(view, target)
        return found

    def _measured(self, view: ModelView, tokenizer: Tokenizer) -> float:
        return bits_per_byte(view, tokenizer, self.documents, **self.config.windows()).value


def _short(spec: TokenizerSpec, taken: Collection[str]) -> str:
    """A tokenizer's folder, or the run that it stands in; the whole spec where another has that name."""
    path = Path(spec.name)
    name = path.parent.name if path.name == "tokenizer" else path.name
    return str(spec) if name in taken or not name else name
