"""What an audit says of rows: the fast ways against slow, obvious ones, and planted faults that must be found."""

import json
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tokenkit.config import UserError
from tokenkit.eval import row_duplicates, row_predictions
from tokenkit.eval.audit_facts import AuditOptions
from tokenkit.eval.audit_matrix import audit_matrix, broken_rows, distance_to_mean, norm_outliers
from tokenkit.eval.audit_predictions import audit_predictions
from tokenkit.eval.audit_reference import audit_body, row_drift
from tokenkit.eval.audit_specials import audit_ids, audit_settings, audit_template
from tokenkit.eval.contexts import find_contexts, hidden_at
from tokenkit.eval.row_duplicates import find_duplicates
from tokenkit.eval.row_facts import id_kinds, met_ids, robust_z, row_norms
from tokenkit.eval.row_predictions import predictions
from tokenkit.models.view import ModelView
from tokenkit.scores import LogitForm
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.transfer.plan import plan_transfer
from tokenkit.transfer.rows import TensorRows
from tokenkit.transfer.shards import open_checkpoint

OPTIONS = AuditOptions()


def drawn(rows, width=24, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def with_families(rows=140, width=96, seed=0):
    """Rows among which some repeat others, exactly, nearly, and not quite."""
    matrix, generator = drawn(rows, width, seed), torch.Generator().manual_seed(seed + 100)
    for i in range(0, rows, 3):
        other = int(torch.randint(rows, (1,), generator=generator))
        noise = float(torch.rand(1, generator=generator)) * 0.08
        matrix[i] = matrix[other] * (1 + i % 4) + noise * torch.randn(width, generator=generator)
    matrix[5], matrix[6], matrix[120] = 0.0, 0.0, matrix[4]
    return matrix


def slow_families(matrix, cosine):
    """One row after the other against every leader so far."""
    unit = torch.nn.functional.normalize(matrix, dim=1)
    leader = []
    for i in range(len(matrix)):
        equal = [j for j in range(i) if torch.equal(matrix[i], matrix[j])]
        near = [j for j in range(i) if leader[j] == j and float(unit[i] @ unit[j]) >= cosine]
        leader.append(leader[equal[0]] if equal else min([*near, i]))
    return np.array(leader)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("cosine", [0.9, 0.999])
def test_families_are_those_of_comparing_all_rows(monkeypatch, seed, cosine):
    matrix = with_families(seed=seed)
    wanted = slow_families(matrix, cosine)
    assert (wanted != np.arange(len(matrix))).sum() > 10
    for block in (7, 64, 1024):
        monkeypatch.setattr(row_duplicates, "BLOCK", block)
        assert np.array_equal(find_duplicates(TensorRows(matrix), cosine=cosine).leader, wanted)


def test_rows_without_a_direction_repeat_only_themselves():
    matrix = drawn(10)
    matrix[2], matrix[7], matrix[4], matrix[8] = 0.0, -0.0, torch.nan, torch.inf
    found = find_duplicates(TensorRows(matrix))
    assert found.leader.tolist() == [0, 1, 2, 3, 4, 5, 6, 2, 8, 9]
    assert found.sizes() == {2: 2}


@dataclass(frozen=True, eq=False)
class Counted:
    """Rows that remember how many were asked for at once."""

    rows: TensorRows
    asked: list[int] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.rows.dtype

    def gather(self, ids):
        self.asked.append(len(ids))
        return self.rows.gather(ids)


def test_no_second_copy_of_the_matrix_is_made(monkeypatch, bpe):
    """An eighth of the rows at a time is all that is ever in memory."""
    monkeypatch.setattr("tokenkit.transfer.rows.BLOCK_BYTES", 4 * 24 * 40)
    monkeypatch.setattr(row_duplicates, "BLOCK", 40)
    monkeypatch.setattr(row_predictions, "TILE_BYTES", 4 * 50 * 40)
    monkeypatch.setattr(row_duplicates, "DIRECTIONS", 1)
    rows = Counted(TensorRows(drawn(320).bfloat16()))
    audit_matrix("input", rows, id_kinds(bpe, 320), OPTIONS)
    predictions(drawn(50), rows, LogitForm(), np.zeros(50, np.int64))
    assert max(rows.asked) <= 40
    assert sum(rows.asked) >= 5 * 320


def test_norms_and_distances_do_not_depend_on_blocks(monkeypatch):
    matrix = drawn(101).bfloat16()
    among = np.arange(101) % 3 == 0
    for size in (1, 7, 1000):
        monkeypatch.setattr("tokenkit.transfer.rows.BLOCK_BYTES", 4 * 24 * size)
        np.testing.assert_allclose(row_norms(TensorRows(matrix)), matrix.double().norm(dim=1).numpy())
        wanted = (matrix.double() - matrix.double()[among].mean(0)).norm(dim=1)
        np.testing.assert_allclose(distance_to_mean(TensorRows(matrix), among), wanted.numpy())


def test_robust_z_ignores_scale_shift_and_the_outliers_themselves():
    values = drawn(1000, 1).double().numpy()[:, 0]
    among = np.ones(1000, bool)
    z = robust_z(values, among)
    assert abs(float(np.median(z))) < 1e-9
    assert 0.9 < float(z.std()) < 1.1
    np.testing.assert_allclose(robust_z(7 - 3 * values, among), -z, rtol=1e-9, atol=1e-9)
    spoiled = values.copy()
    spoiled[:100] = 1e9
    np.testing.assert_allclose(robust_z(spoiled, among)[100:], z[100:], atol=1.0)
    assert (robust_z(spoiled, among)[:100] > 1e6).all()
    assert (robust_z(np.full(5, np.nan), among[:5]) == 0).all()


def test_planted_faults_of_rows_are_found_and_nothing_else(bpe):
    rows = bpe.vocab_size + 12
    kinds, matrix = id_kinds(bpe, rows), drawn(rows)
    ordinary = np.flatnonzero(kinds.ordinary)
    clean = audit_matrix("input", TensorRows(matrix), kinds, OPTIONS)
    assert {finding.level for finding in clean.findings} == {"ok"}
    assert clean.rows == ()
    loud, short, same, lost, empty = ordinary[[10, 20, 30, 40, 50]].tolist()
    matrix[loud] *= 400
    matrix[short] /= 400
    matrix[same] = matrix[ordinary[31]]
    matrix[lost] = torch.nan
    matrix[empty] = 0
    norms = row_norms(TensorRows(matrix))
    assert {row.id for row in norm_outliers("input", norms, kinds, 8.0).rows} == {loud, short}
    broken = broken_rows("input", norms, kinds)
    assert {row.id for row in broken.rows} == {lost, empty}
    assert broken.findings[0].level == "warning"
    found = audit_matrix("input", TensorRows(matrix), kinds, OPTIONS)
    repeated = [row.id for row in found.rows if row.topic == "input: repeated rows"]
    assert sorted(repeated) == sorted([same, int(ordinary[31])])
    json.dumps([row.value for row in found.rows], allow_nan=False)


def test_untrained_tokens_are_those_beside_unused_rows(bpe):
    rows = bpe.vocab_size + 20
    kinds, matrix = id_kinds(bpe, rows), drawn(rows)
    start = drawn(1, seed=3)
    matrix[kinds.unused] = start + 0.02 * drawn(int(kinds.unused.sum()), seed=4)
    never = np.flatnonzero(kinds.ordinary & ~kinds.unused)[[3, 30]].tolist()
    for i in never:
        matrix[i] = start[0]
    found = audit_matrix("output", TensorRows(matrix), kinds, OPTIONS)
    assert sorted(row.id for row in found.rows if row.topic == "output: untrained rows") == sorted(never)


@pytest.mark.parametrize("matrix, doubles", [("output", 1), ("input and output", 1), ("input", 0)])
def test_doubles_of_tokens_in_use_are_told_where_they_are_scored(matrix, doubles):
    """A byte token beside the same character: the tokenizer gives one of them, and both have the row."""
    kinds = id_kinds(load_tokenizer("byte"), 256)
    kinds.__dict__["unreachable"] = np.arange(256) == 200
    rows = drawn(256)
    rows[200] = rows[65]
    found = audit_matrix(matrix, TensorRows(rows), kinds, OPTIONS)
    finding = next(one for one in found.findings if one.topic == f"{matrix}: repeated rows")
    assert finding.numbers["doubles_of_tokens_in_use"] == doubles
    assert finding.numbers["in_use"] == 0
    assert ("half its probability" in finding.sentence) == bool(doubles)


@pytest.mark.parametrize("form", [LogitForm(), LogitForm(drawn(90, 1)[:, 0], 0.5, 3.0)])
@pytest.mark.parametrize("tile", [1, 13, 1000])
def test_predictions_are_those_of_the_whole_table(monkeypatch, form, tile):
    hidden, head = drawn(40), drawn(90, seed=1)
    head[7] = head[3]  # a tie: the lower id wins
    labels = np.arange(40) % 90
    monkeypatch.setattr(row_predictions, "TILE_BYTES", 4 * 40 * tile)
    found = predictions(hidden, TensorRows(head), form, labels, first=5)
    logits = form(hidden @ head.T)
    logp = logits.log_softmax(1).double()
    np.testing.assert_allclose(found.mean_logp, logp.mean(0).numpy(), atol=1e-4)
    np.testing.assert_allclose(found.peak_logp, logp.amax(0).numpy(), atol=1e-4)
    np.testing.assert_allclose(found.mass, logp.exp().mean(0).numpy(), atol=1e-5)
    assert abs(found.mass.sum() - 1) < 1e-4
    least = logits.topk(5, 1).values[:, -1:]
    assert np.array_equal(found.among_first, (logits >= least).sum(0).numpy())
    winners = np.array([int((row == row.max()).nonzero()[0]) for row in logits])
    assert np.array_equal(found.wins, np.bincount(winners, minlength=90))
    assert np.array_equal(found.false_wins, np.bincount(winners[winners != labels], minlength=90))


@pytest.fixture(scope="module")
def llama(bpe):
    """A small random model with rows of its own for both sides."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=bpe.vocab_size, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_hidden_states_are_those_of_each_place_alone(bpe, documents, llama):
    found = find_contexts(bpe, documents[:6], bpe.vocab_size, count=40, length=32)
    assert len(found) == 40
    hidden = hidden_at(ModelView(llama), found)
    seen = set()
    for number in range(40):
        window, place = found.windows[found.window[number]], int(found.place[number])
        assert window[0] == bpe.start_id()
        assert window[place + 1] == found.labels[number]
        seen.add((int(found.window[number]), place))
        alone = ModelView(llama).hidden(torch.from_numpy(window[None, : place + 1]))[0, -1]
        torch.testing.assert_close(hidden[number], alone, atol=1e-4, rtol=1e-4)
    assert len(seen) == 40
    assert np.array_equal(found.met, met_ids(bpe, documents[:6], bpe.vocab_size))


def test_windows_with_ids_that_have_no_row_are_left_out(bpe, documents):
    highest = int(max(e.ids.max() for e in bpe.encode_batch(documents[:6])))
    found = find_contexts(bpe, documents[:6], highest, count=10, length=8)
    assert found.left_out > 0
    assert max(int(window.max()) for window in found.windows) < highest
    with pytest.raises(UserError, match="text: no two tokens"):
        find_contexts(bpe, ["zzz"], 1)


def test_a_row_that_wins_everywhere_is_told(bpe, documents, llama):
    view, kinds = ModelView(llama), id_kinds(bpe, bpe.vocab_size)
    contexts = find_contexts(bpe, documents, bpe.vocab_size, count=200, length=64)
    hidden, head = hidden_at(view, contexts), view.head().detach().clone()
    victim = int(np.flatnonzero(kinds.ordinary & ~contexts.met)[0])
    head[victim] = 20 * hidden.mean(0) / hidden.mean(0).norm()
    found = predictions(hidden, TensorRows(head), view.form(), contexts.labels)
    part = audit_predictions(found, kinds, contexts, OPTIONS)
    by_topic = {finding.topic: finding for finding in part.findings}
    assert by_topic["winners"].level == "warning"
    assert by_topic["logits"].level == "warning"
    assert next(row.id for row in part.rows if row.topic == "winners") == victim
    assert [row.id for row in part.rows if row.topic == "logits"] == [victim]
    assert by_topic["predictions"].numbers["never"] > 0


def test_ids_and_settings(bpe):
    size = bpe.vocab_size
    agreed = {"vocab_size": size, "bos_token_id": bpe.bos_id, "eos_token_id": bpe.eos_id, "pad_token_id": bpe.pad_id}
    assert audit_settings(bpe, size, agreed, agreed).findings[0].level == "ok"
    assert audit_settings(bpe, size, agreed, {**agreed, "eos_token_id": [5, bpe.eos_id]}).findings[0].level == "ok"
    for wrong, said in (
        ({"vocab_size": size + 1}, "vocab_size"),
        ({"eos_token_id": bpe.eos_id + 1}, "eos_token_id"),
        ({"bos_token_id": size + 7}, "has no row"),
        ({"eos_token_id": None}, "eos_token_id is None"),
    ):
        for files in (({**agreed, **wrong}, agreed), ({"text_config": {**agreed, **wrong}}, None)):
            (finding,) = audit_settings(bpe, size, *files).findings
            assert finding.level == "warning"
            assert said in finding.sentence
    assert audit_ids(id_kinds(bpe, size), {"input": size}).findings[0].numbers["tokens_without_row"] == 0
    (lost,) = audit_ids(id_kinds(bpe, size - 3), {"input": size - 3}).findings
    assert (lost.level, lost.numbers["tokens_without_row"]) == ("warning", 3)


def test_every_id_is_of_one_kind(bpe, unigram):
    for tokenizer in (bpe, unigram, load_tokenizer("byte")):
        for rows in (tokenizer.vocab_size - 5, tokenizer.vocab_size, tokenizer.vocab_size + 9):
            kinds = id_kinds(tokenizer, rows)
            counts = sum(part.astype(int) for part in (kinds.ordinary, kinds.special, kinds.hole, kinds.padding))
            assert (counts == 1).all()
            for i in np.flatnonzero(kinds.unreachable).tolist():
                assert i not in tokenizer.encode(tokenizer.token_bytes[i].decode()).ids


@pytest.mark.parametrize("mark, special", [("<|endoftext|>", True), ("<|turn|>", False)])
def test_marks_of_a_template_that_are_no_special_tokens_are_told(tmp_path, bpe, mark, special):
    bpe.save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    turn = mark + "{{ m['role'] }}\n{{ m['content'] }}<|endoftext|>"
    template = f"{{% for m in messages %}}{turn}{{% endfor %}}"
    template += f"{{% if add_generation_prompt %}}{mark}assistant\n{{% endif %}}"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "chat_template": template}), "utf-8")
    (finding,) = audit_template(load_tokenizer(str(tmp_path))).findings
    assert finding.level == ("ok" if special else "warning")
    assert finding.numbers["not_special"] == (0 if special else 1)


def checkpoint(folder, model, dtype=torch.float32):
    model.to(dtype).save_pretrained(folder)
    model.float()
    return open_checkpoint(folder)


def test_what_was_kept_and_what_moved(tmp_path, bpe, unigram, llama):
    """Rows and tensors that were changed are told, and no others."""
    before = checkpoint(tmp_path / "before", llama)
    plan = plan_transfer(bpe, bpe, source_rows=bpe.vocab_size)
    same = row_drift(before.rows(before.tables.input), before.rows(before.tables.input), plan, "input")
    assert (same.distance == 0).all()
    assert audit_body(before, before).findings[0].level == "ok"
    with torch.no_grad():
        matrix = llama.get_input_embeddings().weight
        matrix[40] *= 1.5
        layer = llama.model.layers[0].mlp.up_proj.weight
        layer[0, 0] += 1
    after = checkpoint(tmp_path / "after", llama)
    moved = row_drift(after.rows(after.tables.input), before.rows(before.tables.input), plan, "input")
    assert moved.ids[moved.distance > 0].tolist() == [40]
    np.testing.assert_allclose(moved.distance[moved.ids == 40], 0.5, rtol=1e-5)
    (body,) = audit_body(after, before).findings
    assert (body.numbers["changed"], body.numbers["missing_or_added"]) == (1, 0)
    assert "up_proj" in body.sentence


def test_a_body_in_another_type_is_compared_by_its_values(tmp_path, llama):
    half = checkpoint(tmp_path / "half", llama, torch.bfloat16)
    for parameter in llama.parameters():
        parameter.data = parameter.data.bfloat16().float()
    assert audit_body(checkpoint(tmp_path / "wide", llama), half).findings[0].level == "ok"
