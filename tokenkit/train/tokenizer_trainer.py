"""The checklist's trainer and checkpoint: views of the one loop and of its files."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenkit.config import UserError, digest, resolved
from tokenkit.data.chunk_batches import ChunkBatches, DrawConfig
from tokenkit.data.chunks import ChunkTable, TokenizerDataset
from tokenkit.eval.reconstruction import HeldOut, measure
from tokenkit.objective import Objective
from tokenkit.tokenizers.autoencoder.bundle import read_bundle, read_network
from tokenkit.tokenizers.autoencoder.config import TokenizerConfig
from tokenkit.tokenizers.autoencoder.network import AutoEncoder
from tokenkit.tokenizers.autoencoder.tokenizer import AutoEncoderTokenizer
from tokenkit.train.balance import Balance
from tokenkit.train.checkpoint import Progress, Training
from tokenkit.train.checkpoint_files import BEST, Identity, StepFiles, step_files
from tokenkit.train.folder import RunFolder
from tokenkit.train.loop import train as run_loop
from tokenkit.train.optimizer import build_optimizer
from tokenkit.train.recipe import ACCURACY, LOSSES, checklist_training
from tokenkit.train.tasks.autoencode import AutoencodeTask


@dataclass(frozen=True)
class TrainerState:
    """Where a training stands, and its course by step."""

    step: int
    epoch: int
    best_accuracy: float | None
    current_loss: float | None
    loss_history: dict[int, float]
    accuracy_history: dict[int, float]


@dataclass(frozen=True)
class TokenizerCheckpoint:
    """One checkpoint file, part by part."""

    encoder: Mapping[str, Tensor]
    decoder: Mapping[str, Tensor]
    fsq: Mapping[str, Any]
    step: int
    epoch: int
    loss: float | None
    val_accuracy: float | None
    optimizer_state: Mapping[str, Tensor]
    timestamp: str
    config_hash: str

    @classmethod
    def load(cls, path: Path | str) -> "TokenizerCheckpoint":
        """What a file holds; UserError for one that is damaged or something else."""
        tensors, state = read_bundle(Path(path))
        decoder = {name: t for name, t in tensors["model"].items() if name.startswith("decoder.") or name == "missing"}
        encoder = {name: t for name, t in tensors["model"].items() if name not in decoder}
        keys = ("levels", "mode", "digit_order", "kappa")
        return cls(
            encoder=encoder,
            decoder=decoder,
            fsq={key: state["network"][key] for key in keys},
            step=state["step"],
            epoch=state["epoch"],
            loss=state["loss"],
            val_accuracy=state["value"],
            optimizer_state=tensors["optimizer"],
            timestamp=state["timestamp"],
            config_hash=state["config_hash"],
        )


class TokenizerTrainer:
    """Trains the auto-encoder of a tokenizer on chunks, as the checklist's configuration says."""

    def __init__(self, tokenizer: AutoEncoderTokenizer, config: TokenizerConfig):
        """Checkpoints go to `config.paths.checkpoint_dir`, beside metrics.jsonl.

        The tokenizer that is handed in stays as it is, since its weights decide what its codes mean;
        `trainer.tokenizer` is the trained one.
        """
        self.tokenizer, self.config = tokenizer, config
        self.network = self._copied(tokenizer)
        self.folder = RunFolder(Path(config.paths.checkpoint_dir))
        self._resume: Path | None = None
        self._files = self._new_files("", 1)

    def train(
        self, train: TokenizerDataset, val: TokenizerDataset, *, steps: int | None = None, seed: int = 0
    ) -> TrainerState:
        """Trains to `steps`, by default to what the configuration allows; `tokenizer` has the averaged weights then."""
        network, section = self.network, self.config.training
        epoch = max(1, -(-train.size() // section.batch_size))
        run = checklist_training(section, steps or min(section.max_steps, section.max_epochs * epoch), seed)
        batches = ChunkBatches(train.table, network.config, DrawConfig(), batch_size=run.batch_size, seed=seed)
        torch.manual_seed(seed)
        task = AutoencodeTask(network.train(), Objective.of(LOSSES), batches, ema_decay=run.ema_decay)
        task.begin()
        held_out = HeldOut.of(val.table, train.table, network.max_bytes, run.max_eval_chunks)
        self._files = self._new_files(train.table.fingerprint(), epoch)
        self.folder.path.mkdir(parents=True, exist_ok=True)
        evaluate = partial(measure, task.average, held_out)
        progress = run_loop(task, batches, run, self.folder, evaluate, checkpoints=self._files, quiet=True)
        self._files.progress = progress
        self._renew(task.average)
        return self.get_state()

    def evaluate(self, data: TokenizerDataset) -> float:
        """Learned accuracy on bytes, in [0, 1]."""
        network = self.tokenizer.package.network or self.network
        return measure(network, HeldOut.of(data.table, ChunkTable.of({}), network.max_bytes))[ACCURACY]

    def save_checkpoint(self, step: int, val_accuracy: float, is_best: bool) -> Path:
        """Writes `checkpoint_step_<step>.bin`, and the best file too where it is the best; nothing is dropped."""
        progress = replace(self._files.progress, step=step, value=val_accuracy)
        if is_best:
            progress = replace(progress, best_value=val_accuracy, best_step=step, since_best=0)
        self._files.progress = progress
        training = self._files.training or self._untrained()
        self._files.save(training, progress, keep=1 << 30, last=False)
        if is_best:
            self._files.measured(training, progress, True)
        return self._files.folder / f"checkpoint_step_{step}.bin"

    def load_checkpoint(self, path: Path | str) -> TrainerState:
        """Puts the weights of a checkpoint in place; `train` goes on from it, with its optimizer and its data."""
        self._resume = Path(path)
        tensors, state = read_bundle(self._resume)
        try:
            self.network.load_state_dict(tensors["model"])
        except RuntimeError as error:
            raise UserError(f"{path}: is of another network ({str(error).splitlines()[0]})") from None
        self._renew(read_network(self._resume))
        self._files.progress = Progress.of(state)
        return self.get_state()

    def cleanup_old_checkpoints(self, keep_last_n: int = 5) -> list[Path]:
        """Drops all step files but the newest by number; those that went. Best and final stay."""
        old = list(step_files(self._files.folder).values())[keep_last_n:]
        for path in old:
            path.unlink()
        return old

    def get_state(self) -> TrainerState:
        """Step, epoch, best accuracy, last loss and both courses."""
        progress = self._files.progress
        return TrainerState(
            progress.step,
            progress.step // self._files.identity.steps_per_epoch,
            progress.best_value,
            progress.loss,
            self.folder.logged("loss"),
            self.folder.logged(ACCURACY),
        )

    @property
    def best(self) -> Path:
        """The checkpoint that measured best."""
        return self._files.folder / BEST

    def _new_files(self, data: str, epoch: int) -> "_Watched":
        compared = resolved(self.config)
        for section, keys in NOT_COMPARED.items():
            for key in keys:
                compared[section].pop(key)
        header = {"network": resolved(self.network.config), "chunker": self.config.chunker}
        identity = Identity(digest(compared), data, header, ACCURACY, epoch)
        return _Watched(self.folder.path, identity, self.folder.logged, resume=self._resume)

    def _renew(self, network: AutoEncoder) -> None:
        old = self.tokenizer
        package = replace(old.package, network=copy.deepcopy(network).cpu().eval())
        self.tokenizer = AutoEncoderTokenizer(old.config, package=package, kind=old.kind)

    @staticmethod
    def _copied(tokenizer: AutoEncoderTokenizer) -> AutoEncoder:
        if tokenizer.package.network is None:
            raise UserError("TokenizerTrainer: this tokenizer has no auto-encoder; load it with kind='open'")
        return copy.deepcopy(tokenizer.package.network).requires_grad_(True)

    def _untrained(self) -> Training:
        parameters = dict(self.network.named_parameters())
        optimizer = build_optimizer(parameters, checklist_training(self.config.training, 1, 0).optimizer)
        return Training(parameters, optimizer, Balance(), {})


NOT_COMPARED = {"paths": ("model_save_dir", "checkpoint_dir", "training_data", "validation_data")}


class _Watched(StepFiles):
    """Files that remember what they were last asked to keep."""

    training: Training | None = None
    progress = Progress()

    def load(self, training: Training) -> Progress | None:
        """As the files do."""
        self.training = training
        found = super().load(training)
        self.progress = found or Progress()
        return found
