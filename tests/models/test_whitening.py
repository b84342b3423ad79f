"""Whitening: identity covariance or a projector, at any scale and rank; statistics streamed, stored and read once."""

import itertools
import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenkit.config import UserError
from tokenkit.models.statistics import load_moments, measure, teacher_statistics, weights_fingerprint
from tokenkit.models.whitening import Moments, whitening_matrix

KINDS = ["zca", "pca", "cholesky"]


def rows(count: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Correlated rows with another mean and spread in every channel."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    values = torch.randn(count, width, generator=generator, dtype=torch.float64) @ mixing
    return (values * torch.linspace(0.5, 3, width) + torch.linspace(-5, 5, width)).to(dtype)


def whitened(x: torch.Tensor, kind: str, **options: float) -> torch.Tensor:
    moments = Moments.of(x)
    matrix = whitening_matrix(moments, kind, **options)
    return (x - moments.mean.to(x.dtype)) @ matrix.to(x.dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_covariance_is_the_identity_where_the_rank_is_full(kind, dtype):
    y = whitened(rows(2000, 24, dtype=dtype), kind)
    assert y.mean(0).abs().max() < 1e-4
    assert (torch.cov(y.T) - torch.eye(24, dtype=dtype)).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_covariance_is_a_projector_where_it_is_not(kind):
    x = torch.randn(800, 800, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for epsilon in (1e-5, 1e-10):
        values = torch.linalg.eigvalsh(torch.cov(whitened(x, kind, relative_epsilon=epsilon).T))
        kept = int((values > 0.5).sum())
        assert 780 <= kept <= 799
        assert (values[800 - kept :] - 1).abs().max() < 1e-3
        assert values[: 800 - kept].abs().max() < 1e-3
    assert kept == 799  # at 1e-10 nothing is lost but the mean


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_rows_than_channels(kind):
    y = whitened(rows(7, 20), kind)
    values = torch.linalg.eigvalsh(torch.cov(y.T))
    assert torch.allclose(values, torch.cat([torch.zeros(14), torch.ones(6)]).double(), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-10, 1e-4, 1e6])
def test_scale_does_not_matter(kind, scale):
    x = rows(500, 16)
    assert torch.allclose(whitened(x * scale, kind), whitened(x, kind), rtol=1e-7, atol=1e-9)


def test_each_kind_is_what_it_is_called():
    moments = Moments.of(rows(400, 12))
    zca, pca, cholesky = (whitening_matrix(moments, kind) for kind in KINDS)
    assert torch.allclose(zca, zca.T)
    assert (torch.linalg.eigvalsh(zca) > 0).all()
    spread = (pca.T @ moments.covariance() @ moments.covariance() @ pca).diagonal()
    assert (spread.diff() < 0).all()  # the strongest direction first
    lower = torch.linalg.cholesky(moments.covariance())
    assert torch.allclose(cholesky, torch.linalg.inv(lower).T, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_comes_out_finite_by_statistics_of_double_precision(kind):
    x = rows(300, 16, dtype=torch.bfloat16)
    moments = Moments.of(x)
    assert moments.mean.dtype == moments.scatter.dtype == torch.float64
    assert torch.allclose(moments.covariance(), torch.cov(x.double().T))
    y = whitened(x.float(), kind)
    assert y.isfinite().all()
    assert (torch.cov(y.T) - torch.eye(16)).abs().max() < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_repeated_eigenvalues_leave_gradients_finite(kind):
    basis = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64))[0]
    x = torch.cat([basis, -basis, torch.zeros(1, 8, dtype=torch.float64)]).requires_grad_()  # covariance 2/16 I
    values = torch.linalg.eigvalsh(Moments.of(x).covariance())
    assert values.max() - values.min() < 1e-12
    y = whitened(x, kind)
    assert not whitening_matrix(Moments.of(x), kind).requires_grad
    y.pow(3).sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0


def test_a_constant_is_dropped_and_not_divided_by():
    x = rows(100, 6)
    x[:, 2] = 7.0
    for kind in KINDS:
        y = whitened(x, kind)
        assert torch.linalg.matrix_rank(torch.cov(y.T)) == 5
        assert y.isfinite().all()
        assert torch.equal(whitened(torch.ones(10, 4).double(), kind), torch.zeros(10, 4).double())


def test_shrinkage_goes_from_the_covariance_to_a_multiple_of_the_identity():
    moments = Moments.of(rows(50, 6))
    whole = whitening_matrix(moments, "zca", shrinkage=1.0)
    assert torch.allclose(whole, torch.eye(6).double() / moments.covariance().diagonal().mean().sqrt())
    covariance = moments.covariance()
    mixed = 0.7 * covariance + 0.3 * covariance.diagonal().mean() * torch.eye(6).double()
    matrix = whitening_matrix(moments, "zca", shrinkage=0.3)
    assert torch.allclose(matrix @ mixed @ matrix, torch.eye(6).double(), atol=1e-9)
    few = whitening_matrix(Moments.of(rows(4, 6)), "pca", shrinkage=0.3)
    assert torch.linalg.matrix_rank(few) == 6  # what is mixed in has full rank


def test_the_same_numbers_give_the_same_bits():
    x = rows(300, 16)
    for kind in KINDS:
        assert torch.equal(whitening_matrix(Moments.of(x), kind), whitening_matrix(Moments.of(x.clone()), kind))


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 200), max_size=6), order=st.randoms(use_true_random=False))
def test_streamed_moments_are_those_of_all_rows_at_once(cuts, order):
    x = rows(200, 5) + 1e3
    edges = [0, *sorted(cuts), 200]
    pieces = [x[a:b] for a, b in itertools.pairwise(edges)]
    order.shuffle(pieces)
    found = Moments.empty(5)
    for piece in pieces:
        found = found.merged(Moments.of(piece))
    assert found.count == 200
    assert torch.allclose(found.mean, x.mean(0), rtol=1e-12)
    assert torch.allclose(found.covariance(), torch.cov(x.T), rtol=1e-9, atol=1e-9)


def test_streaming_in_single_precision_agrees_to_1e_5():
    x = rows(1000, 12, dtype=torch.float32)
    streamed = measure([(part.view(1, -1, 1, 12), torch.ones(1, len(part)).bool()) for part in x.split(130)], 1)[0]
    for kind in KINDS:
        a, b = whitening_matrix(streamed, kind), whitening_matrix(Moments.of(x), kind)
        assert (a - b).abs().max() < 1e-5


# teacher statistics, stored


class Reader:
    """Batches of a teacher's states, and how often and for which layers they were asked for."""

    def __init__(self):
        self.states = torch.stack([rows(60, 6, seed).view(3, 20, 6) for seed in range(4)], 2)
        self.mask = torch.arange(20).expand(3, 20) < torch.tensor([[20], [11], [5]])
        self.asked: list[list[int]] = []

    def __call__(self, layers: list[int]):
        self.asked.append(layers)
        for row, mask in zip(self.states, self.mask, strict=True):
            yield row[None, :, layers], mask[None]


IDENTITY = {"teacher": "abc", "data": "def", "of": "block"}


def test_statistics_are_measured_once(tmp_path):
    read = Reader()
    first = teacher_statistics(tmp_path, IDENTITY, [3, 1, 3], read)
    assert read.asked == [[3, 1]]
    for layer, moments in zip([3, 1, 3], first, strict=True):
        expected = Moments.of(read.states[:, :, layer], read.mask)
        assert moments.count == 36
        assert torch.allclose(moments.mean, expected.mean)
        assert torch.allclose(moments.scatter, expected.scatter)
    second = teacher_statistics(tmp_path, IDENTITY, [3, 1, 3], read)
    assert read.asked == [[3, 1]]  # zero passes
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.mean, b.mean)
        assert torch.equal(a.scatter, b.scatter)


def test_only_layers_that_nobody_measured_are_read(tmp_path):
    read = Reader()
    teacher_statistics(tmp_path, IDENTITY, [1], read)
    teacher_statistics(tmp_path, IDENTITY, [0, 1, 2], read)
    assert read.asked == [[1], [0, 2]]


@pytest.mark.parametrize("key", IDENTITY)
def test_another_teacher_or_text_is_measured_anew(tmp_path, key):
    read = Reader()
    teacher_statistics(tmp_path, IDENTITY, [1], read)
    teacher_statistics(tmp_path, {**IDENTITY, key: "other"}, [1], read)
    assert len(read.asked) == 2


def test_a_run_that_dies_while_it_measures_leaves_nothing_behind(tmp_path):
    def read(layers):
        yield torch.ones(1, 4, 1, 6), torch.ones(1, 4).bool()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        teacher_statistics(tmp_path, IDENTITY, [1], read)
    assert list(tmp_path.iterdir()) == []
    teacher_statistics(tmp_path, IDENTITY, [1], Reader())
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_damaged_and_strange_files_are_refused(tmp_path):
    teacher_statistics(tmp_path, IDENTITY, [1], Reader())
    path = next(tmp_path.iterdir())
    size = struct.unpack("<Q", path.read_bytes()[:8])[0]
    about = json.loads(json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]["tokenkit"])
    assert about == {"schema": 1, "count": 36, "identity": {**IDENTITY, "layer": 1}}
    with pytest.raises(UserError, match="measured of another teacher, layer or text; delete it"):
        load_moments(path, {**IDENTITY, "layer": 2})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match="not a file of statistics"):
        teacher_statistics(tmp_path, IDENTITY, [1], Reader())


def test_too_little_text_is_refused(tmp_path):
    with pytest.raises(UserError, match="two positions of text at least"):
        teacher_statistics(tmp_path, IDENTITY, [1], lambda layers: [])


def test_the_fingerprint_of_weights_follows_every_bit_and_nothing_else():
    def model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).to(dtype)

    first, changed, renamed = model(), model(), torch.nn.Sequential(torch.nn.Identity(), *model())
    assert weights_fingerprint(first) == weights_fingerprint(model())
    assert weights_fingerprint(model(torch.bfloat16)) != weights_fingerprint(first)
    assert weights_fingerprint(renamed) != weights_fingerprint(first)
    with torch.no_grad():
        changed[0].bias[2] += 1e-7
    assert weights_fingerprint(changed) != weights_fingerprint(first)
