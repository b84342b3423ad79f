"""The search for planted tokens: planted ones come first, honest ones are let be, and blocks change nothing."""

import numpy as np
import pytest
import torch

from tokenkit.eval import breakers
from tokenkit.eval.breakers import Reading, coefficients, override_lines, search_breakers
from tokenkit.scores import LogitForm
from tokenkit.transfer.mixture import pieces_mixture
from tokenkit.transfer.plan import plan_transfer
from tokenkit.transfer.rows import TensorRows

WIDTH, ANCHORS, NEW, PLACES = 32, 200, 60, 150


class Pair:
    """A base and a donor over one vocabulary: anchors first, then new tokens, which are sums of anchors in both."""

    def __init__(self, seed, plant=None, form=None):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator)

        self.hidden = draw(PLACES, WIDTH) + 0.7, draw(PLACES, WIDTH) - 0.4
        self.anchors = draw(ANCHORS, WIDTH), draw(ANCHORS, WIDTH)
        weights = torch.zeros(NEW, ANCHORS)
        for row in range(NEW):
            weights[row, torch.randperm(ANCHORS, generator=generator)[:12]] = draw(12) / 12**0.5
        if plant is not None:
            weights[plant] = self.forged()
        self.rows = [torch.cat([anchors, weights @ anchors]) for anchors in self.anchors]
        self.readings = [Reading(h, TensorRows(r), form or LogitForm()) for h, r in zip(self.hidden, self.rows)]
        self.ids, self.trusted = np.arange(ANCHORS, ANCHORS + NEW), np.arange(ANCHORS)
        self.labels = np.arange(PLACES) % ANCHORS

    def forged(self):
        """Weights that give nothing in the donor, and in the base what the mean context is looking for."""
        base, donor = self.anchors
        aim = 6 * self.hidden[0].mean(0)
        equations = torch.cat([base.T, donor.T])  # underdetermined: 2 x WIDTH equations, ANCHORS weights
        return torch.linalg.lstsq(equations, torch.cat([aim, torch.zeros(WIDTH)])[:, None]).solution[:, 0]

    def search(self, **options):
        return search_breakers(*self.readings, self.ids, self.trusted, self.labels, **options)


@pytest.mark.parametrize("seed", range(5))
def test_a_planted_row_comes_first_and_is_flagged_alone(seed):
    plant = 7 * seed
    pair = Pair(seed, plant)
    found = pair.search()
    victim = ANCHORS + plant
    assert float(pair.rows[1][victim].norm()) < 1e-3  # inert in the donor
    assert found.rank(victim) == 1
    assert victim in found.flagged
    assert found.score[plant] > 0.5
    assert found.base.wins[plant] > PLACES / 2
    assert found.other.wins[plant] == 0
    honest = Pair(seed).search()
    assert victim not in honest.flagged
    assert set(honest.flagged) == set(found.flagged) - {victim}


def test_the_same_model_on_both_sides_takes_nothing():
    pair = Pair(1, plant=3)
    pair.readings[1] = pair.readings[0]
    found = pair.search()
    assert (found.score == 0).all()
    assert len(found.flagged) == 0


def test_what_is_loud_in_the_donor_too_is_no_planted_row():
    pair = Pair(2, plant=3)
    pair.rows[1][ANCHORS + 3] = 6 * pair.hidden[1].mean(0)
    assert ANCHORS + 3 not in pair.search().flagged


def test_places_that_the_token_follows_do_not_count():
    pair = Pair(3, plant=3)
    pair.labels[:] = ANCHORS + 3
    found = pair.search()
    assert found.base.wins[3] == 0
    assert found.base.taken[3] == 0


FORMS = [LogitForm(), LogitForm(torch.linspace(-1, 1, ANCHORS + NEW), 0.3, 4.0)]


@pytest.mark.parametrize("form", FORMS, ids=["plain", "shifted, scaled, capped"])
@pytest.mark.parametrize("tile", [1, 17, 1000])
def test_blocks_and_forms_give_what_the_whole_table_gives(monkeypatch, form, tile):
    pair = Pair(4, plant=5, form=form)
    monkeypatch.setattr(breakers, "TILE_BYTES", 4 * PLACES * tile)
    found = pair.search()
    for side, hidden, rows in zip((found.base, found.other), pair.hidden, pair.rows):
        logits = form(hidden @ rows.T)
        for place, i in enumerate(pair.ids.tolist()):
            among = torch.cat([logits[:, :ANCHORS], logits[:, i : i + 1]], 1)
            apart = torch.from_numpy(pair.labels != i)
            taken = among.softmax(1)[apart, -1].mean()
            np.testing.assert_allclose(side.taken[place], float(taken), rtol=1e-4, atol=1e-7)
            assert side.wins[place] == int((among[apart, -1] > among[apart, :-1].amax(1)).sum())


def test_coefficients_are_those_of_the_mixture(bpe, unigram):
    plan = plan_transfer(bpe, unigram, source_rows=bpe.vocab_size)
    rows = TensorRows(torch.randn(bpe.vocab_size, 4, generator=torch.Generator().manual_seed(0)))
    mixture = pieces_mixture(rows, plan, "input")
    several = int(plan.lengths.argmax())
    count = int(plan.lengths[several])
    made = coefficients(mixture, several)
    assert count > 1
    assert (made.sources, round(made.absolute, 5), round(made.largest_share, 5)) == (count, 1.0, round(1 / count, 5))
    loud = mixture.replaced(
        np.array([several]), np.array([2]), np.array([3, 4], np.int32), np.array([-9, 8], np.float32)
    )
    assert coefficients(loud, several).absolute == 17


def test_override_lines_name_tokens_that_are_text(bpe, unigram):
    """Pasted into a transfer, they make the token of its pieces."""
    lines, lost = override_lines([b" cat", b"\xff", b"x"])
    assert (lines, lost) == ({" cat": " cat", "x": "x"}, 1)
    plan = plan_transfer(bpe, unigram, source_rows=bpe.vocab_size)
    free = [i for i in plan.free.tolist() if unigram.token_bytes[i].isascii()]
    lines, _ = override_lines([unigram.token_bytes[free[0]]])
    again = plan_transfer(bpe, unigram, source_rows=bpe.vocab_size, override=lines)
    assert free[0] not in again.free
    part = slice(int(again.offsets[free[0]]), int(again.offsets[free[0] + 1]))
    assert b"".join(bpe.token_bytes[i] for i in again.pieces[part]) == unigram.token_bytes[free[0]]
