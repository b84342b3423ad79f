"""How an auto-encoder of byte strings is trained unless a run file says otherwise."""

from pydantic import Field

from tokenkit.objective import LossesConfig, LossesSection
from tokenkit.tokenizers.autoencoder.config import TrainingSection
from tokenkit.train.schema import BestConfig, EarlyStoppingConfig, LoopConfig, OptimizerConfig

LOSSES: LossesSection = LossesConfig.model_validate(
    {"reconstruction": {}, "saturation": {"weight": 1e-4}, "crowded_levels": {"weight": 0.3}}
)
ACCURACY = "learned_byte_accuracy"


class RecipeOptimizer(OptimizerConfig):
    """AdamW and its schedule, with what a small auto-encoder learns fast with."""

    learning_rate: float = Field(3e-3, gt=0)
    """The peak; 1e-3 for networks of 1024 hidden units."""
    weight_decay: float = Field(0.01, ge=0)
    """On matrices; vectors (norms, biases) are never decayed."""
    betas: tuple[float, float] = (0.9, 0.98)
    warmup_steps: int = Field(100, ge=0)
    """Steps over which the learning rate rises linearly to its peak."""
    lr_min_ratio: float = Field(0.02, ge=0, le=1)


class TokenizerTrainConfig(LoopConfig):
    """How long, on how much, and what is kept."""

    batch_size: int = Field(256, ge=1)
    """Chunks per optimizer step."""
    optimizer: RecipeOptimizer = RecipeOptimizer()
    log_every: int = Field(50, ge=1)
    """Steps between lines of metrics.jsonl."""
    save_every: int = Field(1000, ge=1)
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = Field(5, ge=1)
    """The newest so many stay on disk, and beside them the best and the final one."""
    eval_every: int | None = Field(500, ge=1)
    """Steps between measurements; the last step is measured in any case."""
    best: BestConfig | None = BestConfig(metric=ACCURACY)
    """Keep the checkpoint that measures best, beside the newest ones."""
    early_stopping: EarlyStoppingConfig | None = None
    """End the run when it no longer gets better, or is good enough."""
    ema_decay: float = Field(0.999, ge=0, lt=1)
    """Share of the averaged weights, which are measured and packaged, that a step leaves as it was."""
    max_eval_chunks: int = Field(4096, ge=1)
    """Distinct held-out chunks that a measurement while training reads; the one at the end reads all."""


def checklist_training(section: TrainingSection, steps: int, seed: int) -> TokenizerTrainConfig:
    """The checklist's `training` section as this loop reads it. Its schedule ends at `max_steps`, however many are run.

    So a run of fewer steps can be made longer later and is then the same as one that was as long from the start.
    """
    patience, target = section.early_stopping_patience or None, section.target_char_accuracy
    horizon = max(section.max_steps, steps)
    return TokenizerTrainConfig(
        steps=steps,
        schedule_steps=horizon,
        batch_size=section.batch_size,
        seed=seed,
        optimizer=RecipeOptimizer(
            learning_rate=section.learning_rate,
            weight_decay=section.weight_decay,
            warmup_steps=min(section.warmup_steps, horizon),
        ),
        save_every=section.checkpoint_interval,
        eval_every=section.eval_interval,
        early_stopping=EarlyStoppingConfig(patience=patience, target=target) if patience or target else None,
    )
