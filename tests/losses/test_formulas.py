"""Losses against double loops written from their formulas, on small random microbatches."""

import math

import pytest
import torch

from tokenkit.losses import LOSSES
from tokenkit.losses.x_token import project, relaxed_pairs
from tokenkit.models.projectors import DualSpace, no_later
from tokenkit.plugins.checks import defaults, example, one_vocabulary
from tokenkit.quantities import Quantities
from tokenkit.scores import scores_at, top_k_scores


def run(name, seed=0, own=None, **changes):
    """Values, mask and tensors of a loss on an example."""
    entry = LOSSES[name]
    options = defaults(entry) | changes
    leaves = example(entry, seed) | (own or {})
    tensors = Quantities(leaves, entry.step_mean_of([Quantities(leaves)], options))
    return entry.values(tensors, options), entry.mask(tensors, options), tensors


def softmax(logits, temperature=1.0):
    weights = [math.exp(x / temperature) for x in logits]
    return [w / sum(weights) for w in weights]


def positions(tensors, side, row, chunk):
    """Positions that predict the tokens of a chunk."""
    return [t for t, c in enumerate(tensors[f"{side}_chunk"][row].tolist()) if c == chunk]


def each(mask):
    return [tuple(place) for place in torch.nonzero(mask).tolist()]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_uld_after_the_same_bytes(temperature):
    values, mask, tensors = run("uld", temperature=temperature)
    assert mask.sum() > 5
    for row, c in each(mask):
        q, p = (
            sorted(softmax(tensors[f"{s}_logits"][row, tensors[f"{s}_chunk_end"][row, c]].tolist(), temperature))
            for s in ("student", "teacher")
        )
        assert values[row, c].item() == pytest.approx(sum(abs(a - b) for a, b in zip(p, q)))


def test_uld_pads_the_smaller_vocabulary_and_stops_at_the_shorter_side():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(1, 4, 6, generator=generator), torch.randn(1, 3, 9, generator=generator)
    values = LOSSES["uld"].fn(student, teacher, positions="positional", temperature=1.0)
    for t in range(3):
        p, q = (sorted(softmax(x[0, t].tolist()), reverse=True) for x in (teacher, student))
        q += [0.0] * 3
        assert values[0, t].item() == pytest.approx(sum(abs(a - b) for a, b in zip(p, q)), rel=1e-5)
    marks = torch.ones(1, 4, dtype=torch.bool), torch.ones(1, 3, dtype=torch.bool)
    ends = torch.zeros(1, 0, dtype=torch.long)
    units = LOSSES["uld"].units(marks[0], marks[0], ends, marks[1], marks[1], ends, positions="positional")
    assert units.tolist() == [[True, True, True, False]]


def chain(tensors, side, row, chunk, temperature):
    """Probability of every vocabulary entry at the chunk's last token, times those of the tokens before it."""
    places = positions(tensors, side, row, chunk)
    scale = 1.0
    for t in places[:-1]:
        scale *= softmax(tensors[f"{side}_logits"][row, t].tolist(), temperature)[tensors[f"{side}_labels"][row, t]]
    return [scale * p for p in softmax(tensors[f"{side}_logits"][row, places[-1]].tolist(), temperature)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"beta": 0.0},
        {"beta": 1.0, "temperature": 2.0},
        {"beta": 0.2, "matched_weight": 1.0, "unmatched_weight": 3.0},
    ],
)
def test_gold_by_the_chain_rule(changes):
    values, mask, tensors = run("gold", **changes)
    beta, temperature = changes.get("beta", 0.5), changes.get("temperature", 1.0)
    pairs = tensors["exact_pairs"].tolist()
    share = len(pairs) / 11
    weights = changes.get("matched_weight", share), changes.get("unmatched_weight", 1 - share)
    assert mask.sum() > 5
    for row, c in each(mask):
        q, p = (chain(tensors, side, row, c, temperature) for side in ("student", "teacher"))
        matched = 0.0
        for i, j in pairs:
            a, b = max(p[j], 1e-8), max(q[i], 1e-8)
            m = beta * a + (1 - beta) * b
            if beta == 0:
                matched += a * math.log(a / b)
            elif beta == 1:
                matched += b * math.log(b / a)
            else:
                matched += beta * a * math.log(a / m) + (1 - beta) * b * math.log(b / m)
        rest = [
            sorted(x for i, x in enumerate(side) if i not in used)
            for side, used in ((q, {i for i, _ in pairs}), (p, {j for _, j in pairs}))
        ]
        unmatched = sum(abs(a - b) for a, b in zip(*rest))
        assert values[row, c].item() == pytest.approx(weights[0] * matched + weights[1] * unmatched)


def mean_distribution(tensors, side, row, chunk, temperature=1.0):
    rows = [
        softmax(tensors[f"{side}_logits"][row, t].tolist(), temperature) for t in positions(tensors, side, row, chunk)
    ]
    return [sum(column) / len(rows) for column in zip(*rows)]


@pytest.mark.parametrize(("top_k", "temperature"), [(8192, 1.0), (4, 1.0), (6, 2.0)])
def test_p_kl(top_k, temperature):
    values, mask, tensors = run("p_kl", top_k=top_k, temperature=temperature)
    ids, weights = tensors["projection_ids"].tolist(), tensors["projection_weights"].tolist()
    assert mask.sum() > 5
    for row, c in each(mask):
        q, p = (mean_distribution(tensors, side, row, c, temperature) for side in ("student", "teacher"))
        projected = [0.0] * len(p)
        for i, probability in enumerate(q):
            for j, w in zip(ids[i], weights[i]):
                if j >= 0:
                    projected[j] += w * probability
        best = sorted(range(len(p)), key=lambda j: -p[j])[:top_k]
        total = sum(p[j] for j in best), sum(projected[j] for j in best)
        kl = sum(p[j] / total[0] * math.log(p[j] / total[0] / (projected[j] / total[1])) for j in best)
        assert values[row, c].item() == pytest.approx(kl * temperature**2, rel=1e-6)


@pytest.mark.parametrize(("match", "top_k"), [(0.6, 8192), (0.9, 8192), (0.5, 2)])
def test_h_kl(match, top_k):
    values, mask, tensors = run("h_kl", match=match, top_k=top_k)
    ids, weights = tensors["projection_ids"].tolist(), tensors["projection_weights"].tolist()
    claims = {}  # teacher id -> (weight, student id), the heaviest, then the first
    for i, (places, shares) in enumerate(zip(ids, weights)):
        share, j = max(zip(shares, places))
        if share >= match and j >= 0 and (j not in claims or share > claims[j][0]):
            claims[j] = (share, i)
    pairs = [(i, j) for j, (_, i) in claims.items()]
    for row, c in each(mask):
        q, p = (mean_distribution(tensors, side, row, c) for side in ("student", "teacher"))
        common = sum(p[j] * math.log(p[j] / q[i]) for i, j in pairs)
        rest = [
            sorted((x for i, x in enumerate(side) if i not in used), reverse=True)[:top_k]
            for side, used in ((q, {i for i, _ in pairs}), (p, {j for _, j in pairs}))
        ]
        width = max(map(len, rest))
        rest = [side + [0.0] * (width - len(side)) for side in rest]
        assert values[row, c].item() == pytest.approx(common + sum(abs(a - b) for a, b in zip(*rest)), rel=1e-6)


def test_a_teacher_token_is_matched_with_its_heaviest_claim_then_the_first():
    ids = torch.tensor([[3, 0], [3, 1], [3, -1], [2, 1], [-1, -1]])
    weights = torch.tensor([[0.7, 0.3], [0.9, 0.1], [0.9, 0.0], [0.5, 0.5], [0.0, 0.0]])
    own, other = relaxed_pairs(ids, weights, 0.6, 5)
    assert (own.tolist(), other.tolist()) == ([1], [3])


def test_a_projection_keeps_the_mass_of_what_has_a_counterpart():
    _, _, tensors = run("p_kl")
    student = torch.rand(2, 3, 11, dtype=torch.float64).softmax(-1)
    projected = project(student, tensors["projection_ids"], tensors["projection_weights"], 11)
    torch.testing.assert_close(projected.sum(-1), torch.ones(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("distance", ["kl", "reverse_kl", "kl_subset", "reverse_kl_subset", "log_abs", "abs"])
@pytest.mark.parametrize("mapping", ["exact", "mined", "unbiased"])
def test_side_path(distance, mapping):
    pairs = {"exact": [[0, 1], [2, 2]], "mined": [[0, 3], [4, 3], [5, 1]], "unbiased": [[7, 7]]}
    own = {f"{name}_pairs": torch.tensor(value) for name, value in pairs.items()}
    values, mask, tensors = run("side_path", own=own, distance=distance, mapping=mapping)
    for row, c in each(mask):
        both = []
        for side, column in (("teacher", 1), ("student", 0)):
            full = softmax(tensors[f"{side}_logits"][row, tensors[f"{side}_chunk_end"][row, c]].tolist())
            some = [full[pair[column]] for pair in pairs[mapping]]
            if "subset" in distance:
                some = [x / sum(some) for x in some]
            elif distance.endswith("kl"):
                some.append(max(1 - sum(some), 1e-8))
            both.append(some)
        p, q = reversed(both) if distance.startswith("reverse") else both
        if distance == "log_abs":
            expected = sum(abs(math.log(a / b)) for a, b in zip(p, q)) / len(p)
        elif distance == "abs":
            expected = sum(abs(a - b) for a, b in zip(p, q))
        else:
            expected = sum(a * math.log(a / b) for a, b in zip(p, q))
        assert values[row, c].item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_top_k_kl_is_at_most_the_whole_and_equals_it_with_all_ids():
    generator = torch.Generator().manual_seed(3)
    student, teacher, head = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 5, 7), (2, 5, 7), (30, 7))
    )
    p, q = ((x @ head.T).log_softmax(-1) for x in (teacher, student))
    whole = (p.exp() * (p - q)).sum(-1)
    before = torch.zeros_like(whole)
    for k in (1, 4, 12, 29, 30):
        top, ids, tail = top_k_scores(teacher, head, k)
        logp, rest = scores_at(student, head, ids)
        values = LOSSES["top_k_kl"].fn(logp, rest, top, tail, top_k=k)
        assert (values <= whole + 1e-12).all()
        assert (values >= before - 1e-12).all()
        fewer = LOSSES["top_k_kl"].fn(logp, rest, top, tail, top_k=min(k, 3))
        logp3, rest3 = scores_at(student, head, ids[..., :3])
        top3, _, tail3 = top_k_scores(teacher, head, min(k, 3))
        torch.testing.assert_close(fewer, LOSSES["top_k_kl"].fn(logp3, rest3, top3, tail3, top_k=3))
        before = values
    torch.testing.assert_close(before, whole)
    own = teacher.clone().requires_grad_()
    top, ids, tail = top_k_scores(teacher, head, 4)
    LOSSES["top_k_kl"].fn(*scores_at(own, head, ids), top, tail, top_k=4).sum().backward()
    assert own.grad.abs().max() < 1e-10


def test_mined_with_itself_compares_nothing_but_the_text_inside_chunks_of_several_tokens():
    entry = LOSSES["mined"]
    leaves = example(entry, 4)
    for side in ("student", "teacher"):  # every token its own chunk
        leaves[f"{side}_chunk"] = torch.arange(9).repeat(3, 1).masked_fill(torch.arange(9) == 8, -1)
        leaves[f"{side}_chunk_end"] = torch.arange(1, 9).repeat(3, 1)
    leaves |= one_vocabulary() | {"student_logits": leaves["teacher_logits"]}
    tensors = Quantities(leaves)
    mask = entry.mask(tensors, defaults(entry))
    assert mask[:, :8].any()
    assert not mask[:, 8:].any()
    assert entry.values(tensors, defaults(entry))[mask].abs().max() < 1e-12


def test_dual_space_attention_is_a_double_loop():
    generator = torch.Generator().manual_seed(0)
    module = DualSpace(4, 6).double()
    student, teacher = (torch.randn(2, 1, n, d, generator=generator, dtype=torch.float64) for n, d in ((5, 4), (3, 6)))
    masks = torch.tensor([[True] * 4 + [False]]), torch.tensor([[True, True, False]])
    scale = torch.tensor([2.0, 3.0, 0.5], dtype=torch.float64)
    to_student, to_teacher = module(student[0], student[1], masks[0], teacher[0], teacher[1], masks[1], scale)
    (hs, es), (ht, et) = (x[:, 0] for x in (student, teacher))
    scores = torch.zeros(4, 2, dtype=torch.float64)
    for t in range(4):
        query = module.query(torch.cat([es[t], es[t + 1]]))
        for s in range(2):
            scores[t, s] = query @ (torch.cat([et[s], et[s + 1]]) / scale[0]) / math.sqrt(12)
    values = [module.to_student(ht[s] / scale[1] + et[s + 1] / scale[2]) for s in range(2)]
    for t in range(4):
        weights = softmax(scores[t].tolist())
        torch.testing.assert_close(to_student[0, t], sum(w * v for w, v in zip(weights, values)))
    for s in range(2):
        weights = softmax(scores[:, s].tolist())
        torch.testing.assert_close(to_teacher[0, s], sum(w * module.to_teacher(hs[t]) for t, w in enumerate(weights)))


def test_causal_attention_never_sees_text_that_has_not_been_read():
    # student tokens end chunks 0..2 at 1, 2, 4; the teacher's at 2, 3, 5
    own, other = torch.tensor([[1, 2, 4, -1]]), torch.tensor([[2, 3, 5, -1]])
    allowed = no_later(own, 5, other, 6)
    assert allowed.shape == (1, 5, 6)
    chunk_of = lambda end, t: next((c for c, e in enumerate(end) if t <= e), 99)  # noqa: E731
    for t in range(5):
        read = sum(e <= t + 1 for e in (1, 2, 4))  # chunks that the student has, with the token it is about to read
        for s in range(1, 6):
            assert allowed[0, t, s] == (chunk_of((2, 3, 5), s + 1) < read)
    assert allowed[0, :, 0].all()


def test_hidden_states_by_hand():
    values, mask, tensors = run("hidden_states", normalization="l2")
    teacher, student = tensors["teacher_hidden"], tensors["student_hidden"]
    ends = {side: tensors[f"{side}_chunk_end"] for side in ("student", "teacher")}
    kept = each(mask)
    states = {c: (student[c[0], ends["student"][c]], teacher[c[0], ends["teacher"][c]]) for c in kept}
    size = sum((t**2).mean().item() for _, t in states.values()) / len(kept)
    for c, (s, t) in states.items():
        assert values[c].item() == pytest.approx(((s - t) ** 2).mean().item() / size, rel=1e-6)
    fewer = run("hidden_states", chunks="space")[1]
    assert 0 < fewer.sum() < mask.sum()
    assert not (fewer & ~tensors["space_after"]).any()
