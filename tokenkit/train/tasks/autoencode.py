"""Chunks in, named tensors out: an auto-encoder that says them again through quantised codes."""

import copy
import logging
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokenkit.data.batch import Batch
from tokenkit.data.chunk_batches import ChunkBatches
from tokenkit.eval.reconstruction import failing
from tokenkit.objective import Objective
from tokenkit.tokenizers.autoencoder.network import AutoEncoder
from tokenkit.train.parallel import several, total
from tokenkit.train.scaler import Precision, autocast

log = logging.getLogger(__name__)
USED_LEVELS = 0.5  # of every digit, over a batch, before the first step
LEAST_MASS = 0.25  # of what a level would have if all had the same
SATURATED, MOST_SATURATED = 0.99, 0.2  # bounded values beyond this, and the share of them that is too many
ALARM_EVERY = 100  # steps
BAD_LOOKS = 2  # in a row before anybody is told
LOOKED_AT = 8  # steps before each look
ENOUGH = 512  # chunks: of fewer it cannot be told whether a level is rare
SHARES_DECAY = 0.95  # part of the running shares of the levels that a step leaves
BEGINNING = 1024  # chunks that the latents are scaled to


class AutoencodeTask:
    """An auto-encoder, the average of its weights, and an eye on how its codes are used."""

    def __init__(
        self,
        network: AutoEncoder,
        objective: Objective,
        batches: ChunkBatches,
        *,
        precision: Precision = "float32",
        ema_decay: float = 0.999,
    ):
        """`ema_decay` is the share of the average that a step leaves; early steps leave less."""
        self.network, self.objective, self.batches = network, objective, batches
        self.precision, self.ema_decay = precision, ema_decay
        self.average = copy.deepcopy(network).requires_grad_(False).eval()
        self.pair: Mapping[str, Tensor] = {}
        levels = network.quantizer.levels
        self._levels = torch.tensor(levels).repeat(network.groups)
        self._shares: Float[Tensor, "D K"] = torch.ones(len(self._levels), max(levels))
        top = torch.tensor(levels, device=self.device) - 1
        lowest, highest = network.quantizer.dequantize(torch.stack([torch.zeros_like(top), top]))
        self._lowest, self._step = lowest, (highest - lowest) / top
        self._latents: list[Tensor] = []  # of the step at hand
        self._recent: list[Tensor] = []
        self._looks: dict[str, int] = {}

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.network.latent.weight.device

    def begin(self) -> None:
        """Scales the latents to the first batches, before anything is learnt, and looks at how they use the codes."""
        first = [self.batches.at(step)[0] for step in range(-(-BEGINNING // self.batches.batch_size))]
        symbols = torch.cat([batch.tensors["symbols"] for batch in first]).to(self.device)
        self.network.scale_latents(symbols)
        self.average.load_state_dict(self.network.state_dict())
        with torch.no_grad():
            digits = self.network.digits(symbols)
        for place in unused(digits, self.network.quantizer.levels):
            log.warning("the codes are hardly used before the first step: %s; look at the network's shape", place)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters of the network, by name; the table that both halves share once."""
        return dict(self.network.named_parameters())

    def modules(self) -> list[nn.Module]:
        """The network."""
        return [self.network]

    def last_layer(self) -> list[nn.Parameter]:
        """The last matrix of the decoder, with its bias."""
        matrices = (nn.Linear, nn.Conv1d, nn.ConvTranspose1d)
        last = [module for module in self.network.decoder.modules() if isinstance(module, matrices)][-1]
        return list(last.parameters())

    def train_mode(self, on: bool) -> None:
        """Training, or evaluation."""
        self.network.train(on)

    def teacher_tensors(self, batch: Batch) -> dict[str, Tensor]:
        """Nothing: the chunk itself is the teacher."""
        return {}

    def student_tensors(
        self, batch: Batch, teacher: Mapping[str, Tensor], means: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Logits of the reconstruction, and latents."""
        with autocast(self.device, self.precision):
            logits, latents, _ = self.network(batch.tensors["symbols"], batch.tensors["kept"])
        self._latents.append(latents.detach())
        return {
            "student_byte_logits": logits,
            "student_latents": latents.flatten(1),
            "student_cells": self._cells(latents).flatten(1),
            "student_level_shares": self._extended(),
        }

    def gradients_ready(self, step: int) -> None:
        """Nothing: all of the network is trained at every step."""

    @torch.no_grad()
    def stepped(self, step: int, steps: int) -> None:
        """Moves the average, looks at the codes, and from half of the run on searches chunks that fail."""
        decay = min(self.ema_decay, step / (step + 10))
        for average, own in zip(self.average.parameters(), self.network.parameters()):
            average.lerp_(own, 1 - decay)
        if self._latents:
            self._look(torch.cat(self._latents), step)
            self._latents = []
        draw = self.batches.draw
        if draw.mined_weight > 1 and step % draw.mine_every == 0 and steps / 2 <= step < steps:
            self.mine(step)

    def _look(self, latents: Float[Tensor, "B G d"], step: int) -> None:
        """Moves the running shares of the levels, and warns of codes that are used badly."""
        digits = self.network.quantizer.digits(latents).flatten(1)
        counts = torch.nn.functional.one_hot(digits, self._shares.shape[1]).float().mean(0)
        if several():
            counts = total(counts * len(digits)) / total(torch.tensor(float(len(digits)), device=counts.device))
        shares = counts * self._levels.unsqueeze(1).to(counts)
        self._shares = self._shares.to(shares).lerp(shares, 1 - SHARES_DECAY)
        self._recent = [*self._recent[1 - LOOKED_AT :], latents]
        if step % ALARM_EVERY == 0 and sum(map(len, self._recent)) >= ENOUGH:
            self._warn(torch.cat(self._recent))

    def mine(self, step: int) -> None:
        """Lets the batches draw more often what the average of the weights gets wrong in its shortest spelling."""
        rows = self.batches.candidates(step)
        symbols = torch.from_numpy(self.batches.symbols[rows]).long()
        self.batches.mine(rows[failing(self.average, symbols, self.network.config.min_groups)])

    def state(self) -> dict[str, Tensor]:
        """The average of the weights, and the running shares of the levels."""
        averaged = {f"ema.{name}": tensor for name, tensor in self.average.state_dict().items()}
        return {**averaged, "shares": self._shares}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts back what `state` gave."""
        self._shares = tensors["shares"].to(self.device)
        averaged = {name.removeprefix("ema."): t for name, t in tensors.items() if name.startswith("ema.")}
        self.average.load_state_dict(averaged)

    def _warn(self, latents: Float[Tensor, "B G d"]) -> None:
        quantizer = self.network.quantizer
        found = {
            "rare level": rare(quantizer.digits(latents), quantizer.levels),
            "saturation": saturated(self._bounded(latents)),
        }
        for kind, place in found.items():
            self._looks[kind] = self._looks.get(kind, 0) + 1 if place else 0
            if self._looks[kind] == BAD_LOOKS:
                log.warning(
                    "the codes are used badly: %s; raise losses.crowded_levels or lower the learning rate", place
                )

    def _cells(self, latents: Float[Tensor, "B G d"]) -> Float[Tensor, "B G d"]:
        """Bounded latents in cells: a whole number is the middle of a level, 0 that of the lowest."""
        bounded = self.network.quantizer.bounded(latents)
        return (bounded - self._lowest.to(bounded)) / self._step.to(bounded)

    def _extended(self) -> Float[Tensor, "D K"]:
        """The shares, continued beyond the last level of digits that have fewer: there too something draws inwards."""
        shares, rows = self._shares.to(self.device).clone(), torch.arange(len(self._levels))
        top = self._levels - 1
        slope = shares[rows, top] - shares[rows, top - 1]
        beyond = (torch.arange(shares.shape[1]) - top.unsqueeze(1)).clamp_min(0).to(shares)
        filled = shares[rows, top].unsqueeze(1) + slope.unsqueeze(1) * beyond
        return torch.where(beyond > 0, filled, shares)

    def _bounded(self, latents: Float[Tensor, "B G d"]) -> Float[Tensor, "B G d"]:
        scale = 1.0 if self.network.quantizer.mode != "C" else max(self.network.quantizer.levels) / 2
        return self.network.quantizer.bounded(latents) / scale


def unused(digits: Int[Tensor, "B G d"], levels: list[int]) -> list[str]:
    """The digits that take fewer than half of their levels over a batch."""
    found = []
    for group, place, taken in _digits(digits, levels):
        if (taken > 0).sum() < USED_LEVELS * len(taken):
            found.append(f"digit {place} of group {group} takes {int((taken > 0).sum())} of {len(taken)} levels")
    return found


def rare(digits: Int[Tensor, "B G d"], levels: list[int]) -> str | None:
    """The level that has the least mass over a batch, where that is under a quarter of its even share."""
    shares = [(float(n.min() * len(n) / n.sum()), group, place) for group, place, n in _digits(digits, levels)]
    share, group, place = min(shares)
    if share >= LEAST_MASS:
        return None
    return f"a level of digit {place} of group {group} has {share:.0%} of its even share"


def saturated(bounded: Float[Tensor, "B G d"]) -> str | None:
    """The share of bounded values near the ends, where that is more than a fifth."""
    share = float((bounded.abs() > SATURATED).double().mean())
    return f"{share:.0%} of the bounded values are beyond {SATURATED}" if share > MOST_SATURATED else None


def _digits(digits: Int[Tensor, "B G d"], levels: list[int]) -> list[tuple[int, int, Tensor]]:
    """How often every level of every digit occurs."""
    return [
        (group, place, torch.bincount(digits[:, group, place], minlength=level))
        for group in range(digits.shape[1])
        for place, level in enumerate(levels)
    ]
