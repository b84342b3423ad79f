"""The checklist's JSON configuration and flags as runs of the verbs."""

from pathlib import Path

from tokenkit.config import UserError, resolved
from tokenkit.data.chunk_corpus import MANIFEST, ChunkDataConfig
from tokenkit.data.source import SourceConfig
from tokenkit.tokenizers.autoencoder.config import TokenizerConfig
from tokenkit.train.recipe import checklist_training
from tokenkit.verbs.tokenizer.pretrain import NetworkSection, TokenizerPretrainRun

BLANK_LINE = r"\n[ \t]*\n"  # between the documents of a text file


def checklist_run(
    config: TokenizerConfig,
    *,
    steps: int | None = None,
    checkpoint_dir: Path | None = None,
    checkpoint_interval: int | None = None,
    eval_interval: int | None = None,
    seed: int = 0,
    init: Path | None = None,
) -> TokenizerPretrainRun:
    """A training as a configuration says, with what flags change; its folder is that of the checkpoints."""
    changes = {"checkpoint_interval": checkpoint_interval, "eval_interval": eval_interval}
    section = config.training.model_copy(update={key: value for key, value in changes.items() if value is not None})
    folder = checkpoint_dir or Path(config.paths.checkpoint_dir)
    return TokenizerPretrainRun(
        output=folder,
        checkpoints=folder,
        package=Path(config.paths.model_save_dir),
        network=NetworkSection(**resolved(config.network())),
        data=checklist_data(config, seed),
        train=checklist_training(section, steps or section.max_steps, seed),
        pins=config.fsq.vocab_size,
        first_regular_id=config.special_tokens.first_regular_id,
        init=init,
    )


def checklist_data(config: TokenizerConfig, seed: int = 0) -> ChunkDataConfig:
    """The text of a configuration: a prepared folder, or files whose documents are apart by a blank line."""
    train, held_out = Path(config.paths.training_data), Path(config.paths.validation_data)
    if (train / MANIFEST).is_file():
        return ChunkDataConfig(prepared=train)
    if not train.exists():
        raise UserError(f"paths.training_data: {train} does not exist; write a text file or folder, or a prepared one")
    split = config.training.validation_split
    if not held_out.exists() and split == 0:
        raise UserError("training.validation_split: 0, and paths.validation_data does not exist; write 0.1")
    return ChunkDataConfig(
        source=SourceConfig(path=str(train), separator=BLANK_LINE),
        held_out=SourceConfig(path=str(held_out), separator=BLANK_LINE) if held_out.exists() else None,
        chunker=config.chunker,
        validation_split=split or 0.1,
        split_seed=seed,
    )
