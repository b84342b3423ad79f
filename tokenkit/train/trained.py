"""What of a language model is trained at which step: rows of its tables, and the part that a prefix leaves.

Rows that are not trained keep their bits whatever the optimizer does: no gradient reaches its moments or the norm, and
after the step they are put back, because weight decay asks for no gradient.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from transformers import PreTrainedModel

from tokenkit.config import UserError
from tokenkit.models.blocks import block_list
from tokenkit.models.load import head_matrix, input_matrix, output_head
from tokenkit.train.optimizer import learning_rate_factor
from tokenkit.train.schema import LoopConfig, PrefixConfig, TrainConfig

Embeddings = Literal["all", "new_rows", "none"]


class Trained:
    """Which gradients of a model reach the optimizer at a step, and what it must leave alone."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        embeddings: Embeddings = "all",
        prefix: PrefixConfig | None = None,
        new_rows: Bool[Tensor, "V"] | None = None,
    ):
        """`new_rows` are the rows of tokens that the old tokenizer does not have, where there was one."""
        self.model, self.prefix, self.new_rows = model, prefix, new_rows
        self.masked = embeddings == "new_rows"
        self._held: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        if self.masked and (new_rows is None or not new_rows.any()):
            raise _no_rows("train.embeddings: new_rows", new_rows)
        if prefix is not None:
            self._check(prefix, embeddings)

    def _check(self, prefix: PrefixConfig, embeddings: Embeddings) -> None:
        rows = prefix.trainable
        if rows == "non_overlapping_embeddings" and (self.new_rows is None or not self.new_rows.any()):
            raise _no_rows(f"train.prefix.trainable: {rows}", self.new_rows)
        if rows != "none" and embeddings == "none":
            raise UserError(
                f"train.prefix.trainable: {rows}, but train.embeddings=none trains no table; write one of the two "
                "otherwise"
            )
        count = len(block_list(self.model)[1]) if prefix.layers else 0
        if prefix.layers > count:
            raise UserError(f"train.prefix.layers: {prefix.layers} of {count} layers; write 0 to {count}")
        if not any(parameter.requires_grad for parameter in self._of_prefix(prefix)):
            raise UserError(
                "train.prefix: trains nothing; write train.prefix.trainable=embeddings, or train.prefix.layers=1"
            )

    def _of_prefix(self, prefix: PrefixConfig) -> Iterator[nn.Parameter]:
        if prefix.trainable != "none":
            yield from tables_of(self.model)
        if prefix.layers:
            for block in block_list(self.model)[1][: prefix.layers]:
                yield from block.parameters()

    @torch.no_grad()
    def gradients_ready(self, step: int) -> None:
        """Takes away the gradients of what is not trained at a step, counted from 0: before their norm is taken.

        What is learnt beside the model (maps of losses) is always trained.
        """
        prefix = self.prefix if self.prefix is not None and step < self.prefix.steps else None
        if prefix is not None:
            kept = set(self._of_prefix(prefix))
            for parameter in self.model.parameters():
                if parameter not in kept:
                    parameter.grad = None
        masked = self.masked or (prefix is not None and prefix.trainable == "non_overlapping_embeddings")
        self._held = []
        for table in tables_of(self.model) if masked else ():
            if table.grad is not None:
                rows = self._rows_of(table)
                table.grad.mul_(rows)
                self._held.append((table, rows, table.detach().clone()))

    @torch.no_grad()
    def stepped(self) -> None:
        """Gives the rows that are not trained the bits back that they had before the optimizer's step."""
        for table, rows, before in self._held:
            table.copy_(torch.where(rows, table, before))
        self._held = []

    def _rows_of(self, table: Tensor) -> Bool[Tensor, "..."]:
        """The rows that are trained, in the shape of a table; of one that is spread over processes, known to each."""
        assert self.new_rows is not None
        rows = self.new_rows.to(table.device)
        rows = rows if table.ndim == 1 else rows.unsqueeze(1)
        if isinstance(table, DTensor):
            mesh = table.device_mesh
            return DTensor.from_local(rows, mesh, [Replicate()] * mesh.ndim, run_check=False)
        return rows


def tables_of(model: PreTrainedModel) -> list[nn.Parameter]:
    """Embedding, head and the head's bias, a tied one once."""
    found = [input_matrix(model), head_matrix(model), output_head(model).bias]
    return list(dict.fromkeys(table for table in found if isinstance(table, nn.Parameter)))


def _no_rows(key: str, rows: Tensor | None) -> UserError:
    if rows is None:
        return UserError(f"{key}, but the run has no target_tokenizer and so no new rows; write all, or name one")
    return UserError(f"{key}, but the old tokenizer has every token of the target, so none is new; write all")


def check_prefix(config: TrainConfig) -> None:
    """UserError for a prefix that leaves no steps."""
    if config.prefix is not None and config.prefix.steps >= config.steps:
        raise UserError(
            f"train.prefix.steps: {config.prefix.steps:,} of {config.steps:,} train.steps, which leaves none for the "
            "rest; write less"
        )


def rate_at(step: int, config: LoopConfig) -> float:
    """The learning rate of a step counted from 0: a line up in the prefix, then warm-up and schedule over the rest."""
    prefix = config.prefix if isinstance(config, TrainConfig) else None
    before = 0 if prefix is None else prefix.steps
    if prefix is not None and step < before:
        return prefix.learning_rate * (step + 1) / before
    factor = learning_rate_factor(step - before, steps=config.horizon - before, config=config.optimizer)
    return config.optimizer.learning_rate * factor
