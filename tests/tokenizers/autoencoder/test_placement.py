"""Every pin gets a cell of its own, as near to its latent as those before it leave."""

import itertools

import pytest
import torch

from tokenkit.config import UserError
from tokenkit.tokenizers.autoencoder import placement
from tokenkit.tokenizers.autoencoder.network import AutoEncoder, NetworkConfig, symbols_of
from tokenkit.tokenizers.autoencoder.pins import PinTable
from tokenkit.tokenizers.autoencoder.placement import _outwards, place_pins


def network(levels=(5, 4, 3), mode="M", digit_order="msf") -> AutoEncoder:
    torch.manual_seed(0)
    config = NetworkConfig(
        max_bytes=4, levels=levels, hidden=32, byte_width=8, groups=2, mode=mode, digit_order=digit_order
    )
    return AutoEncoder(config).eval()


def table(count: int, length: int = 3) -> PinTable:
    words = [bytes(word) for word in itertools.islice(itertools.product(b"abcdefgh", repeat=length), count)]
    return PinTable(tuple(words), tuple(range(count, 0, -1)))


@pytest.mark.parametrize("mode", ["M", "P", "S"])
@pytest.mark.parametrize("digit_order", ["msf", "lsf"])
def test_each_pin_has_the_nearest_cell_that_is_free(mode, digit_order):
    net, pins = network(mode=mode, digit_order=digit_order), table(50)
    placed = place_pins(net, pins)
    assert placed.pieces == pins.pieces
    assert len(set(placed.digits)) == len(pins)
    quantizer = net.quantizer
    cells = list(itertools.product(*map(range, quantizer.levels)))
    low, high = (quantizer.dequantize(torch.full((3,), level)) for level in (0, 1))
    taken = set()
    with torch.no_grad():
        latents = net.latents(symbols_of(pins.pieces, 4))[:, 0]
    for latent, digits in zip(latents, placed.digits):
        where = ((quantizer.bounded(latent) - low) / (high - low)).tolist()
        away = {cell: sum(abs(a - b) for a, b in zip(cell, where)) for cell in cells if cell not in taken}
        assert away[tuple(digits)] == pytest.approx(min(away.values()), abs=1e-4)
        taken.add(tuple(digits))


def test_without_collisions_the_codes_are_the_networks():
    net, pins = network(levels=(8, 8, 8, 8)), table(20)
    with torch.no_grad():
        digits = net.digits(symbols_of(pins.pieces, 4))[:, 0]
    own = [bytes(row) for row in digits.tolist()]
    placed = place_pins(net, pins).digits
    first = [code not in own[:number] for number, code in enumerate(own)]
    assert all(a == b for a, b, free in zip(own, placed, first) if free)
    assert len(set(placed)) == len(pins)


def test_long_pins_start_where_their_first_bytes_are():
    net = network(levels=(8, 8, 8, 8))
    pins = PinTable((b"abcdefgh", b"xyz"), (2, 1))
    alone = PinTable((b"abcd",), (1,))
    assert place_pins(net, pins).digits[0] == place_pins(net, alone).digits[0]


def test_a_full_grid_and_a_grid_too_small():
    net = network()
    assert len(set(place_pins(net, table(60)).digits)) == 60
    with pytest.raises(UserError, match="61 of them, and the auto-encoder has 60 codes"):
        place_pins(net, table(61))
    assert place_pins(net, PinTable((), ())).digits == ()


def test_a_collapsed_network_still_places_all(monkeypatch):
    monkeypatch.setattr(placement, "MOST_PROBES", 20)
    net = network(levels=(8, 8, 8))
    with torch.no_grad():
        net.latent.weight.zero_()
    assert len(set(place_pins(net, table(300)).digits)) == 300


def test_outwards_is_sorted_and_complete():
    distances = torch.rand(3, 4, generator=torch.Generator().manual_seed(1)).tolist()
    distances = [[value - min(row) for value in row] for row in distances]
    cells = list(_outwards(distances))
    far = [sum(row[digit] for row, digit in zip(distances, cell)) for cell in cells]
    assert far == pytest.approx(sorted(far))
    assert {*map(tuple, cells)} == {*itertools.product(range(4), repeat=3)}


def test_digits_are_kept_in_the_file(tmp_path):
    placed = place_pins(network(), table(30))
    placed.save(tmp_path / "pins.bin")
    assert PinTable.load(tmp_path / "pins.bin") == placed
