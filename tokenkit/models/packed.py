"""Whether a model reads several documents in one row as it reads them one by one."""

import inspect

import torch

from tokenkit.config import UserError
from tokenkit.models.view import ModelView

LENGTHS = (5, 11, 8)  # tokens of documents that are tried
SHARE = 0.1  # of what a document leaks into the next one in a plain row; rounding of half precision is far below it


@torch.no_grad()
def check_packing(view: ModelView, start_id: int) -> None:
    """UserError where a document of a packed row sees the one before it, or stands at another position."""
    model, kind = view.model, view.model.config.model_type
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        raise UserError(f"data.packing: true, but {kind} takes no position ids; write packing=false")
    training = model.training
    model.eval()
    rows, device = view.vocab_rows, model.device
    ids = [(torch.arange(length, device=device) * 7 + length) % rows for length in LENGTHS]
    for document in ids:
        document[0] = start_id
    places = torch.cat([torch.arange(length, device=device) for length in LENGTHS])[None]
    row = torch.cat(ids)[None]
    single = torch.cat([_hidden(view, document[None], None) for document in ids], 1)
    plain, packed = (_hidden(view, row, positions) for positions in (None, places))
    model.train(training)
    if (packed - single).abs().max() > SHARE * (plain - single).abs().max():
        raise UserError(
            f"data.packing: true, but in a row of several documents {kind} lets one see another; write packing=false"
        )


def _hidden(view: ModelView, ids: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    return view.leaves({"hidden"}, ids, ids, positions=positions)["hidden"].float()
