"""Label log-probabilities by other packages' GPU kernels: which of them can do a job, and how each is called.

cut-cross-entropy (Wijmans+ 2024, 2411.09009) never writes a logit to memory and adds gradients up in half precision;
liger-kernel (Hsu+ 2024, 2410.10989) holds the logits of some rows at a time, and those gradients in single precision.
"""

from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Literal

import torch
from jaxtyping import Float, Int
from packaging.version import Version
from torch import Tensor

Kernel = Literal["cut_cross_entropy", "liger_kernel"]
IGNORED = -1  # a label that both packages are told to score 0
# an older liger-kernel returns wrong gradients of single tokens' losses: it scales only their sum
OLDEST: dict[Kernel, str] = {"cut_cross_entropy": "25.1", "liger_kernel": "0.8.2"}


@cache
def installed() -> frozenset[Kernel]:
    """The packages that can be imported here, and are new enough."""
    if find_spec("triton") is None:
        return frozenset()
    return frozenset(name for name, oldest in OLDEST.items() if find_spec(name) and _version(name) >= Version(oldest))


def _version(name: Kernel) -> Version:
    try:
        return Version(version(name.replace("_", "-")))
    except PackageNotFoundError:  # a module of that name which no package put there
        return Version("0")


def choose(
    device: str,
    dtype: torch.dtype,
    *,
    bias: bool,
    softcap: bool,
    packages: frozenset[Kernel],
) -> Kernel | None:
    """The kernel for logits of this kind; None where our own tiles must do."""
    if device != "cuda":
        return None
    half = dtype in (torch.float16, torch.bfloat16)
    # with a soft cap cut-cross-entropy counts the columns that fill up its last block, as logits of -softcap
    if "cut_cross_entropy" in packages and half and not bias and not softcap:
        return "cut_cross_entropy"
    if "liger_kernel" in packages and (half or dtype == torch.float32):
        return "liger_kernel"
    return None


def label_logp(
    kernel: Kernel,
    hidden: Float[Tensor, "N D"],
    head: Float[Tensor, "V D"],
    labels: Int[Tensor, "N"],
    bias: Float[Tensor, "V"] | None,
    scale: float,
    softcap: float | None,
) -> Float[Tensor, "N"]:
    """Log-probability of each label under cap(scale * (head @ hidden + bias)), in nats; a label below 0 is scored 0."""
    targets = labels.clamp_min(IGNORED).long()
    if scale != 1:
        hidden = hidden * scale
        bias = None if bias is None else bias * scale
    if kernel == "cut_cross_entropy":
        # every gradient counts: by default it leaves out blocks of small ones
        options = {"ignore_index": IGNORED, "reduction": "none", "filter_eps": None}
        return -import_module("cut_cross_entropy").linear_cross_entropy(hidden, head, targets, **options)
    return -import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy(
        hidden,
        head.to(hidden.dtype),
        targets,
        bias=None if bias is None else bias.to(hidden.dtype),
        ignore_index=IGNORED,
        reduction="none",
        softcap=softcap,
        accum_dtype=torch.float32,
    )
