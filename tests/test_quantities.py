"""Every fast quantity against the slow, obvious way."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenkit.quantities import Quantities, inputs_of, leaves_of


@given(st.lists(st.integers(-1, 5), min_size=1, max_size=12), st.integers(0, 1000))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_chunk_sums_equal_a_double_loop(chunk, seed):
    label_logp = -torch.rand(1, len(chunk), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    tensors = Quantities(
        {
            "student_label_logp": label_logp,
            "student_boundary_logp": label_logp * 2,
            "student_eos_logp": label_logp * 3,
            "student_chunk": torch.tensor([chunk]),
            "student_chunk_end": torch.tensor([[len(chunk) - 1 if c == 2 else -1 for c in range(6)]]),
        }
    )
    for c in range(6):
        inside = [label_logp[0, t].item() for t, owner in enumerate(chunk) if owner == c]
        assert tensors["student_chunk_logp"][0, c].item() == pytest.approx(sum(inside))
        assert tensors["student_chunk_tokens"][0, c].item() == len(inside)
    assert tensors["student_chunk_boundary_logp"][0, 2] == 2 * label_logp[0, -1]
    assert tensors["student_chunk_eos_logp"][0, 2] == 3 * label_logp[0, -1]


def test_names_lead_to_leaves():
    assert inputs_of("student_chunk_logp") == ["student_label_logp", "student_chunk", "student_chunk_end"]
    assert leaves_of({"chunk_mask"}) == {f"{s}_{n}" for s in ("student", "teacher") for n in ("chunk", "chunk_end")}
    with pytest.raises(KeyError, match="no quantity is called 'student_chunk_lgop'"):
        inputs_of("student_chunk_lgop")
    with pytest.raises(KeyError, match="did not yield 'teacher_logits'"):
        Quantities({})["teacher_logits"]
