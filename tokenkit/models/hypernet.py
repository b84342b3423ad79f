"""A hypernetwork: the embedding row of a token made of the rows of the pieces that spell it.

Minixhofer+ 2024, 2405.07883 (zero-shot tokenizer transfer). What it predicts is added to the mean of the pieces' rows,
or to the first of them, and is exactly zero before anything is learnt: it begins as fast vocabulary transfer does.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenkit.config import UserError
from tokenkit.models.hypernet_layers import HypernetConfig, Network, pooled
from tokenkit.models.load import head_matrix, input_matrix
from tokenkit.tokenizers.whole_file import write_whole

FILE = "hypernet.safetensors"
NUM_BYTES = 256
SMALLEST_DEVIATION = 1e-6  # a channel in which all rows are alike tells nothing, and must not be blown up
Gather = Callable[[Int[Tensor, "N"]], Float[Tensor, "N K D"]]


class Hypernet(nn.Module):
    """Rows of a token in `matrices` embedding matrices (1 where input and head are one) from those of its pieces."""

    def __init__(self, config: HypernetConfig, *, width: int, matrices: int = 1, seed: int = 0):
        """`width` channels a row; UserError where the heads do not fit them. Weights are drawn from the seed."""
        super().__init__()
        self.config, self.width, self.matrices = config, width, matrices
        channels = width * matrices if config.shared else width
        hidden = channels if config.multiply_hidden_dim_by_num_embeddings else width
        if config.attends and hidden % config.num_heads:
            raise UserError(f"hypernet.num_heads: {config.num_heads} do not divide {hidden} channels; write a divisor")
        learnt = config.architecture != "identity"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            count = (1 if config.shared else matrices) if learnt else 0
            self.networks = nn.ModuleList(Network(config, channels, hidden) for _ in range(count))
            self.byte_rows = nn.Parameter(torch.randn(NUM_BYTES, matrices, width))
        self.register_buffer("mean", torch.zeros(matrices, width))
        self.register_buffer("deviation", torch.ones(matrices, width))

    @torch.no_grad()
    def scale_to(self, mean: Float[Tensor, "K D"], deviation: Float[Tensor, "K D"]) -> None:
        """Measures rows in these statistics of the whole vocabulary, and draws the rows of bytes with them."""
        self.mean.copy_(mean)
        self.deviation.copy_(deviation.clamp_min(SMALLEST_DEVIATION))
        self.byte_rows.mul_(self.deviation).add_(self.mean)

    def forward(self, pieces: Float[Tensor, "N L K D"], lengths: Int[Tensor, "N"]) -> Float[Tensor, "N K D"]:
        """Rows of tokens from the rows of their pieces; places from `lengths` (at least 1) on are not looked at."""
        pieces = pieces[:, : self.config.max_seq_length]
        lengths = lengths.clamp_max(pieces.shape[1])
        own = self._own(pieces, lengths)
        if not self.networks:
            return own
        scaled = (pieces - self.mean) / self.deviation
        if self.config.shared:
            added = self.networks[0](scaled.flatten(2), lengths).unflatten(1, (self.matrices, self.width))
        else:
            added = torch.stack([net(scaled[:, :, k], lengths) for k, net in enumerate(self.networks)], 1)
        return own + added * (self.config.residual_alpha / math.sqrt(self.width) * self.deviation)

    def rows(self, gather: Gather, forms: Int[Tensor, "N L"], lengths: Int[Tensor, "N"]) -> Float[Tensor, "N K D"]:
        """Rows of tokens from the ids of their pieces, tokens of one length together: nothing is computed for padding.

        `gather` gives the rows of ids of the source.
        """
        lengths = lengths.clamp_max(self.config.max_seq_length)
        if len(lengths) == 0:  # no row, and yet a gradient of 0 for the network
            return self(gather(lengths.new_zeros(1)).unsqueeze(0), lengths.new_ones(1))[:0]
        found, order = [], []
        for length in lengths.unique().tolist():
            chosen = (lengths == length).nonzero()[:, 0]
            pieces = gather(forms[chosen, :length].flatten()).unflatten(0, (len(chosen), length))
            found.append(self(pieces, lengths[chosen]))
            order.append(chosen)
        return torch.cat(found)[torch.cat(order).argsort()]

    def _own(self, pieces: Float[Tensor, "N L K D"], lengths: Int[Tensor, "N"]) -> Float[Tensor, "N K D"]:
        if not self.config.residual:
            return self.mean.expand(len(pieces), -1, -1)
        inside = torch.arange(pieces.shape[1], device=pieces.device) < lengths[:, None]
        rows = pooled(pieces.flatten(2), inside, self.config.residual_pooling)
        return rows.unflatten(1, (self.matrices, self.width))

    def save(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Writes one safetensors file, shape and `facts` (what it was trained for) as JSON in its header."""
        shape = {"config": self.config.model_dump(), "width": self.width, "matrices": self.matrices}
        header = {"hypernet": json.dumps({**shape, "facts": dict(facts)})}  # one key: their order is random
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_whole(path, save(tensors, header))

    @classmethod
    def load(cls, path: Path) -> tuple["Hypernet", dict[str, Any]]:
        """What `save` wrote, and its facts; UserError for anything else. A run folder stands for the file inside."""
        file = path / FILE if path.is_dir() else path
        try:
            with safe_open(file, "pt") as opened:
                shape = json.loads(opened.metadata()["hypernet"])
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no mapping)
            config = HypernetConfig.model_validate(shape["config"])
            made = cls(config, width=shape["width"], matrices=shape["matrices"])
            made.load_state_dict(tensors)
        except FileNotFoundError:
            raise UserError(f"{file}: no such file; write the folder of a finished `tokenkit train-hypernet`") from None
        except (SafetensorError, ValidationError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{file}: not a hypernetwork that can be read ({reason}); train it again") from None
        return made.eval().requires_grad_(False), shape["facts"]


def matrices_of(model: PreTrainedModel) -> list[Float[Tensor, "V D"]]:
    """Input and output matrix of a model, with gradients where they are trained; one where they are one."""
    table, head = input_matrix(model), head_matrix(model)
    return [table] if head is table else [table, head]


@torch.no_grad()
def hypernet_for(config: HypernetConfig, model: PreTrainedModel, vocab_size: int, *, seed: int) -> Hypernet:
    """An untrained network for the matrices of a model, measured in all of their first `vocab_size` rows."""
    rows = [matrix.detach()[:vocab_size].double() for matrix in matrices_of(model)]
    made = Hypernet(config, width=rows[0].shape[1], matrices=len(rows), seed=seed)
    mean = torch.stack([matrix.mean(0) for matrix in rows])
    made.scale_to(mean.float().cpu(), torch.stack([matrix.std(0, correction=0) for matrix in rows]).float().cpu())
    return made.to(model.device)


def made_tables(model: PreTrainedModel, network: Hypernet) -> dict[str, Float[Tensor, "V D"]]:
    """What a network makes of each row of a model's matrices by itself: input and output table."""
    rows = torch.stack(matrices_of(model), 1)[:, None]
    made = network(rows, torch.ones(len(rows), dtype=torch.long, device=rows.device))
    return {"input": made[:, 0], "head": made[:, -1]}


@torch.no_grad()
def put_rows(model: PreTrainedModel, network: Hypernet) -> None:
    """Puts what a network makes of a model's matrices in their place."""
    made = made_tables(model, network)
    for matrix, name in zip(matrices_of(model), ("input", "head")):
        matrix.copy_(made[name])
