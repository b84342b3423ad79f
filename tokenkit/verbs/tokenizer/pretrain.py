"""`tokenkit tokenizer pretrain`: the auto-encoder of a learned tokenizer, trained, measured and packaged."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator

from tokenkit.config import Config, UserError, digest, resolved
from tokenkit.data.chunk_batches import ChunkBatches, DrawConfig
from tokenkit.data.chunk_corpus import ChunkDataConfig, read_corpus
from tokenkit.data.chunks import ChunkCorpus
from tokenkit.eval.reconstruction import HeldOut, measure
from tokenkit.objective import LossesConfig, Objective
from tokenkit.quantities import AUTOENCODER_LEAVES, SIDES
from tokenkit.tokenizers.autoencoder.bundle import read_network
from tokenkit.tokenizers.autoencoder.chunkers import MAX_CHUNK
from tokenkit.tokenizers.autoencoder.ids import FIRST_REGULAR_ID
from tokenkit.tokenizers.autoencoder.network import PRESETS, AutoEncoder, NetworkConfig
from tokenkit.tokenizers.autoencoder.package import METRICS, Kind, Package, PackageConfig
from tokenkit.tokenizers.autoencoder.pins import PinTable
from tokenkit.tokenizers.autoencoder.placement import place_pins
from tokenkit.tokenizers.autoencoder.selection import select_pins
from tokenkit.tokenizers.autoencoder.tokenizer import save_with_fast
from tokenkit.train.checkpoint_files import Identity, StepFiles
from tokenkit.train.folder import MAY_CHANGE, RUN_FILE, RunFolder, write_json
from tokenkit.train.loop import train
from tokenkit.train.parallel import first, leads, processes
from tokenkit.train.recipe import ACCURACY, LOSSES, TokenizerTrainConfig
from tokenkit.train.sinks import Sinks
from tokenkit.train.tasks.autoencode import AutoencodeTask
from tokenkit.verbs.device import pick_device
from tokenkit.verbs.tokenizer.prune import warm_chunks

log = logging.getLogger(__name__)


class NetworkSection(NetworkConfig):
    """A preset by its name, or with changes, or a network key by key."""

    preset: str | None = None
    """nano, small, base, gpu, or compat for the checklist's convolutions."""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        keys = {"preset": values} if isinstance(values, str) else values
        if not isinstance(keys, dict) or keys.get("preset") is None:
            return keys
        if keys["preset"] not in PRESETS:
            raise UserError(f"network.preset: {keys['preset']!r} is none; write one of {', '.join(PRESETS)}")
        return {**resolved(PRESETS[keys["preset"]]), **keys}

    def plain(self) -> NetworkConfig:
        """The network without the name that it came by."""
        return NetworkConfig.model_validate(self.model_dump(exclude={"preset"}))


class TokenizerPretrainRun(Config):
    """A run file of `tokenkit tokenizer pretrain`."""

    output: Path
    """The run folder; the tokenizer is in `output/tokenizer`."""
    checkpoints: Path | None = None
    """Where the checkpoints are; by default `output/checkpoints`."""
    package: Path | None = None
    """Where the tokenizer goes; by default `output/tokenizer`."""
    network: NetworkSection = NetworkSection(**resolved(PRESETS["small"]), preset="small")
    data: ChunkDataConfig
    draw: DrawConfig = DrawConfig()
    losses: LossesConfig = LOSSES
    train: TokenizerTrainConfig
    pins: int = Field(32768, ge=0)
    """Byte strings in the exact table of the tokenizer, chosen from the training text."""
    warm: int = Field(150_000, ge=0)
    """The commonest chunks of the training text whose ids are shipped along."""
    kind: Kind = "compact"
    """compact: ids are pins and bytes; open: codes of the network as well."""
    first_regular_id: int = Field(FIRST_REGULAR_ID, ge=4)
    """Ids below are for special tokens."""
    init: Path | None = None
    """A checkpoint whose weights the training begins with."""

    @model_validator(mode="after")
    def _known(self) -> "TokenizerPretrainRun":
        known = {f"{side}_{name}" for side in SIDES for name in AUTOENCODER_LEAVES}
        for term in Objective.of(self.losses).terms:
            for name in sorted(term.names - known):
                raise UserError(
                    f"losses.{term.loss.name}: needs {name}, which an auto-encoder has not; write "
                    "reconstruction, saturation or crowded_levels"
                )
        return self

    @property
    def checkpoint_folder(self) -> Path:
        """Where the checkpoints are."""
        return self.checkpoints or self.output / "checkpoints"


def pretrain_tokenizer(
    run: TokenizerPretrainRun,
    *,
    resume: bool = False,
    resume_from: Path | None = None,
    allow_config_change: bool = False,
    quiet: bool = False,
    tell: Callable[[str], None] = log.info,
) -> dict[str, Any]:
    """Trains, measures and packages; the results that are also in `output/results.json`.

    `resume_from` is the checkpoint to go on from, by default the newest; `tell` gets lines of progress of the reading.
    Of several processes each has the network, and reads its part of every step.
    """
    with processes(run.train.parallel, pick_device(run.train.device, "train.device")):
        return _trained(run, resume, resume_from, allow_config_change, quiet, tell)


def _trained(
    run: TokenizerPretrainRun,
    resume: bool,
    resume_from: Path | None,
    allow_config_change: bool,
    quiet: bool,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    corpus = read_corpus(run.data, tell)
    task, batches = build_task(run, corpus)
    held_out = HeldOut.of(corpus.held_out, corpus.train, task.network.max_bytes, run.train.max_eval_chunks)
    folder = RunFolder(run.output, Sinks(run.train.sinks if leads() else [], run.train.project))
    continues = resume or (resume_from is not None and (run.output / RUN_FILE).is_file())
    may_change = None if allow_config_change else _may_change(run)
    first(lambda: folder.claim(resolved(run), resume=continues, may_change=may_change))
    files = StepFiles(
        run.checkpoint_folder,
        identity_of(run, corpus, batches),
        folder.logged,
        resume=resume_from,
        allow_config_change=allow_config_change,
    )
    progress = train(
        task,
        batches,
        run.train,
        folder,
        partial(measure, task.average, held_out),
        checkpoints=files,
        label="tokenizer",
        quiet=quiet,
    )
    folder.sinks.close()
    if not leads():
        return {}
    everything = HeldOut.of(corpus.held_out, corpus.train, task.network.max_bytes)
    results = {
        **measure(task.average, everything, shortest=True),
        "steps": progress.step,
        "best_step": progress.best_step,
        "chunks": progress.step * run.train.batch_size,
        "parameters": sum(p.numel() for p in task.network.parameters()),
        "training_chunks": len(batches.table),
        "held_out_chunks": len(everything.symbols),
        "data_fingerprint": corpus.fingerprint(),
    }
    results["fingerprint"] = save_package(run, task.average, corpus, results)
    write_json(run.output / "results.json", results)
    return results


def build_task(run: TokenizerPretrainRun, corpus: ChunkCorpus) -> tuple[AutoencodeTask, ChunkBatches]:
    """The auto-encoder at its beginning, or with the weights of `init`, and the batches it learns from."""
    network_config = run.network.plain()
    table = corpus.train.cut(network_config.max_bytes)
    batches = ChunkBatches(table, network_config, run.draw, batch_size=run.train.batch_size, seed=run.train.seed)
    torch.manual_seed(run.train.seed)
    network = AutoEncoder(network_config) if run.init is None else read_network(run.init)
    if network.config != network_config:
        raise UserError(f"init: {run.init} is of another network; write network as it was there")
    network = network.train().to(pick_device(run.train.device, "train.device"))
    options = {"precision": run.train.precision, "ema_decay": run.train.ema_decay}
    task = AutoencodeTask(network, Objective.of(run.losses), batches, **options)
    if run.init is None:
        task.begin()
    return task, batches


def identity_of(run: TokenizerPretrainRun, corpus: ChunkCorpus, batches: ChunkBatches) -> Identity:
    """What a checkpoint of this run may only be continued under."""
    compared = resolved(run)
    for name in {*_may_change(run), "data", "init"}:  # the text has a fingerprint of its own
        *sections, key = name.split(".")
        reduce(lambda values, section: values[section], sections, compared).pop(key, None)
    header = {"network": resolved(run.network.plain()), "chunker": corpus.chunker}
    return Identity(
        config=digest(compared),
        data=corpus.fingerprint(),
        header=header,
        metric=run.train.best.metric if run.train.best else ACCURACY,
        steps_per_epoch=max(1, len(batches.table) // run.train.batch_size),
    )


def save_package(run: TokenizerPretrainRun, network: AutoEncoder, corpus: ChunkCorpus, metrics: dict[str, Any]) -> str:
    """Writes the tokenizer: pins of the training text, the network, the settings; its fingerprint."""
    pins = select_pins(corpus.train.cut(MAX_CHUNK).as_dict(), run.pins) if run.pins else PinTable((), ())
    network = network.cpu().eval()
    if len(pins) <= network.quantizer.total_vocab_size:
        pins = place_pins(network, pins)
    config = PackageConfig(
        kind=run.kind,
        chunker=corpus.chunker,
        first_regular_id=run.first_regular_id,
        network=resolved(network.config),
    )
    package = Package(config, pins, network)
    target = run.package or run.output / "tokenizer"
    fingerprint = save_with_fast(replace(package, warm=warm_chunks(package, corpus.train.as_dict(), run.warm)), target)
    write_json(target / METRICS, metrics)
    return fingerprint


def _may_change(run: TokenizerPretrainRun) -> tuple[str, ...]:
    """A run of which the schedule is laid out over more steps may be made longer, and is then as if it always was."""
    longer = ("train.steps",) if run.train.schedule_steps is not None else ()
    return (*MAY_CHANGE, "checkpoints", "package", "pins", "warm", "kind", "first_regular_id", *longer)
