"""`alm` and `clm` against stored values and gradients of the corrected published formulas, float64 and float32."""

import json

import numpy as np
import pytest
import torch

from tokenkit.losses import LOSSES
from tokenkit.quantities import Quantities, token_scores

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


@pytest.fixture(scope="module")
def golden(shared):
    def read(name):
        with np.load(shared / "golden" / f"{name}.npz") as arrays:
            return {key: arrays[key] for key in arrays.files}

    return read


def shifted(array, fill):
    """What belongs to token t moves to position t - 1, whose logits predict it."""
    return np.concatenate([array[:, 1:], np.full_like(array[:, :1], fill)], 1)


def side_tensors(data, side, chunk_kind, mode, dtype):
    rows = int(data["batch_rows"])
    ids, masked_in = data[f"ids_{side}"][:rows], data[f"loss_mask_{side}"][:rows]
    chunk = data[f"chunk_id_{side}_{chunk_kind}"][:rows].astype(np.int64)
    scored = masked_in & (chunk >= 0)
    columns = min(data["ids_teacher"].shape[1], data["ids_student"].shape[1])
    end = np.full((rows, columns), -1)
    for row, position in zip(*np.nonzero(scored)):
        end[row, chunk[row, position]] = position  # logits at the chunk's last token give what follows it
    boundary = data[f"space_mask_{side}"].copy()
    if "eos_as_space" in mode:
        boundary[:] = False
        boundary[data[f"eos_id_{side}"]] = True
    logits = data[f"{side}_logits"] if f"{side}_logits" in data else data[f"{side}_logits_f16"]
    logits = torch.tensor(logits, dtype=dtype).requires_grad_(side == "student")
    masked = logits + torch.tensor(data[f"logit_mask_{side}"], dtype=dtype)
    label_logp, boundary_logp = token_scores(
        masked,
        torch.eye(masked.shape[-1], dtype=dtype),
        torch.tensor(shifted(ids, 0).astype(np.int64)),
        torch.tensor(boundary),
    )
    tensors = {
        "label_logp": label_logp,
        "boundary_logp": boundary_logp,
        "chunk": torch.tensor(shifted(np.where(scored, chunk, -1), -1)),
        "chunk_end": torch.tensor(end),
    }
    return logits, {f"{side}_{name}": tensor for name, tensor in tensors.items()}


def run_case(data, case, both_sides, dtype, divergence=None):
    student_logits, student = side_tensors(data, "student", case["chunk_kind"], case["alm_mode"], dtype)
    _, teacher = side_tensors(data, "teacher", case["chunk_kind"], case["alm_mode"], dtype)
    options = {
        "temperature": case["tau"] or 1.0,
        "divergence": divergence or NAMES[case["diff_fn"]],
        "debias": "append_space" in case["alm_mode"],
        "merge": "merge_by_space_prob" in case["alm_mode"],
        "threshold": float(data["gamma"]),
        "both_sides": both_sides,
        "renyi_order": 0.5,
    }
    tensors = Quantities(student, teacher)
    mask = LOSSES["alm"].mask(tensors, options)
    total = (LOSSES["alm"].values(tensors, options) * mask).sum()
    (gradient,) = torch.autograd.grad(total, student_logits)
    return total.item(), mask.sum().item(), gradient.numpy()


def plain(case):
    weighting = (case["numerator"], case["denominator"], case["chunk_sizes"])
    return weighting == ("chunk_count", "chunk_count", [1])


INSTANCES = ("dense", "asym", "holes", "microbatch", "extreme")


@pytest.mark.parametrize("variant", ["corrected", "strict"])
@pytest.mark.parametrize("instance", INSTANCES)
def test_every_case_float64(golden, shared, instance, variant):
    data = golden(f"A_alm_{instance}")
    cases = json.loads((shared / "golden/A_alm_cases.json").read_text("utf-8"))["instances"][instance]["cases"]
    compared = 0
    for case in filter(plain, cases):
        i = case["i"]
        value, weight, gradient = run_case(data, case, variant == "strict", torch.float64)
        assert weight == pytest.approx(data[f"weight_{variant}"][i]), case
        assert value == pytest.approx(data[f"sum_{variant}"][i], rel=1e-7, abs=1e-12), case
        expected = stored_gradient(data, i, variant)
        scale = data[f"value_{variant}"][i] / data[f"sum_{variant}"][i]
        assert np.abs(gradient * scale - expected).max() <= 1e-6 * max(np.abs(expected).max(), 1e-12), case
        compared += 1
    assert compared >= 150


def stored_gradient(data, i, variant):
    """The gradient of a variant is stored only where it differs from the one before it in the chain."""
    for name in ["strict", "corrected"][0 if variant == "strict" else 1 :]:
        index = list(data[f"grad_{name}_index"])
        if i in index:
            return data[f"grad_{name}"][index.index(i)]
    return data["grad_upstream"][i]


@pytest.mark.parametrize("instance", ["dense", "extreme"])
def test_float32_stays_within_its_tolerance(golden, shared, instance):
    data = golden(f"A_alm_{instance}")
    cases = json.loads((shared / "golden/A_alm_cases.json").read_text("utf-8"))["instances"][instance]["cases"]
    for case in list(filter(plain, cases))[::3]:
        i = case["i"]
        value, _, gradient = run_case(data, case, False, torch.float32)
        assert value == pytest.approx(data["sum_corrected"][i], rel=2e-4, abs=1e-6), case
        expected = stored_gradient(data, i, "corrected")
        scale = data["value_corrected"][i] / data["sum_corrected"][i]
        assert np.abs(gradient * scale - expected).max() <= 1e-4 * np.abs(expected).max() + 1e-9, case


def test_kl_is_cross_entropy_less_entropy_with_the_same_gradient(golden, shared):
    data = golden("A_alm_dense")
    cases = json.loads((shared / "golden/A_alm_cases.json").read_text("utf-8"))["instances"]["dense"]["cases"]
    for case in [c for c in cases if plain(c) and c["diff_fn"] == "binary_ce"]:
        kl, _, gradient = run_case(data, case, True, torch.float64, "kl")
        ce, _, expected = run_case(data, case, True, torch.float64, "ce")
        assert 0 <= kl < ce
        np.testing.assert_allclose(gradient, expected, atol=1e-12)


def test_end_to_end_on_text(golden, shared):
    data = golden("A_alm_e2e_bpe1k")
    cases = json.loads((shared / "golden/A_alm_e2e_cases.json").read_text("utf-8"))["cases"]
    for case in filter(plain, cases):
        i = case["i"]
        value, weight, gradient = run_case(data, case, False, torch.float64)
        assert value / weight == pytest.approx(data["value_corrected"][i], rel=1e-7), case
        row, position, token = data["grad_coords"].T
        found = gradient[row, position, token] / weight
        expected = data["grad_corrected_at_coords"][i]
        assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max(), case
        norm = np.linalg.norm(gradient / weight)
        assert norm == pytest.approx(data["grad_corrected_l2"][i], rel=1e-6), case


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
