"""A hypernetwork begins as nothing at all, sees pieces and not padding, and comes back from disk as it was."""

import itertools

import pytest
import torch
from torch import Tensor

from tokenkit.config import UserError
from tokenkit.models.hypernet import FILE, Hypernet, hypernet_for, made_tables, matrices_of, put_rows
from tokenkit.models.hypernet_layers import HypernetConfig
from tokenkit.models.load import load_model
from tokenkit.models.view import ModelView

WIDTH, LONGEST = 8, 5
ARCHITECTURES = ("transformer", "mlp", "linear")


def config(**changes: object) -> HypernetConfig:
    return HypernetConfig.model_validate({"num_heads": 2, "max_seq_length": LONGEST, **changes})


def tokens(matrices: int = 1) -> tuple[Tensor, Tensor]:
    """Pieces of eleven tokens of every length, and numbers where there are none that must not matter."""
    generator = torch.Generator().manual_seed(3)
    pieces = torch.randn(11, LONGEST, matrices, WIDTH, generator=generator) * 0.3 + 1.0
    return pieces, torch.tensor([1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1])


def network(shape: HypernetConfig, matrices: int = 1, *, learnt: bool) -> Hypernet:
    made = Hypernet(shape, width=WIDTH, matrices=matrices, seed=1)
    pieces, _ = tokens(matrices)
    made.scale_to(pieces.mean((0, 1)), pieces.std((0, 1)))
    if learnt:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in made.networks.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return made


def by_hand(pieces: Tensor, lengths: Tensor, pooling: str) -> Tensor:
    rows = [own[:length] for own, length in zip(pieces, lengths.tolist())]
    return torch.stack([own[0] if pooling == "first" else own.mean(0) for own in rows])


SHAPES = [
    {"architecture": architecture, "pooling": pooling, "residual_pooling": residual, "use_attention_mask": mask}
    for architecture in ARCHITECTURES
    for pooling, residual, mask in itertools.product(("first", "mean"), ("first", "mean"), (True, False))
]


@pytest.mark.parametrize("matrices", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape.values())))
def test_it_changes_nothing_before_it_has_learnt(shape, matrices):
    """Exactly: with attention, masked or not, and for both matrices."""
    pieces, lengths = tokens(matrices)
    made = network(config(**shape), matrices, learnt=False)(pieces, lengths)
    torch.testing.assert_close(made, by_hand(pieces, lengths, shape["residual_pooling"]))
    single = lengths == 1
    assert torch.equal(made[single], pieces[single, 0])
    if shape["residual_pooling"] == "first":
        assert torch.equal(made, pieces[:, 0])


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_are_there_from_the_first_step_and_reach_everything_after_it(architecture, shared, wide):
    shape = config(architecture=architecture, shared=shared, multiply_hidden_dim_by_num_embeddings=wide)
    made, (pieces, lengths) = network(shape, 2, learnt=False), tokens(2)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        made(pieces, lengths).square().sum().backward()
        moved = [name for name, p in made.networks.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
        silent = {name for name, _ in made.networks.named_parameters()} - set(moved)
        assert moved
        if step:  # a key's bias moves all scores of a softmax alike
            assert not {name for name in silent if "qkv.bias" not in name}
        optimizer.step()
    assert not torch.equal(made(pieces, lengths), by_hand(pieces, lengths, "mean"))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape.values())))
def test_what_stands_behind_the_pieces_is_not_seen(shape):
    """Any padding, also rows of real pieces, and any number of empty places: the same rows."""
    made, (pieces, lengths) = network(config(**shape), learnt=True).eval(), tokens()
    wanted = made(pieces, lengths)
    other = pieces.clone()
    other[torch.arange(LONGEST) >= lengths[:, None]] = 1e3
    assert torch.equal(made(other, lengths), wanted)
    for length in range(1, LONGEST + 1):
        chosen = lengths == length
        torch.testing.assert_close(made(pieces[chosen, :length], lengths[chosen]), wanted[chosen])


def test_rows_by_ids_are_those_of_the_pieces_one_by_one():
    made, table = network(config(), learnt=True).eval(), tokens()[0].flatten(0, 1)
    generator = torch.Generator().manual_seed(0)
    forms = torch.randint(0, len(table), (40, LONGEST + 2), generator=generator)
    lengths = torch.randint(1, LONGEST + 3, (40,), generator=generator)  # some are longer than it reads
    found = made.rows(lambda ids: table[ids], forms, lengths)
    for row, (form, length) in enumerate(zip(forms, lengths.tolist())):
        alone = made(table[form[:length]][None, :LONGEST], torch.tensor([min(length, LONGEST)]))
        torch.testing.assert_close(found[row], alone[0])


def test_attention_and_places_tell_orders_apart():
    made, (pieces, _) = network(config(), learnt=True), tokens()
    lengths = torch.full((11,), LONGEST)
    assert not torch.allclose(made(pieces, lengths), made(pieces.flip(1), lengths), atol=1e-3)


def test_nothing_is_drawn_while_it_is_used():
    """Dropout 0: training and evaluation give the same rows, twice."""
    made, (pieces, lengths) = network(config(), learnt=True), tokens()
    assert torch.equal(made.train()(pieces, lengths), made.eval()(pieces, lengths))
    assert torch.equal(network(config(), learnt=True)(pieces, lengths), made(pieces, lengths))


def test_separate_networks_do_not_see_the_other_matrix_and_a_shared_one_does():
    (pieces, lengths), alone = tokens(2), config(shared=False)
    other = pieces.clone()
    other[:, :, 1] = other[:, :, 1].flip(0)
    apart, together = network(alone, 2, learnt=True), network(config(), 2, learnt=True)
    assert torch.equal(apart(pieces, lengths)[:, 0], apart(other, lengths)[:, 0])
    assert not torch.allclose(together(pieces, lengths)[:, 0], together(other, lengths)[:, 0])


def test_without_a_residual_connection_it_begins_at_the_mean_row():
    made, (pieces, lengths) = network(config(residual=False), learnt=False), tokens()
    assert torch.equal(made(pieces, lengths), pieces.mean((0, 1)).expand(11, -1, -1))


def test_rows_of_bytes_are_drawn_like_the_rows_of_the_vocabulary():
    made = network(config(), learnt=False)
    torch.testing.assert_close(made.byte_rows.mean((0, 2)), made.mean.mean(1), atol=0.05, rtol=0.05)
    torch.testing.assert_close(made.byte_rows.std(0).mean(), made.deviation.mean(), atol=0.05, rtol=0.1)


@pytest.mark.parametrize("matrices", [1, 2])
def test_it_comes_back_from_disk(tmp_path, matrices):
    made, (pieces, lengths) = network(config(architecture="mlp"), matrices, learnt=True), tokens(matrices)
    made.save(tmp_path / FILE, {"model": "somewhere"})
    for path in (tmp_path, tmp_path / FILE):
        again, facts = Hypernet.load(path)
        assert torch.equal(again(pieces, lengths), made(pieces, lengths))
        assert facts == {"model": "somewhere"}
        assert not any(p.requires_grad for p in again.parameters())
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize("damage", ["cut", "other", "missing"])
def test_a_file_that_is_none_is_refused_in_one_line(tmp_path, damage):
    network(config(), learnt=False).save(tmp_path / FILE, {})
    data = (tmp_path / FILE).read_bytes()
    if damage == "missing":
        (tmp_path / FILE).unlink()
    else:
        (tmp_path / FILE).write_bytes(data[: len(data) // 2] if damage == "cut" else b'{"pickle": 1}' * 99)
    with pytest.raises(UserError, match="train") as error:
        Hypernet.load(tmp_path)
    assert "\n" not in str(error.value)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(UserError, match=r"hypernet.num_heads: 3 do not divide 16 channels"):
        Hypernet(config(num_heads=3), width=8, matrices=2)
    Hypernet(config(num_heads=3, architecture="mlp"), width=8)


def test_statistics_are_those_of_the_vocabulary_and_not_of_padding(model_folder, bpe):
    model = load_model(str(model_folder))
    model.resize_token_embeddings(bpe.vocab_size + 9, mean_resizing=False)
    with torch.no_grad():
        matrices_of(model)[0][bpe.vocab_size :] = 1e6
    made = hypernet_for(config(), model, bpe.vocab_size, seed=0)
    rows = matrices_of(model)[0][: bpe.vocab_size].detach()
    torch.testing.assert_close(made.mean[0], rows.mean(0))
    torch.testing.assert_close(made.deviation[0], rows.std(0, correction=0))


def test_tables_of_a_model_are_its_own_at_first_and_become_its_own_in_the_end(model_folder, bpe):
    model, ids = load_model(str(model_folder)), torch.arange(24).view(2, 12)
    made = hypernet_for(config(max_seq_length=1), model, bpe.vocab_size, seed=0)
    table = matrices_of(model)[0].detach().clone()
    assert torch.equal(made_tables(model, made)["input"], table)
    with torch.no_grad():
        for parameter in made.networks.parameters():
            parameter.add_(0.1)
    with torch.no_grad():
        view = ModelView(model, tables=made_tables(model, made))
        wanted = view.hidden(ids) @ view.head().T
        put_rows(model, made)
        assert torch.equal(model(ids).logits, wanted)
    assert not torch.equal(matrices_of(model)[0], table)
    assert len(matrices_of(model)) == 1  # still tied
