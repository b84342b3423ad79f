"""Which kernel does which job, and that each is told what it documents: against the dense way, by stand-ins.

A stand-in has the package's signature and limits and computes in plain torch; on a GPU the package itself is run.
"""

import sys
from importlib.metadata import PackageNotFoundError
from types import ModuleType

import pytest
import torch
from torch.nn.functional import cross_entropy

from tokenkit import fused
from tokenkit.scores import NO_LABEL, LogitForm, token_scores, token_scores_dense

BOTH = frozenset(fused.OLDEST)
CCE, LIGER = "cut_cross_entropy", "liger_kernel"
PLAIN = {"bias": False, "softcap": False}


@pytest.mark.parametrize(
    "device, dtype, kind, packages, expected",
    [
        ("cuda", torch.bfloat16, {}, BOTH, CCE),
        ("cuda", torch.float16, {}, BOTH, CCE),
        ("cuda", torch.bfloat16, {}, {LIGER}, LIGER),
        ("cuda", torch.bfloat16, {"bias": True}, BOTH, LIGER),
        ("cuda", torch.bfloat16, {"softcap": True}, BOTH, LIGER),
        ("cuda", torch.float32, {}, BOTH, LIGER),
        ("cuda", torch.bfloat16, {"bias": True}, {CCE}, None),
        ("cuda", torch.bfloat16, {"softcap": True}, {CCE}, None),
        ("cuda", torch.float32, {}, {CCE}, None),
        ("cuda", torch.float64, {}, BOTH, None),
        ("cuda", torch.bfloat16, {}, set(), None),
        ("cpu", torch.bfloat16, {}, BOTH, None),
        ("mps", torch.bfloat16, {}, BOTH, None),
    ],
)
def test_the_choice(device, dtype, kind, packages, expected):
    assert fused.choose(device, dtype, **{**PLAIN, **kind}, packages=frozenset(packages)) == expected


@pytest.mark.parametrize(
    "present, versions, expected",
    [
        ({"triton", CCE, LIGER}, {"cut-cross-entropy": "25.1.1", "liger-kernel": "0.8.5"}, {CCE, LIGER}),
        ({CCE, LIGER}, {"cut-cross-entropy": "25.1.1", "liger-kernel": "0.8.5"}, set()),
        ({"triton", LIGER}, {"liger-kernel": "0.8.0"}, set()),  # wrong gradients
        ({"triton", LIGER}, {"liger-kernel": "0.10.0"}, {LIGER}),
        ({"triton", CCE}, {}, set()),
        ({"triton"}, {}, set()),
    ],
)
def test_what_counts_as_installed(monkeypatch, present, versions, expected):
    def version(name):
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(fused, "find_spec", lambda name: object() if name in present else None)
    monkeypatch.setattr(fused, "version", version)
    assert fused.installed.__wrapped__() == expected


def linear_cross_entropy(
    e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False, filter_eps="high"
):
    assert e.dtype in (torch.float16, torch.bfloat16)
    assert c.dtype in (torch.float16, torch.bfloat16, torch.float32)
    assert e.shape[:-1] == targets.shape
    assert not shift
    assert filter_eps is None
    return _losses(e, c, None, targets, ignore_index, softcap, reduction)


def liger_fused_linear_cross_entropy(
    input, weight, target, bias=None, *, ignore_index=-100, reduction="mean", softcap=None, accum_dtype=None
):
    assert input.ndim == weight.ndim == 2
    assert target.ndim == 1
    assert input.dtype == weight.dtype != torch.float64
    assert bias is None or bias.dtype == input.dtype
    assert accum_dtype == torch.float32
    return _losses(input, weight, bias, target, ignore_index, softcap, reduction)


def _losses(hidden, head, bias, targets, ignore_index, softcap, reduction):
    assert reduction == "none"
    assert targets.dtype == torch.int64
    logits = hidden.float() @ head.to(hidden.dtype).float().T
    logits = logits if bias is None else logits + bias.float()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")  # refuses other negative labels


@pytest.fixture
def stand_ins(monkeypatch):
    """Both packages, on a CPU that counts as a GPU."""
    packages = {CCE: linear_cross_entropy, "liger_kernel.transformers.functional": liger_fused_linear_cross_entropy}
    for name, function in packages.items():
        module = ModuleType(name)
        monkeypatch.setattr(module, function.__name__, function, raising=False)
        monkeypatch.setitem(sys.modules, name, module)
    choose = fused.choose
    monkeypatch.setattr(fused, "choose", lambda device, dtype, **kind: choose("cuda", dtype, **kind))
    return lambda *names: monkeypatch.setattr(fused, "installed", lambda: frozenset(names))


def problem(dtype, head_dtype, device="cpu", width=8, vocabulary=41):
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(3, 5, width, generator=generator) * 2).to(device, dtype).requires_grad_()
    head = torch.randn(vocabulary, width, generator=generator).to(device, head_dtype).requires_grad_()
    bias = torch.randn(vocabulary, generator=generator).to(device, head_dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (3, 5), generator=generator)
    labels[0, 1], labels[2, 4] = -1, -100
    return hidden, head, bias, labels.to(device)


def compare(hidden, head, labels, form, inputs, tolerance):
    """`token_scores` and its gradients beside the dense way in double precision."""
    found, mass = token_scores(hidden, head, labels, None, form)
    logits = form(hidden.double() @ head.double().T)
    expected, _ = token_scores_dense(logits, labels)
    assert found.shape == labels.shape
    assert found.dtype == mass.dtype == torch.float32
    assert (found[labels < 0] == 0).all()
    assert (mass == 0).all()
    weights = torch.linspace(-1, 2, labels.numel(), device=labels.device).view(labels.shape)
    gradients = torch.autograd.grad((weights * found).sum(), inputs)
    right = torch.autograd.grad((weights * expected).sum(), inputs)
    for a, b in [(found, expected), *zip(gradients, right)]:
        assert (a.double() - b.double()).abs().max() <= tolerance * b.abs().max()
    assert [g.dtype for g in gradients] == [t.dtype for t in inputs]


@pytest.mark.parametrize("form", ["plain", "bias", "scale", "softcap", "all"])
@pytest.mark.parametrize(
    "package, dtype, head_dtype",
    [
        (CCE, torch.bfloat16, torch.bfloat16),
        (CCE, torch.float16, torch.float32),
        (LIGER, torch.float32, torch.float32),
        (LIGER, torch.bfloat16, torch.float32),
    ],
)
def test_conventions(stand_ins, package, dtype, head_dtype, form):
    stand_ins(package)
    hidden, head, bias, labels = problem(dtype, head_dtype)
    bias = bias if form in ("bias", "all") else None
    softcap = 3.0 if form in ("softcap", "all") else None
    form = LogitForm(bias, 0.4 if form in ("scale", "all") else 1.0, softcap)
    inputs = [hidden, head] if bias is None else [hidden, head, bias]
    compare(hidden, head, labels, form, inputs, 1e-5 if dtype == torch.float32 else 3e-2)


def test_a_token_set_is_added_up_by_our_own_tiles(stand_ins, monkeypatch):
    stand_ins(CCE, LIGER)
    monkeypatch.setattr(fused, "label_logp", lambda *_: pytest.fail("another package was asked"))
    hidden, head, _, labels = problem(torch.float32, torch.float32)
    boundary, labels = torch.arange(len(head)) < 9, labels.clamp_min(NO_LABEL)  # of what is below no mass is read
    for a, b in zip(
        token_scores(hidden, head, labels, boundary), token_scores_dense(hidden @ head.T, labels, boundary)
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("form", ["plain", "bias", "scale", "softcap", "all"])
@pytest.mark.parametrize("package", [CCE, LIGER])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_package_itself(monkeypatch, package, dtype, form):
    if package not in fused.installed():
        pytest.skip(f"{package} is not installed")
    kind = {"bias": form in ("bias", "all"), "softcap": form in ("softcap", "all")}
    if fused.choose("cuda", dtype, **kind, packages=frozenset({package})) is None:
        pytest.skip(f"{package} does not do this; our own tiles do")
    monkeypatch.setattr(fused, "installed", lambda: frozenset({package}))
    hidden, head, bias, labels = problem(dtype, torch.float32, "cuda", width=64, vocabulary=1000)
    form = LogitForm(
        bias if kind["bias"] else None,
        0.4 if form in ("scale", "all") else 1.0,
        3.0 if kind["softcap"] else None,
    )
    inputs = [hidden, head, bias] if kind["bias"] else [hidden, head]
    compare(hidden, head, labels, form, inputs, 5e-2 if dtype == torch.bfloat16 else 5e-3)
    nothing, _ = token_scores(hidden, head, torch.full_like(labels, -1), None, form)
    assert all((g == 0).all() for g in torch.autograd.grad(nothing.sum(), inputs))
