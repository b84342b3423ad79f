"""`alm` and `clm` against stored values and gradients of the corrected published formulas.

Every stored case of every instance is compared, none is left out: all divergences, modes, temperatures, numerators,
denominators and chunk sizes; value, numerator, weight, denominator, number of units and gradient; float64 and float32;
as the published rule counts units and as the rule that wants both sides scored does. `KNOWN` says how many there are.

In four cases of the second rule (`ONE_SIDED`) the stored sum of a run of chunks takes in a chunk that the teacher alone
scores, as if the student gave it probability 1: the very thing that the rule is against, and not so in merged groups.
There weights and counts are compared with the stored ones, and the value with a plain loop that, told to leave such
chunks in, gives the stored value.
"""

import json
import math
from functools import cache

import numpy as np
import pytest
import torch

from tokenkit.losses import LOSSES
from tokenkit.losses.alm import alm_units
from tokenkit.quantities import Quantities
from tokenkit.scores import token_scores

NAMES = {
    "binary_ce": "ce",
    "reverse_binary_kl": "reverse_kl",
    "binary_kl_temp_limit": "kl_limit",
    "abs": "abs",
    "abs_exp": "tvd",
    "renyi": "renyi",
    "joschu_k2": "k2",
    "joschu_k3": "k3",
}
KNOWN = {"dense": 366, "asym": 162, "holes": 204, "microbatch": 192, "extreme": 162, "e2e": 27}
ONE_SIDED = {("holes", i) for i in (167, 168, 181, 182)}
DTYPES = {"float64": torch.float64, "float32": torch.float32}


@pytest.fixture(scope="module")
def cases(shared):
    instances = json.loads((shared / "golden/A_alm_cases.json").read_text("utf-8"))["instances"]
    end_to_end = json.loads((shared / "golden/A_alm_e2e_cases.json").read_text("utf-8"))["cases"]
    return {**{name: instance["cases"] for name, instance in instances.items()}, "e2e": end_to_end}


def shifted(array, fill):
    """What belongs to token t moves to position t - 1, whose logits predict it."""
    return np.concatenate([array[:, 1:], np.full_like(array[:, :1], fill)], 1)


def data_tensors(data, side, chunk_kind):
    """Chunk of every position and end of every chunk, of all rows that the file has."""
    chunk = data[f"chunk_id_{side}_{chunk_kind}"].astype(np.int64)
    scored = data[f"loss_mask_{side}"] & (chunk >= 0)
    columns = min(data["ids_teacher"].shape[1], data["ids_student"].shape[1])
    end = np.full((len(chunk), columns), -1)
    for row, position in zip(*np.nonzero(scored)):
        end[row, chunk[row, position]] = position  # logits at the chunk's last token give what follows it
    return torch.tensor(shifted(np.where(scored, chunk, -1), -1)), torch.tensor(end)


class Instance:
    """One stored instance: what both models said of its rows, scored once per token set."""

    def __init__(self, data, dtype):
        self.data, self.dtype, self.rows = data, dtype, int(data["batch_rows"])
        self.logits = {side: self._logits(side) for side in ("student", "teacher")}
        self.scores = cache(self._scores)
        self.chunks = cache(lambda side, kind: data_tensors(data, side, kind))

    def _logits(self, side):
        name = f"{side}_logits" if f"{side}_logits" in self.data else f"{side}_logits_f16"
        return torch.tensor(self.data[name], dtype=self.dtype).requires_grad_(side == "student")

    def _scores(self, side, name):
        boundary = self.data[f"space_mask_{side}"]
        if name == "eos_logp":
            boundary = np.arange(len(boundary)) == self.data[f"eos_id_{side}"]
        masked = self.logits[side] + torch.tensor(self.data[f"logit_mask_{side}"], dtype=self.dtype)
        labels = torch.tensor(shifted(self.data[f"ids_{side}"], 0)[: self.rows].astype(np.int64))
        head = torch.eye(masked.shape[-1], dtype=self.dtype)
        return token_scores(masked, head, labels, torch.tensor(boundary))

    def leaves(self, case):
        name = "eos_logp" if "eos_as_space" in case["alm_mode"] else "boundary_logp"
        found = {}
        for side in self.logits:
            chunk, end = self.chunks(side, case["chunk_kind"])
            found[f"{side}_label_logp"], found[f"{side}_{name}"] = self.scores(side, name)
            found |= {f"{side}_chunk": chunk[: self.rows], f"{side}_chunk_end": end[: self.rows]}
        return Quantities(found)

    def options(self, case, both_sides, divergence=None):
        return {
            "temperature": case["tau"] or 1.0,
            "divergence": divergence or NAMES[case["diff_fn"]],
            "debias": "append_space" in case["alm_mode"],
            "boundary": "eos" if "eos_as_space" in case["alm_mode"] else "space",
            "merge": "merge_by_space_prob" in case["alm_mode"],
            "threshold": float(self.data["gamma"]),
            "both_sides": both_sides,
            "numerator": case["numerator"],
            "denominator": case["denominator"],
            "chunk_sizes": tuple(case["chunk_sizes"]),
            "renyi_order": 0.5,
        }

    def mean_count(self, case, options, units):
        """What divides: a mean over the columns of the whole batch; merged groups are known for the rows seen alone."""
        if options["merge"]:
            return units.count.mean()
        leaves = {}
        for side in ("student", "teacher"):
            leaves[f"{side}_chunk"], leaves[f"{side}_chunk_end"] = self.chunks(side, case["chunk_kind"])
        tokens = Quantities(leaves)
        wanted = ("merge", "threshold", "both_sides", "numerator", "denominator", "chunk_sizes")
        nothing = torch.zeros(tokens["teacher_chunk_end"].shape, dtype=self.dtype)
        counts = tokens["teacher_chunk_tokens"], tokens["student_chunk_tokens"]
        return alm_units(nothing, *counts, **{name: options[name] for name in wanted})[1].mean()

    def run(self, case, both_sides, divergence=None):
        """Numerator, sum of weights, number of units, what divides, the loss, and its gradient at the logits."""
        options, tensors = self.options(case, both_sides, divergence), self.leaves(case)
        units = LOSSES["alm"].units_of(tensors, options)
        values = LOSSES["alm"].values(tensors, options)
        total = (torch.where(units.weight > 0, values, 0) * units.weight).sum()
        divisor = self.mean_count(case, options, units) * units.weight.numel()
        (gradient,) = torch.autograd.grad(total / divisor, self.logits["student"], retain_graph=True)
        sizes, columns = len(case["chunk_sizes"]), units.weight.numel()  # ours weighs each size by its share
        return {
            "sum": total.item() * sizes,
            "weight": units.weight.sum().item() * sizes,
            "n_units": int((units.weight > 0).sum()),
            "denominator": divisor.item() / columns,
            "value": (total / divisor).item(),
        }, gradient.numpy()


def plain_loop(instance, case, *, leave_in):
    """The loss without merging, with cross-entropy, unit by unit; chunks of one side stay out of a run, or in it."""
    tensors, options = instance.leaves(case), instance.options(case, True)
    names = ("chunk_logp", "chunk_boundary_logp", "chunk_tokens")
    (at, et, nt), (as_, es, ns) = ([tensors[f"{s}_{n}"].tolist() for n in names] for s in ("teacher", "student"))
    total, count = 0.0, 0
    for size in options["chunk_sizes"]:
        for row in range(len(nt)):
            for start in range(0, len(nt[row]), size):
                columns = range(start, min(start + size, len(nt[row])))
                both = [c for c in columns if nt[row][c] and ns[row][c]]
                if both:
                    summed = [c for c in columns if nt[row][c]] if leave_in else both
                    teacher = (sum(at[row][c] for c in summed) + et[row][both[-1]]) / options["temperature"] - 1e-6
                    student = (sum(as_[row][c] for c in summed) + es[row][both[-1]]) / options["temperature"] - 1e-6
                    p = math.exp(teacher)
                    total -= p * student + (1 - p) * math.log(-math.expm1(student))
                    count += 1
    return total / count / len(options["chunk_sizes"])


def stored_gradient(data, i, variant):
    """The gradient of a variant is stored only where it differs from the one before it in the chain."""
    for name in ["strict", "corrected"][0 if variant == "strict" else 1 :]:
        index = list(data[f"grad_{name}_index"])
        if i in index:
            return data[f"grad_{name}"][index.index(i)]
    return data["grad_upstream"][i]


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("variant", ["corrected", "strict"])
@pytest.mark.parametrize("name", ["dense", "asym", "holes", "microbatch", "extreme"])
def test_every_case(golden, cases, name, variant, precision):
    data = golden(f"A_alm_{name}")
    instance = Instance(data, DTYPES[precision])
    value_tolerance, gradient_tolerance = (1e-7, 1e-6) if precision == "float64" else (2e-4, 1e-4)
    small = 1e-12 if precision == "float64" else 1e-6
    compared = ["value", "sum", "weight"] + ["n_units", "denominator"] * (variant == "corrected")
    for i, case in enumerate(cases[name]):
        assert case["i"] == i
        found, gradient = instance.run(case, variant == "strict")
        one_sided = variant == "strict" and (name, i) in ONE_SIDED
        if one_sided:
            assert plain_loop(instance, case, leave_in=True) == pytest.approx(data["value_strict"][i], rel=2e-7 + small)
            assert plain_loop(instance, case, leave_in=False) == pytest.approx(found["value"], rel=value_tolerance)
        for key in compared[2 * one_sided :]:
            expected = data[f"{key}_{variant}" if f"{key}_{variant}" in data else key][i]
            assert found[key] == pytest.approx(expected, rel=value_tolerance, abs=small), (key, case)
        expected = stored_gradient(data, i, variant)
        error = np.abs(gradient - expected).max()
        assert one_sided or error <= gradient_tolerance * max(np.abs(expected).max(), 1e-9), case
    assert i + 1 == KNOWN[name]


def test_kl_is_cross_entropy_less_entropy_with_the_same_gradient(golden, cases):
    instance = Instance(golden("A_alm_dense"), torch.float64)
    for case in [c for c in cases["dense"] if c["diff_fn"] == "binary_ce"]:
        kl, gradient = instance.run(case, True, "kl")
        ce, expected = instance.run(case, True, "ce")
        assert 0 <= kl["value"] < ce["value"]
        np.testing.assert_allclose(gradient, expected, atol=1e-12)


@pytest.mark.parametrize("precision", DTYPES)
def test_end_to_end_on_text(golden, cases, precision):
    data = golden("A_alm_e2e_bpe1k")
    instance = Instance(data, DTYPES[precision])
    value_tolerance, gradient_tolerance = (1e-7, 1e-6) if precision == "float64" else (2e-4, 1e-4)
    for i, case in enumerate(cases["e2e"]):
        found, gradient = instance.run(case, False)
        assert found["value"] == pytest.approx(data["value_corrected"][i], rel=value_tolerance), case
        row, position, token = data["grad_coords"].T
        expected = data["grad_corrected_at_coords"][i]
        error = np.abs(gradient[row, position, token] - expected).max()
        assert error <= gradient_tolerance * np.abs(gradient).max(), case
        assert np.linalg.norm(gradient) == pytest.approx(data["grad_corrected_l2"][i], rel=gradient_tolerance), case
    assert i + 1 == KNOWN["e2e"]


@pytest.mark.parametrize("part", ["full_batch", "micro_0_of_2", "micro_1_of_2", "all_four"])
def test_clm(golden, shared, part):
    data = golden("A_sft")
    cases = json.loads((shared / "golden/A_other_cases.json").read_text("utf-8"))["cases"]["sft"]
    rows = next(case["rows"] for case in cases if case["id"] == part)
    logits = torch.tensor(data["student_logits"][rows], dtype=torch.float64, requires_grad=True)
    masked = logits + torch.tensor(data["logit_mask_student"], dtype=torch.float64)
    mask = torch.tensor(shifted(data["loss_mask_student"], False)[rows])
    labels = torch.tensor(shifted(data["ids_student"], 0).astype(np.int64)[rows])
    logp, _ = token_scores(masked, torch.eye(masked.shape[-1], dtype=torch.float64), labels)
    total = (LOSSES["clm"].values({"student_label_logp": logp}, {}) * mask).sum()
    (gradient,) = torch.autograd.grad(total, logits)
    assert total.item() == pytest.approx(float(data[f"sum__{part}"]), rel=1e-7)
    scale = float(data[f"value_loop__{part}"]) / float(data[f"sum__{part}"])
    expected = data[f"grad__{part}"]
    assert np.abs(gradient.numpy() * scale - expected).max() <= 1e-6 * np.abs(expected).max()
