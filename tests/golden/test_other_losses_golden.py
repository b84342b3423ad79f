"""Hidden states, DSKD, ULD, MinED and the divergences against stored values and gradients, corrected where they err.

Every stored case is compared, in float64 and float32. Stored positions are those of tokens, ours those that predict.
"""

import json

import numpy as np
import pytest
import torch
from torch.nn.functional import linear

from tokenkit.losses import LOSSES
from tokenkit.losses.divergences import divergence
from tokenkit.models.projectors import DualSpace
from tokenkit.quantities import Quantities

SIDES = ("student", "teacher")
DTYPES = {"float64": torch.float64, "float32": torch.float32}
TOLERANCE = {"float64": (1e-7, 1e-6), "float32": (2e-4, 1e-4)}  # values; gradients, of the largest entry


@pytest.fixture(scope="module")
def cases(shared):
    return json.loads((shared / "golden/A_other_cases.json").read_text("utf-8"))["cases"]


def defaults(name, **changes):
    return {option: p.default for option, p in LOSSES[name].options.items()} | changes


def mean(name, tensors, options):
    """The loss as a step of this one microbatch has it; the sums of its parts over their counts."""
    entry = LOSSES[name]
    tensors = Quantities(tensors, entry.step_mean_of([tensors], options))
    units = entry.units_of(tensors, options)
    sums, counts = units.sums(entry.values(tensors, options)), units.counts()
    return (sums / counts.clamp_min(1)).sum(), sums, counts


def shifted(array, fill):
    """What belongs to token t moves to position t - 1, whose logits predict it."""
    return np.concatenate([array[:, 1:], np.full_like(array[:, :1], fill)], 1)


def assert_gradient(found, expected, precision):
    error = np.abs(found.double().numpy() - expected).max()
    assert error <= TOLERANCE[precision][1] * max(np.abs(expected).max(), 1e-9)


def ends(chunk, columns):
    """Last token of each chunk."""
    end = np.full((len(chunk), columns), -1)
    for row, position in zip(*np.nonzero(chunk >= 0)):
        end[row, chunk[row, position]] = position
    return torch.tensor(end)


STATES = {"last_hidden_state": "last", "all_hidden_states": "all", "qkv": "qkv"}


class Latents:
    """One stored instance of hidden states, as the tensors of one microbatch."""

    def __init__(self, data, dtype, kind):
        self.rows = int(data["batch_rows"])
        floats = {key: torch.tensor(data[key], dtype=dtype) for key in data if key.startswith(("student_", "teacher_"))}
        self.hidden, self.small, self.qkv = (
            floats[f"student_{name}"].requires_grad_() for name in ("hidden", "hidden_small", "qkv")
        )
        self.maps = [torch.tensor(data[f"projector_{n}"], dtype=dtype).requires_grad_() for n in ("kernel", "bias")]
        every = {
            side: ends(data[f"chunk_id_{side}_{kind}"].astype(int), data[f"align_{side}_{kind}"].shape[-1])
            for side in SIDES
        }
        self.counted = ((every["student"] >= 0) & (every["teacher"] >= 0)).double().mean().item()
        teacher = floats["teacher_hidden"]
        self.tensors = {
            **{f"{side}_chunk_end": end[: self.rows] for side, end in every.items()},
            "teacher_hidden": teacher[-1],
            "student_hidden": self.hidden[-1],
            "teacher_layers": teacher.permute(1, 2, 0, 3),
            "student_layers": self.hidden.permute(1, 2, 0, 3),
            "teacher_qkv": floats["teacher_qkv"].permute(1, 2, 0, 3),
            "student_qkv": self.qkv.permute(1, 2, 0, 3),
            "student_projected_hidden": linear(self.small[-1], self.maps[0].T, self.maps[1]),
            # the chunks are those of the kind: what the option `chunks` would leave out is left out already
            "space_after": torch.ones_like(every["student"][: self.rows], dtype=torch.bool),
        }

    def value(self, case):
        """Divided by the stored batch's count of chunks; two kinds of states are two losses, added."""
        total = 0.0
        for name in case["latents_to_align"].split("+"):
            options = defaults("hidden_states", states=STATES[name], normalization=case["latents_normalization"])
            options |= {"project": case["latents_do_project"], "chunks": case["latents_chunks"]}
            _, sums, _ = mean("hidden_states", Quantities(self.tensors), options)
            total = total + sums.sum()
        return total / (self.tensors["space_after"].numel() * self.counted)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", ["dense", "asym", "microbatch"])
def test_hidden_states(golden, cases, name, precision):
    data = golden(f"A_latents_{name}")
    compared = 0
    for i, case in enumerate(cases[f"latents_{name}"]):
        kind = "unconstrained" if case["latents_chunks"] == "naive" else "space"
        found = Latents(data, DTYPES[precision], kind)
        value = found.value(case)
        assert value.item() == pytest.approx(data["value_loop"][i], rel=TOLERANCE[precision][0]), case
        inputs = {"hidden": found.hidden, "qkv": found.qkv, "hidden_small": found.small}
        inputs |= dict(zip(("projector_kernel", "projector_bias"), found.maps))
        gradients = torch.autograd.grad(value, list(inputs.values()), allow_unused=True, materialize_grads=True)
        for key, gradient in zip(inputs, gradients):
            index = list(data["grad_{}_index".format({"hidden": "hidden", "qkv": "qkv"}.get(key, "projected"))])
            if i in index:
                assert_gradient(gradient, data[f"grad_{key}"][index.index(i)], precision)
                compared += 1
    assert i + 1 == 32
    stored = {"hidden": 1, "qkv": 1, "projected": 3}
    assert compared == sum(len(data[f"grad_{key}_index"]) * tensors for key, tensors in stored.items())


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("number", [0, 1])
def test_uld_as_published(golden, number, precision):
    data, dtype = golden(f"A_uld_{number}"), DTYPES[precision]
    student = torch.tensor(data["student_logits"], dtype=dtype, requires_grad=True)
    mask = torch.tensor(data["attention_mask_student"])
    logits = [student + torch.tensor(data["logit_mask_student"], dtype=dtype)]
    logits += [torch.tensor(data["teacher_logits"] + data["logit_mask_teacher"], dtype=dtype)]
    values = LOSSES["uld"].fn(*logits, positions="positional", temperature=1.0)
    value = values[mask].mean()
    assert value.item() == pytest.approx(float(data["value_loop"]), rel=TOLERANCE[precision][0])
    assert_gradient(torch.autograd.grad(value, student)[0], data["grad"], precision)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", ["dense", "holes", "microbatch", "asym"])
def test_mined(golden, name, precision):
    data, dtype = golden(f"A_mined_{name}"), DTYPES[precision]
    rows = int(data["batch_rows"])
    student = torch.tensor(data["student_logits"], dtype=dtype, requires_grad=True)
    tensors = {}
    for side, logits in (("student", student), ("teacher", torch.tensor(data["teacher_logits"], dtype=dtype))):
        chunk = data[f"chunk_id_{side}_unconstrained"].astype(int)
        columns = data[f"align_{side}_unconstrained"].shape[-1]
        # as published, a token belongs to its chunk if the one after it is learnt, or if there is none after it
        kept = np.concatenate([data[f"loss_mask_{side}"][:, 1:], np.ones_like(chunk[:, :1], bool)], 1)
        inside = np.where(kept, chunk, -1)
        scored = inside.copy()
        scored[:, 0] = -1  # given, never scored
        follows = np.arange(chunk.shape[1]) < chunk.shape[1] - 1
        tensors |= {
            f"{side}_logits": logits + torch.tensor(data[f"logit_mask_{side}"], dtype=dtype),
            f"{side}_labels": torch.tensor(shifted(data[f"ids_{side}"], 0).astype(int)[:rows]),
            f"{side}_label_mask": torch.tensor(shifted(data[f"loss_mask_{side}"], False)[:rows]),
            f"{side}_token_mask": torch.tensor(follows).expand(rows, -1),
            f"{side}_chunk": torch.tensor(shifted(scored, -1)[:rows]),
            f"{side}_chunk_end": ends(inside, columns)[:rows],
        }
    ids = torch.full((student.shape[-1],), -1)
    ids[: len(data["mined_mapping"])] = torch.tensor(data["mined_mapping"].astype(int))
    tensors["mined_ids"] = ids
    for i, temperature in enumerate(data["kd_temp"]):
        _, sums, counts = mean("mined", Quantities(tensors), defaults("mined", temperature=float(temperature)))
        assert sums.item() == pytest.approx(data["loop_sum"][i], rel=TOLERANCE[precision][0])
        assert counts.item() == data["loop_n_one_to_one"][i] + data["loop_n_onehot"][i]
        (gradient,) = torch.autograd.grad(sums.sum(), student, retain_graph=True)
        assert_gradient(gradient, data["grad_of_sum"][i], precision)


NAMES = {
    "forward": "kl",
    "reverse": "reverse_kl",
    "skewed_forward": "skewed_kl",
    "skewed_reverse": "skewed_reverse_kl",
    "adaptive": "adaptive_kl",
    "js": "js",
}


def diverge(data, case, dtype, suffix):
    """The student's logits of a stored case, and the divergence at each position."""
    scale = case["kd_temp"]
    teacher_scale = scale * case["tea_temp"] if case["use_tea_temp"] else scale
    options = {"skew": case.get("skew_lambda", 0.1), "adaptive_alpha": case.get("alpha", 0.5)}
    student = torch.tensor(data[f"student_logits{suffix}"], dtype=dtype, requires_grad=True)
    teacher = torch.tensor(data[f"teacher_logits{suffix}"], dtype=dtype)
    return student, divergence(NAMES[case["fn"]], teacher / teacher_scale, student / scale, **options)


@pytest.mark.parametrize("precision", DTYPES)
def test_divergences(golden, cases, precision):
    data, dtype = golden("A_kl"), DTYPES[precision]
    for i, case in enumerate(cases["kl"]):
        student, values = diverge(data, case, dtype, "")
        expected = data["value_per_position"][i]
        rel = TOLERANCE[precision][0]
        np.testing.assert_allclose(values.detach().double().numpy(), expected, rtol=rel, atol=rel, err_msg=str(case))
        assert_gradient(torch.autograd.grad(values.sum(), student)[0], data["grad_of_position_sum"][i], precision)
        student, values = diverge(data, case, dtype, "_inf")
        stored = data["value_per_position_inf"][i]
        assert torch.isfinite(values).all()
        (gradient,) = torch.autograd.grad(values.sum(), student)
        assert torch.isfinite(gradient).all()
        known = np.isfinite(stored)
        np.testing.assert_allclose(values.detach().double().numpy()[known], stored[known], rel, rel, err_msg=str(case))
    assert i + 1 == 36


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", ["unpadded_vocab", "padded_vocab"])
def test_dskd(golden, cases, name, precision):
    data, dtype = golden(f"A_dskd_{name}"), DTYPES[precision]
    kinds = {"akl": "adaptive_kl", "skl": "skewed_kl", "srkl": "skewed_reverse_kl", "kl": "kl", "rkl": "reverse_kl"}
    names = ("student_embeds", "student_last_hidden", "student_logits")
    for i, case in enumerate(cases[f"dskd_{name}"]):
        of = {key: torch.tensor(data[key], dtype=dtype) for key in data if data[key].dtype == np.float32}
        for key in names:
            of[key].requires_grad_()
        module = DualSpace(of["student_embeds"].shape[-1], of["teacher_embeds"].shape[-1]).to(dtype)
        maps = {"query": module.query, "t2s": module.to_student, "s2t": module.to_teacher}
        with torch.no_grad():
            for key, layer in maps.items():
                layer.weight.copy_(of[f"{key}_kernel"].T)
                layer.bias.copy_(of[f"{key}_bias"])
        rows = int(data["batch_rows"])
        masks = {}
        for side in SIDES:
            masks[side] = torch.tensor(data[f"attention_mask_{side}"])[:rows].clone()
            masks[side] = masks[side] & torch.tensor(shifted(data[f"attention_mask_{side}"], False))[:rows]
        t = of["teacher_embeds"]
        read = (torch.cat([t[:, :-1], t[:, 1:]], -1), of["teacher_last_hidden"][:, :-1], t[:, 1:])
        deviations = torch.stack([states.std(correction=0) for states in read])
        to_student, to_teacher = module(
            of["student_last_hidden"], of["student_embeds"], masks["student"],
            of["teacher_last_hidden"], of["teacher_embeds"], masks["teacher"], deviations,
        )  # fmt: skip
        pad = {side: of[f"logit_mask_{side}"] for side in SIDES}
        tensors = {
            "student_logits": of["student_logits"] + pad["student"],
            "teacher_logits": of["teacher_logits"] + pad["teacher"],
            "dual_student_logits": to_student @ of["predicted_embeddings"][:, 1].T + pad["student"],
            "dual_teacher_logits": to_teacher @ of["teacher_embeddings"][:, 1].T + pad["teacher"],
            "student_labels": torch.tensor(shifted(data["ids_student"], 0).astype(int))[:rows],
            "student_label_mask": torch.tensor(shifted(data["loss_mask_student"], False))[:rows],
            "teacher_label_mask": torch.tensor(shifted(data["loss_mask_teacher"], False))[:rows],
        }
        options = defaults(
            "dskd", divergence=kinds[case["divergence"]], temperature=case["kd_temp"],
            teacher_temperature=case["teacher_temperature"], skew=case["skew_lambda"],
            adaptive_alpha=case["adaptive_kl_alpha"],
        )  # fmt: skip
        entry = LOSSES["dskd"]
        units = entry.units_of(tensors, options)
        counts = units.counts()
        if case["denominators"] == "global":  # those of a batch of which these are the first rows
            for part, side in ((0, "student"), (2, "teacher")):
                counts[part] = data[f"loss_mask_{side}"][:, 1:].mean() * rows * (data[f"loss_mask_{side}"].shape[1] - 1)
        parts = units.sums(entry.values(tensors, options)) / counts.to(dtype)
        rel = TOLERANCE[precision][0]
        for key, part in zip(("t2s_ce", "t2s_kd", "s2t_kd"), parts.tolist()):
            assert part == pytest.approx(data[f"{key}_loss_corrected"][i], rel=rel), (key, case)
        assert parts.sum().item() == pytest.approx(data["value_corrected_f64"][i], rel=rel)
        inputs = {name: of[name] for name in names} | {f"{key}_kernel": layer.weight for key, layer in maps.items()}
        inputs |= {f"{key}_bias": layer.bias for key, layer in maps.items()}
        for key, gradient in zip(inputs, torch.autograd.grad(parts.sum(), list(inputs.values()))):
            found = gradient.T if key.endswith("kernel") else gradient
            assert_gradient(found, data[f"grad_corrected__{key}"][i], precision)
    assert i + 1 == 20
