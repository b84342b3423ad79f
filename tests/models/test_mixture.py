"""Several teachers: probabilities are mixed, and one alone is itself."""

import pytest
import torch

from tokenkit.config import UserError
from tokenkit.eval.agreement import agreement
from tokenkit.eval.bits_per_byte import EvalConfig
from tokenkit.models.load import load_model
from tokenkit.models.mixture import MixtureView
from tokenkit.models.view import ModelView

NEEDS = {"logits", "label_logp", "entropy", "top_logp", "tail_logp"}


@pytest.fixture
def views(model_folder):
    first, second = (load_model(str(model_folder)) for _ in range(2))
    torch.manual_seed(3)
    for parameter in second.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return [ModelView(first), ModelView(second)]


@pytest.fixture
def ids():
    return torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(0))


def test_probabilities_are_mixed_not_logits(views, ids):
    with torch.no_grad():
        mixed = MixtureView(views, [3.0, 1.0]).leaves(NEEDS, ids, ids, top_k=5)
        plain = [view.leaves({"logits"}, ids, ids)["logits"].softmax(-1) for view in views]
    expected = 0.75 * plain[0] + 0.25 * plain[1]
    torch.testing.assert_close(mixed["logits"].exp(), expected)
    torch.testing.assert_close(mixed["entropy"], -(expected * expected.log()).sum(-1))
    torch.testing.assert_close(mixed["label_logp"], expected.gather(-1, ids.unsqueeze(-1)).squeeze(-1).log())
    both = torch.cat([mixed["top_logp"], mixed["tail_logp"].unsqueeze(-1)], -1)
    torch.testing.assert_close(both.logsumexp(-1), torch.zeros(2, 9), atol=1e-5, rtol=0)


def test_one_teacher_is_itself(views, ids):
    with torch.no_grad():
        alone = MixtureView(views[:1], [2.0]).leaves({"label_logp", "entropy"}, ids, ids)
        plain = views[0].leaves({"label_logp", "entropy"}, ids, ids)
    for name, value in plain.items():
        torch.testing.assert_close(alone[name], value)


def test_a_mixture_has_no_states(views, ids):
    with pytest.raises(UserError, match="asks for hidden of a mixture of 2 models"):
        MixtureView(views, [1.0, 1.0]).leaves({"hidden", "logits"}, ids, ids)


def test_agreement_with_oneself_and_with_another(views, bpe, documents):
    config = EvalConfig(source={"stdlib": "held_out"}, context_tokens=64)
    same = agreement(views[0], views[0], bpe, documents[:2], config)
    assert same.kl == pytest.approx(0, abs=1e-6)
    assert same.top1 == 1
    other = agreement(views[0], views[1], bpe, documents[:2], config)
    assert other.kl > 0.01
    assert other.num_tokens == same.num_tokens
    mixed = agreement(views[0], MixtureView(views, [1.0, 1.0]), bpe, documents[:2], config)
    assert 0 < mixed.kl < other.kl
