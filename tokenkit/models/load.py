"""A causal language model from a folder or the hub: safetensors only, quiet, complete or refused."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from tokenkit.config import UserError
from tokenkit.models.quantized_saved import dequantise, loading_options
from tokenkit.tokenizers.base import Tokenizer

BASE, EXPANSION = "base", "expansion.safetensors"  # a byte-level model whose inputs are expanded
SCALES = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1}  # config key: what logits are multiplied by

STALE = (  # settings of generation that hold ids of the tokenizer that a model had before
    "bad_words_ids",
    "begin_suppress_tokens",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "sequence_bias",
    "suppress_tokens",
)


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the progress bars and reports of transformers inside the block."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def load_model(
    source: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The causal language model of a folder or hub id, in evaluation mode."""
    _check_folder(source)
    try:
        with quiet(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You passed `quantization_config`")  # on purpose
            config, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
            model, loading = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype,
                revision=revision,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                **loading_options(config),
            )
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{source}: not a causal language model that can be loaded: {reason}") from None
    problems = sorted(loading["missing_keys"]) + sorted(name for name, *_ in loading["mismatched_keys"])
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{source}: the weights lack {', '.join(problems[:3])}{more}; take a complete checkpoint")
    dequantise(model)
    return model.to(device).eval()


def _check_folder(source: str) -> None:
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{source}: no config.json inside; write the folder of a Hugging Face model")
        if not any(folder.glob("*.safetensors")):
            raise UserError(f"{source}: no *.safetensors inside; pickled weights are never read, convert them first")
    elif folder.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise UserError(f"{source}: no such folder; write the folder of a Hugging Face model, or a hub id owner/name")


def input_matrix(model: PreTrainedModel) -> nn.Parameter:
    """The input embedding matrix, rows x width."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, nn.Parameter)
    return weight


def head_matrix(model: PreTrainedModel) -> nn.Parameter:
    """The output matrix, rows x width; in a tied model the same object as the input embedding."""
    weight = output_head(model).weight
    assert isinstance(weight, nn.Parameter)
    return weight


def logit_settings(model: PreTrainedModel) -> dict[str, float]:
    """Scale and soft cap of the logits, where the model's config has them: Cohere, Granite, Gemma and their kin."""
    config = model.config.get_text_config().to_dict()
    found: dict[str, float] = {}
    for key, power in SCALES.items():
        if config.get(key) is not None:
            found["scale"] = config[key] ** power
    if config.get("final_logit_softcapping") is not None:
        found["softcap"] = config["final_logit_softcapping"]
    return found


def output_head(model: PreTrainedModel) -> nn.Linear:
    """The module that makes logits of hidden states."""
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    return head


def token_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    """The ids that a configuration names."""
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}


def stock_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    """The same for stock transformers, which wants a pad id: the end serves where there is none."""
    found = token_ids(tokenizer)
    return found if tokenizer.pad_id is not None else {**found, "pad_token_id": tokenizer.eos_id}


def write_token_ids(model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    """Puts the ids of another tokenizer into a model's configuration, and takes those of the old one out."""
    for config in (model.config, model.config.get_text_config(), model.generation_config):
        for name, value in token_ids(tokenizer).items():
            setattr(config, name, value)
    for name in STALE:
        setattr(model.generation_config, name, None)
