"""Where pins lie on the grid: each near its own code of the first group, no two in one cell."""

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokenkit.config import UserError
from tokenkit.tokenizers.autoencoder.chunkers import cut
from tokenkit.tokenizers.autoencoder.network import AutoEncoder, symbols_of
from tokenkit.tokenizers.autoencoder.pins import PinTable
from tokenkit.tokenizers.autoencoder.quantizer import FSQLayer

MOST_PROBES = 4096  # cells that are looked at for one pin
BATCH = 2048


def place_pins(network: AutoEncoder, pins: PinTable) -> PinTable:
    """The table with a code of one group for every pin, all different; UserError where there are fewer codes than pins.

    The most frequent pins choose first. Whoever finds its cell taken gets the free one nearest to its latent, the sum
    of the distances along the digits counting; where 4096 cells around it are taken, the first free code of all.
    """
    quantizer = network.quantizer
    if len(pins) > quantizer.total_vocab_size:
        raise UserError(
            f"pins: {len(pins):,} of them, and the auto-encoder has {quantizer.total_vocab_size:,} codes; pin fewer"
        )
    if not len(pins):
        return replace(pins, digits=())
    digits, distances = _wishes(network, pins.pieces)
    index = quantizer.code_to_token_id(digits).tolist()
    steps, anywhere = _steps(quantizer), itertools.count()
    taken: set[int] = set()
    crowded: set[int] = set()  # codes around which no cell is left, so a collapsed network is not searched for ever
    for pin, wish in enumerate(index):
        if wish in taken:
            own = [row[:levels] for row, levels in zip(distances[pin].tolist(), quantizer.levels)]
            found = None if wish in crowded else _nearest_free(own, steps, taken)
            if found is None:
                crowded.add(wish)
                found = next(code for code in anywhere if code not in taken)
            index[pin] = found
        taken.add(index[pin])
    placed = quantizer.token_id_to_code(torch.tensor(index)).to(torch.uint8)
    return replace(pins, digits=tuple(bytes(row) for row in placed.tolist()))


@torch.inference_mode()
def _wishes(network: AutoEncoder, pieces: Sequence[bytes]) -> tuple[Int[Tensor, "P d"], Float[Tensor, "P d L"]]:
    """The digits of every pin's first group, and how far its latent is from each cell along each digit, in cell widths.

    Distances count from the cell of the digits, which is the nearest or as near as the nearest.
    """
    longest, quantizer = network.max_bytes, network.quantizer
    first = [piece if len(piece) <= longest else cut(piece, longest)[0] for piece in pieces]
    batches = [first[start : start + BATCH] for start in range(0, len(first), BATCH)]
    device = network.latent.weight.device
    latents = torch.cat([network.latents(symbols_of(batch, longest).to(device))[:, 0].cpu() for batch in batches])
    on_cpu = quantizer.__class__(**quantizer.state())
    digits = on_cpu.digits(latents)
    zero, one = (on_cpu.dequantize(torch.full((len(quantizer.levels),), level)) for level in (0, 1))
    cell = (on_cpu.bounded(latents) - zero) / (one - zero)
    away = (cell.unsqueeze(-1) - torch.arange(max(quantizer.levels))).abs()
    own = away.gather(-1, digits.unsqueeze(-1))
    return digits, (away - own).clamp_min(0)


def _steps(quantizer: FSQLayer) -> list[int]:
    """What one step of every digit adds to the integer of a code."""
    units = torch.eye(quantizer.num_dimensions, dtype=torch.long)
    return quantizer.code_to_token_id(units).tolist()


def _nearest_free(distances: list[list[float]], steps: list[int], taken: set[int]) -> int | None:
    """The integer of the nearest code that is free; None where the nearest 4096 are taken."""
    cells = itertools.islice(_outwards(distances), MOST_PROBES)
    codes = (sum(digit * step for digit, step in zip(digits, steps)) for digits in cells)
    return next((code for code in codes if code not in taken), None)


def _outwards(distances: list[list[float]]) -> Iterator[list[int]]:
    """All cells as lists of digits, by increasing sum of their distances along the digits; each once."""
    ranked = [sorted(range(len(row)), key=row.__getitem__) for row in distances]
    heap: list[tuple[float, tuple[int, ...], int]] = [(0.0, (0,) * len(distances), 0)]
    while heap:
        far, ranks, last = heapq.heappop(heap)
        yield [order[rank] for order, rank in zip(ranked, ranks)]
        for place in range(last, len(ranks)):  # digits move away in order of place: no cell is reached twice
            rank = ranks[place]
            if rank + 1 < len(ranked[place]):
                row, order = distances[place], ranked[place]
                step = row[order[rank + 1]] - row[order[rank]]
                heapq.heappush(heap, (far + step, (*ranks[:place], rank + 1, *ranks[place + 1 :]), place))
