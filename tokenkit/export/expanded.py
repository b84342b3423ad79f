"""A byte-level model with input-id expansion: a stock folder without it, and beside it what is added to its inputs.

`base/` is an ordinary folder, `expansion.safetensors` the old rows and the bytes they stand for. The outer folder has a
model type of its own: with `trust_remote_code=True` stock transformers puts the two together, by the files of code that
lie there; without, it refuses, where it would otherwise leave the expansion out without a word.
"""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from tokenkit.export.factorised import export_factorised
from tokenkit.export.huggingface import SHARD_BYTES, TEXTS, drafted, export_huggingface, write_tokenizer
from tokenkit.export.verify import TOLERANCES, ExportError, compare_ids, logits_of
from tokenkit.models.expand import InputExpansion, expansion_of, load_expansion, save_expansion
from tokenkit.models.factorised_view import factorised_of
from tokenkit.models.load import BASE, EXPANSION, load_model, quiet
from tokenkit.models.remote_code.modeling_tokenkit_expanded import TokenkitExpandedForCausalLM
from tokenkit.tokenizers.base import Tokenizer

CODE = "tokenkit.models.remote_code"
CODE_FILES = ("longest_suffix", "modeling_tokenkit_expanded")
INDEX = "model.safetensors.index.json"


def export_model(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    dtype: torch.dtype | None,
    max_shard_bytes: int = SHARD_BYTES,
) -> Path:
    """The new folder, verified: a stock one, or one with `base/` and what stands beside it."""
    if factorised_of(model) is not None:
        return export_factorised(model, tokenizer, folder, dtype=dtype)
    expansion = expansion_of(model)
    if expansion is None:
        return export_huggingface(model, tokenizer, folder, dtype=dtype, max_shard_bytes=max_shard_bytes)
    with drafted(folder) as draft:
        with expansion.off():
            export_huggingface(model, tokenizer, draft / BASE, dtype=dtype, max_shard_bytes=max_shard_bytes)
        save_expansion(expansion, draft / EXPANSION)
        write_tokenizer(tokenizer, draft)
        rows = compare_ids(draft, tokenizer, TEXTS)  # before there is a config.json that speaks of code
        _write_outer(draft, expansion)
        _verify(draft, model, rows, dtype or model.dtype)
    return folder


def _write_outer(draft: Path, expansion: InputExpansion) -> None:
    """What stock transformers asks for: configuration, code, an index of weights that names the files there are."""
    body = json.loads((draft / BASE / "config.json").read_text("utf-8"))
    module = CODE_FILES[-1]
    config = {
        "architectures": [TokenkitExpandedForCausalLM.__name__],
        "auto_map": {
            "AutoConfig": f"{module}.TokenkitExpandedConfig",
            "AutoModelForCausalLM": f"{module}.{TokenkitExpandedForCausalLM.__name__}",
        },
        "model_type": "tokenkit_expanded",
        "old_tokens": len(expansion.spellings),
        "old_bytes": sum(map(len, expansion.spellings)),
        "text_config": body,
        "dtype": body.get("dtype"),
        **{key: body[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in body},
    }
    _write(draft / "config.json", config)
    for name in CODE_FILES:
        spec = find_spec(f"{CODE}.{name}")
        assert spec is not None
        assert spec.origin is not None
        shutil.copyfile(spec.origin, draft / f"{name}.py")
    shutil.copyfile(draft / BASE / "generation_config.json", draft / "generation_config.json")
    files = [*sorted((draft / BASE).glob("*.safetensors")), draft / EXPANSION]
    places = {key: str(file.relative_to(draft)) for file in files for key in _keys(file)}
    size = sum(file.stat().st_size for file in files)
    _write(draft / INDEX, {"metadata": {"total_size": size}, "weight_map": places})


def _keys(file: Path) -> list[str]:
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", "utf-8")


@torch.no_grad()
def _verify(folder: Path, model: PreTrainedModel, rows: list[list[int]], dtype: torch.dtype) -> None:
    """Logits of both readers: ours, and the class that is written beside the weights."""
    reloaded = load_model(str(folder / BASE), dtype=dtype, device=str(model.device))
    load_expansion(reloaded, folder / EXPANSION)
    with quiet():
        stock: Any = TokenkitExpandedForCausalLM.from_pretrained(folder, dtype=dtype)
        stock = stock.to(model.device)
    for ids in rows:
        expected = logits_of(model, ids)
        for found in (logits_of(reloaded, ids), logits_of(stock, ids)):
            if not (expected - found).abs().max() <= TOLERANCES[dtype] * expected.abs().max():
                raise ExportError(f"{folder.name}: logits differ after reloading")
