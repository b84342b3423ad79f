"""Low-rank adapters put on a model from outside. Hu+ 2021, 2106.09685.

Also with a scale over the root of the rank (rsLoRA, Kalajdzievski 2023, 2312.03732) and with magnitudes (DoRA, Liu+
2024, 2402.09353). `lora_targets` says which layers get one, `lora_whole` trains modules whole beside them, and
`lora_files` has the files.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tokenkit.config import UserError
from tokenkit.models.lora_targets import target_layers, whole_modules
from tokenkit.models.lora_whole import Whole, forget_originals, train_whole, whole


class LoRALinear(nn.Module):
    """x -> W x + b + scale B A dropout(x), or with magnitudes m: the rows of W + scale B A, each as long as m says.

    W and b keep their names and the way they lie in memory (a Conv1D has its matrix transposed); A, B and m are at
    least float32. The scale is alpha / rank, or alpha over the root of the rank.
    """

    def __init__(
        self,
        base: nn.Linear | Conv1D,
        *,
        rank: int,
        alpha: int | float,
        dropout: float = 0.0,
        rslora: bool = False,
        dora: bool = False,
    ) -> None:
        super().__init__()
        self.transposed = isinstance(base, Conv1D)
        self.weight, self.bias = base.weight, base.bias
        self.out_features, self.in_features = self.matrix().shape
        self.rank, self.alpha, self.rslora, self.enabled = rank, alpha, rslora, True
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)
        device, dtype = base.weight.device, torch.promote_types(base.weight.dtype, torch.float32)
        self.dropout = nn.Dropout(dropout)
        self.lora_A = nn.Linear(self.in_features, rank, bias=False, device=device, dtype=dtype)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False, device=device, dtype=dtype)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.lora_magnitude_vector = nn.Parameter(self.lengths()) if dora else None

    def matrix(self) -> Float[Tensor, "O I"]:
        """The weight as output times input."""
        return self.weight.T if self.transposed else self.weight

    def forward(self, x: Float[Tensor, "*N I"]) -> Float[Tensor, "*N O"]:
        plain = self._linear(x, self.bias)
        if not self.enabled:
            return plain
        dropped = self.dropout(x)
        update = self.lora_B(self.lora_A(dropped.to(self.lora_A.weight.dtype))) * self.scale
        magnitude = self.lora_magnitude_vector
        if magnitude is None:
            return plain + update.to(plain.dtype)
        factor = magnitude / self.lengths()
        if self.training and self.dropout.p:
            own = self._linear(dropped, None)
        else:
            own = plain if self.bias is None else plain - self.bias
        return plain + ((factor - 1) * own + factor * update).to(plain.dtype)

    def _linear(self, x: Float[Tensor, "*N I"], bias: Tensor | None) -> Float[Tensor, "*N O"]:
        if not self.transposed:
            return nn.functional.linear(x, self.weight, bias)
        rows = x.reshape(-1, self.in_features)  # as Conv1D does it, to the bit
        product = rows @ self.weight if bias is None else torch.addmm(bias, rows, self.weight)
        return product.view(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def lengths(self) -> Float[Tensor, "O"]:
        """Of the rows of W + scale B A; the paper takes them for constants, and so no gradient goes through them."""
        with torch.autocast(self.weight.device.type, enabled=False):
            return self._sum().norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)  # a row of zeros stays one

    def _sum(self) -> Float[Tensor, "O I"]:
        update = (self.lora_B.weight @ self.lora_A.weight) * self.scale
        return self.matrix().to(update.dtype) + update

    def adapter(self) -> dict[str, Tensor]:
        """What is learnt, under the names that it has in files."""
        found: dict[str, Tensor] = {"lora_A.weight": self.lora_A.weight, "lora_B.weight": self.lora_B.weight}
        if self.lora_magnitude_vector is not None:
            found["lora_magnitude_vector"] = self.lora_magnitude_vector
        return found

    @torch.no_grad()
    def merged(self) -> nn.Linear | Conv1D:
        """A plain layer over the same parameters, the update put into the weight in place."""
        with torch.device("meta"):
            made = (
                Conv1D(self.out_features, self.in_features)
                if self.transposed
                else nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
            )
        sum_ = self._sum()
        if self.lora_magnitude_vector is not None:
            sum_ *= (self.lora_magnitude_vector / self.lengths()).unsqueeze(1)
        self.matrix().copy_(sum_.to(self.weight.dtype))
        assert isinstance(self.weight, nn.Parameter)
        made.weight, made.bias = self.weight, self.bias
        return made.train(self.training)


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers of a model by dotted name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def attach_lora(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: int | float,
    dropout: float = 0.0,
    targets: Sequence[str] | Literal["all-linear"] = "all-linear",
    target_regex: Sequence[str] = (),
    layers: Sequence[str] = (),
    rslora: bool = False,
    dora: bool = False,
    modules_to_save: Sequence[str] = (),
    originals: bool = True,
) -> list[str]:
    """Freezes the model, adapts the linear layers that are chosen (see `target_layers`), and returns their names.

    Modules that are trained whole remember what they were, for `lora_disabled`, unless `originals` is false. Embedding
    and output matrix never do: a view has tables for those.
    """
    if rank < 1:
        raise UserError(f"lora rank: {rank}, where a whole number from 1 is needed")
    if adapters(model):
        raise UserError("lora: the model already has adapters; merge them first")
    saved = whole_modules(model, modules_to_save)
    names = target_layers(model, targets=targets, target_regex=target_regex, layers=layers, leave_out=saved)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    model.requires_grad_(False)
    for name in names:
        base = model.get_submodule(name)
        assert isinstance(base, (nn.Linear, Conv1D))
        adapter = LoRALinear(base, rank=rank, alpha=alpha, dropout=dropout, rslora=rslora, dora=dora)
        model.set_submodule(name, adapter.train(model.training))
    for name in saved:
        module = model.get_submodule(name)
        train_whole(module, originals=originals and module not in ends)
    return names


@contextmanager
def lora_disabled(model: nn.Module) -> Iterator[None]:
    """Inside the block the model computes exactly what it computed without adapters and before they were trained."""
    layers = [module for module in model.modules() if isinstance(module, LoRALinear | Whole)]
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def merge_lora(model: nn.Module) -> None:
    """Folds every adapter into its weight and puts plain layers back."""
    for name, layer in adapters(model).items():
        model.set_submodule(name, layer.merged())
    for module in whole(model):
        forget_originals(module)
