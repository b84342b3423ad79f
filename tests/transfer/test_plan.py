"""The plan of a transfer: bytes decide ordinary tokens, roles decide special ones, and the two never mix."""

import functools
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from tokenkit.align.vocabulary import ids_in_use
from tokenkit.config import UserError
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.transfer import INITIALIZERS
from tokenkit.transfer.plan import Kind, TransferPlan, plan_transfer
from tokenkit.transfer.rows import TensorRows

NAMES = ("small", "large", "one_role", "marked", "byte")
real = functools.cache(lambda folder: load_tokenizer(str(folder)))  # seconds each, and several tests read it
PAIRS = [pair for pair in itertools.product(NAMES, NAMES) if pair[0] != pair[1]]


def group(plan: TransferPlan, i: int) -> list[int]:
    return plan.pieces[plan.offsets[i] : plan.offsets[i + 1]].tolist()


@pytest.mark.parametrize("names", PAIRS, ids="->".join)
def test_pieces_of_ordinary_tokens_spell_exactly_their_bytes(
    tokenizers: dict[str, Tokenizer], names: tuple[str, str]
) -> None:
    source, target = (tokenizers[name] for name in names)
    plan = plan_transfer(source, target, source_rows=source.vocab_size)
    used = ids_in_use(target)
    for i, spelling in enumerate(target.token_bytes):
        if spelling and used[spelling] != i:
            assert plan.kinds[i] == Kind.UNREACHABLE
        elif spelling:
            pieces = group(plan, i)
            assert b"".join(source.token_bytes[p] for p in pieces) == spelling
            assert source.special_ids.isdisjoint(pieces)
            assert (plan.kinds[i] == Kind.COPIED) == (len(pieces) == 1) == (spelling in source.token_bytes)
    counts = plan.describe()
    assert sum(counts[kind.name.lower()] for kind in Kind) == target.vocab_size
    assert counts["drawn"] == 0


@pytest.mark.parametrize("name", NAMES)
def test_the_same_tokenizer_keeps_every_row(tokenizers: dict[str, Tokenizer], name: str) -> None:
    one = tokenizers[name]
    plan = plan_transfer(one, one, source_rows=one.vocab_size)
    assert plan.pieces.tolist() == plan.head_pieces.tolist() == list(range(one.vocab_size))


def test_averaged_pieces_are_the_sources_own_tokenisation(tokenizers: dict[str, Tokenizer]) -> None:
    source, target = tokenizers["small"], tokenizers["large"]
    plan = plan_transfer(source, target, source_rows=source.vocab_size)
    averaged = np.flatnonzero(plan.kinds == Kind.AVERAGED).tolist()
    assert len(averaged) > 20
    for i in averaged:
        assert group(plan, i) == source.encode(target.token_bytes[i].decode()).ids.tolist()


def test_a_dummy_prefix_does_not_leak_into_the_pieces(tokenizers: dict[str, Tokenizer]) -> None:
    source, target = tokenizers["marked"], tokenizers["large"]
    plan = plan_transfer(source, target, source_rows=source.vocab_size)
    ordinary = [i for i, spelling in enumerate(target.token_bytes) if spelling.isascii() and spelling[:1].isalpha()]
    assert ordinary
    assert not any(source.token_bytes[group(plan, i)[0]].startswith(b" ") for i in ordinary)
    assert {Kind.COPIED, Kind.AVERAGED} == set(plan.kinds[ordinary])  # tokenised, not cut greedily


def test_of_equal_bytes_the_emitted_id_is_taken(tokenizers: dict[str, Tokenizer]) -> None:
    source, target = tokenizers["marked"], tokenizers["byte"]
    plan = plan_transfer(source, target, source_rows=source.vocab_size)
    for letter in b"aet":
        same = [i for i, spelling in enumerate(source.token_bytes) if spelling == bytes([letter])]
        assert len(same) == 2  # `<0x61>` and `a`
        emitted = source.encode("\n" + chr(letter)).ids[-1]
        assert group(plan, letter) == [emitted] != [same[0]]


@pytest.mark.parametrize("names", PAIRS, ids="->".join)
def test_the_newline_never_gets_a_special_row(tokenizers: dict[str, Tokenizer], names: tuple[str, str]) -> None:
    source, target = (tokenizers[name] for name in names)
    plan = plan_transfer(source, target, source_rows=source.vocab_size)
    newline = target.token_bytes.index(b"\n")
    assert source.token_bytes[group(plan, newline)[0]] == b"\n"


def test_roles_go_to_roles(tokenizers: dict[str, Tokenizer]) -> None:
    source, target = tokenizers["large"], tokenizers["byte"]
    plan = plan_transfer(source, target, source_rows=source.vocab_size)
    for i, wanted in zip((256, 257, 258), (source.bos_id, source.eos_id, source.pad_id)):
        assert group(plan, i) == [wanted]
        assert plan.kinds[i] == Kind.SPECIAL
    no_pad = tokenizers["marked"]
    assert group(plan_transfer(no_pad, target, source_rows=no_pad.vocab_size), 258) == [no_pad.eos_id]


def test_one_token_with_two_roles_begins_as_bos_and_ends_as_eos(tokenizers: dict[str, Tokenizer]) -> None:
    source, target = tokenizers["large"], tokenizers["one_role"]
    plan = plan_transfer(source, target, source_rows=source.vocab_size)
    assert target.bos_id == target.eos_id
    place = plan.offsets[target.eos_id]
    assert (plan.pieces[place], plan.head_pieces[place]) == (source.bos_id, source.eos_id)
    others = np.delete(plan.pieces, place), np.delete(plan.head_pieces, place)
    assert np.array_equal(*others)


def test_a_special_token_without_role_is_its_literal(tokenizers: dict[str, Tokenizer]) -> None:
    source, target = tokenizers["small"], tokenizers["large"]
    turn = target.special_tokens["<|turn|>"]
    pieces = group(plan_transfer(source, target, source_rows=source.vocab_size), turn)
    assert b"".join(source.token_bytes[p] for p in pieces) == b"<|turn|>"
    other = tokenizers["one_role"]
    same = group(plan_transfer(target, other, source_rows=target.vocab_size), other.special_tokens["<|turn|>"])
    assert same == [turn]


def test_ids_beyond_the_rows_are_never_used(tokenizers: dict[str, Tokenizer]) -> None:
    source, target = tokenizers["large"], tokenizers["small"]
    plan = plan_transfer(source, target, source_rows=280)
    assert plan.pieces.max() < 280
    assert plan.describe()["copied"] == sum(b in source.token_bytes[:280] for b in target.token_bytes if b)


def test_bytes_that_the_source_lacks_are_drawn(tokenizers: dict[str, Tokenizer]) -> None:
    plan = plan_transfer(tokenizers["byte"], tokenizers["small"], source_rows=200)  # bytes from 200 on have no row
    high = tokenizers["small"].token_bytes.index(b"\xf0")
    assert plan.kinds[high] == Kind.DRAWN
    assert group(plan, high) == []


LARGE = [pytest.param(pair, marks=pytest.mark.slow) for pair in ("llama3__to__qwen2", "gemma3__to__qwen2")]


@pytest.mark.parametrize("pair", ["llama2__to__gpt2", *LARGE])
def test_real_pairs_agree_with_recorded_values_corrected(shared: Path, pair: str) -> None:
    """Every ordinary token of the recorded transfers: equal tokens, means, and spellings of partial characters."""
    source, target = (real(shared / "data/tokenizers" / name) for name in pair.split("__to__"))
    with np.load(shared / f"golden/C_fvt_{pair}.npz") as recorded:
        golden = {name: recorded[name] for name in recorded.files}
    plan = plan_transfer(source, target, source_rows=source.vocab_size)

    def ragged(name: str, pointer: str) -> list[list[int]]:
        return [part.tolist() for part in np.split(golden[name], golden[pointer][1:-1])]

    wanted = ragged("src", "ptr")
    for i, group_ids in zip(golden["retokenized_target"].tolist(), ragged("retokenized_src", "retokenized_ptr")):
        wanted[i] = group_ids
    for i, one in zip(golden["special_override_target"], golden["special_override_correct_source"].tolist()):
        wanted[i] = [one]
    spelled = set(golden["fallback_target"].tolist())
    pieces = [part.tolist() for part in np.split(plan.pieces, plan.offsets[1:-1])]
    compared = [i for i, b in enumerate(target.token_bytes) if b and i not in spelled and b != b"<unk>"]
    assert len(compared) > 0.99 * len(wanted) - len(spelled)
    assert [i for i in compared if pieces[i] != wanted[i]] == []
    rows = INITIALIZERS["fvt"].fn(TensorRows(torch.zeros(source.vocab_size, 1)), plan, side="input")
    shares = {n: float(np.float32(1 / n)) for n in range(1, 1 + max(map(len, wanted)))}
    assert all(rows.sources(i) == [(one, shares[len(wanted[i])]) for one in wanted[i]] for i in compared)
    for i, single in zip(golden["fallback_target"].tolist(), ragged("fallback_byte_src", "fallback_byte_ptr")):
        assert plan.kinds[i] == Kind.FALLBACK
        assert pieces[i] == single or len(pieces[i]) < len(single)  # longer tokens of the source where it has them
        assert b"".join(source.token_bytes[p] for p in pieces[i]) == target.token_bytes[i]


@pytest.mark.parametrize(
    ("source_name", "target_name", "wanted"),
    [
        ("llama3", "qwen2", {"<|im_start|>": ["<|start_header_id|>"]}),
        ("qwen2", "llama3", {"<|start_header_id|>": ["<|im_start|>"], "<|end_header_id|>": ["\n"]}),
    ],
)
def test_what_begins_and_ends_a_turn_goes_by_its_part(
    shared: Path, source_name: str, target_name: str, wanted: dict[str, list[str]]
) -> None:
    """Only special tokens take a row for their part: the newline that heads a turn in one family stays a newline."""
    source, target = (real(shared / "data/tokenizers" / name) for name in (source_name, target_name))
    plan = plan_transfer(source, target, source_rows=source.vocab_size)
    for token, literals in wanted.items():
        ids = [source.special_tokens.get(one) for one in literals]
        expected = [source.encode(one).ids[0] if i is None else i for one, i in zip(literals, ids, strict=True)]
        assert group(plan, target.special_tokens[token]) == expected
    newline = target.token_bytes.index(b"\n")
    assert source.token_bytes[group(plan, newline)[0]] == b"\n"


def test_rows_by_hand_go_before_everything(tokenizers: dict[str, Tokenizer]) -> None:
    source, target = tokenizers["small"], tokenizers["large"]
    turn, the = target.special_tokens["<|turn|>"], target.token_bytes.index(b"t")
    override = {"<|turn|>": "<|e|>", "t": "cat", " ": 40}
    plan = plan_transfer(source, target, source_rows=source.vocab_size, override=override)
    assert group(plan, turn) == [source.eos_id]
    assert group(plan, the) == source.encode("cat").ids.tolist()
    assert group(plan, target.token_bytes.index(b" ")) == [40]
    assert {Kind.OVERRIDDEN} == set(plan.kinds[[turn, the]])


@pytest.mark.parametrize(
    ("override", "message"),
    [({"no such token": "a"}, "no such token"), ({"t": 10_000}, "no row for 10000")],
)
def test_overrides_of_nothing_are_one_line(
    tokenizers: dict[str, Tokenizer], override: dict[str, str | int], message: str
) -> None:
    source, target = tokenizers["small"], tokenizers["large"]
    with pytest.raises(UserError, match=message):
        plan_transfer(source, target, source_rows=source.vocab_size, override=override)


def test_digits_and_white_space_are_never_an_initialisers(tokenizers: dict[str, Tokenizer]) -> None:
    source, target = tokenizers["byte"], tokenizers["large"]
    plan = plan_transfer(source, target, source_rows=source.vocab_size)
    spellings = [target.token_bytes[i] for i in np.flatnonzero(plan.by_rule)]
    assert {b"1", b"\n", b" "} <= set(spellings)
    assert all(not spelling.strip() or spelling.strip().isdigit() for spelling in spellings)
    assert not set(plan.free.tolist()) & set(np.flatnonzero(plan.by_rule).tolist())


def test_rules_can_be_lifted(tokenizers: dict[str, Tokenizer]) -> None:
    source, target = tokenizers["byte"], tokenizers["large"]
    plan = plan_transfer(source, target, source_rows=source.vocab_size)
    ruled = np.isin(plan.kinds, (Kind.AVERAGED, Kind.FALLBACK, Kind.DRAWN)) & plan.white_space
    assert ruled.any()
    free = plan.with_rules(["digits"])
    assert set(np.flatnonzero(ruled)) == set(free.free) - set(plan.free)
    assert np.array_equal(free.digits, plan.digits)
