"""The keys of the guide's other commands: transfer, evaluation, export, and what is measured of two tokenizers."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tokenkit.config import UserError
from tokenkit.verbs import run_schema
from tokenkit.verbs.guide import data_keys, loss_keys, side_keys, train_keys
from tokenkit.verbs.guide.keys import Given, Guide, Key

DEVICE = Key("use_cpu", "device", {"true": "cpu", "false": "auto"}, closed=True)
MODEL = (
    Key("model_path", "model.source", note="the folder of a run is what it wrote"),
    Key("model.pretrained_model_name_or_path", "model.source"),
    Key("model.tokenizer_name", "model.tokenizer"),
    Key("tokenizer_path", "model.tokenizer"),
    Key("output_path", "output"),
    DEVICE,
)
NO_PADDING = Key("pad_to_multiple_of", note="the model is read with the rows that it has")
EXPANSION = tuple(
    Key(f"expand_model.{name}", note="a folder of a byte-level student holds what its inputs are expanded by")
    for name in ("pretrained_model_name_or_path", "tokenizer_name", "revision")
)
EVAL = (
    *MODEL,
    *data_keys.harness_keys("eval.harness"),
    Key("tasks", "eval.harness.tasks"),
    Key("max_samples", "eval.harness.limit"),
    Key("max_length", "eval.harness.max_length"),
    Key(
        "ppl_eval_data",
        "eval.source",
        section="held_out",
        replaces=("eval.source",),
        note="as `data`, or the path of a file; bits per byte",
    ),
    *(
        Key(name, note="generation follows each task's own options (eval.harness.generation)")
        for name in ("temperature", "num_beams", "max_new_tokens")
    ),
    Key("batch_size", note="tokens are read together, not rows (eval.harness.batch_tokens)"),
    NO_PADDING,
    *EXPANSION,
)
LOCKSTEP = (
    Key("output_path", "output"),
    DEVICE,
    Key("combine_strategy", "combine", {"mean_prob": "mean_prob", "mean_logits": "mean_logp"}, closed=True),
    Key(
        "baseline_mined_mapping_paths",
        "mappings",
        section="mappings",
        note="mode=mined; the null of the pivot, the first model, is left out",
    ),
    Key(
        "models",
        "models",
        section="models",
        note="the guide's names inside, too; start tokens are each tokenizer's own",
    ),
    Key("eval.source", "source"),
    *data_keys.harness_keys("harness"),
    NO_PADDING,
)
QUANTIZATION = {
    "int8": {"format": "int8"},
    "int4": {"format": "int4"},
    "ternary": {"format": "ternary"},
    "bfloat16": {"format": "huggingface", "dtype": "bfloat16"},
    "float16": {"format": "huggingface", "dtype": "float16"},
    "none": {"format": "huggingface"},
}
EXPORT = (
    *MODEL,
    Key("checkpoint", "model.source"),
    Key("checkpoint_path", "model.source"),
    Key("quantization", "format, dtype", section="quantization", note=", ".join(QUANTIZATION)),
    Key("with_pt", note="what is written is PyTorch's"),
    Key("tmp_save_dir", note="nothing is kept in between"),
    *(
        Key(name, note="a folder of a byte-level student holds what its inputs are expanded by")
        for name in ("expand_input_ids_model", "expand_input_ids_tokenizer")
    ),
    Key("overwrite_args", refused=True, note="a folder is read as it is; write the keys of the export themselves"),
)
MERGE = (Key("output_path", "output"), Key("tokenizer_path", "tokenizer"), DEVICE)
ZETT = (
    *MODEL,
    Key("source_model.pretrained_model_name_or_path", "model.source"),
    Key("source_model.tokenizer_name", "model.tokenizer"),
    Key("source_model.revision", "model.revision"),
    Key("target_tokenizer_name", "target_tokenizer"),
    Key("init", "transfer.initializer"),
    Key("output_dir", "output"),
    Key("pad_to_multiple_of", "transfer.pad_to_multiple_of"),
    *(
        Key(name, note="tokens of equal bytes and roles keep their rows, input and output alike, in every layer")
        for name in (
            "extend_output_embeddings",
            "clone_all_layers",
            "combine_output_embed_with_input",
            "convert_bos_eos",
            "convert_by_special",
            "convert_by_matching",
        )
    ),
)
PAIR = (
    Key("teacher_tokenizer_name", "teacher"),
    Key("target_tokenizer_name", "student"),
    Key("student_tokenizer_name", "student"),
    Key("output_dir", "output"),
    Key("num_workers", "workers"),
)
INFO = (
    *PAIR,
    Key("additive_smoothing_constant", "smoothing"),
    Key("data.num_workers", "workers"),
    *(
        replace(
            key,
            replaces=("source",),
            to=key.to.removeprefix("data.").replace("source or data.mixture", "source"),
            section="text",
        )
        for key in data_keys.DATA
        if key.section == "data" and key.name not in ("max_train_examples", "data.lang_code")
    ),
    *(
        Key(name, refused=True, note="all of the text is counted, on both sides; write source.max_bytes=N for less")
        for name in ("teacher_subsample_percent", "student_subsample_percent")
    ),
    *(Key(name, note="the text is read once, in its order") for name in ("seed", "data.streaming", "data.lang_code")),
    *(
        Key(name, note="the text is read once, in its order")
        for name in ("data.mix_languages", "data.shuffle_buffer_size")
    ),
    Key("data.batch_size", note="pairs are worked off in blocks whose size changes nothing"),
    Key("batch_size", note="pairs are worked off in blocks whose size changes nothing"),
)
SAMPLER = (
    Key("collator.hn_surface_maxlen", "hypernet.max_seq_length"),
    Key("collator.tokenizer_sample_mean", "sampler.vocab_size"),
    Key("collator.block_size", "data.window_bytes", section="block", note=f"{data_keys.BYTES_PER_TOKEN} bytes a token"),
    *(
        Key(f"collator.{name}", note="sampler.vocab_spread says how far sizes spread")
        for name in ("tokenizer_sample_min", "tokenizer_sample_max", "tokenizer_sample_std")
    ),
    *(
        Key(f"collator.{name}", note="tokenizers are drawn from the training text by seed and number")
        for name in (
            "do_tokenizer_sampling",
            "sample_text_span",
            "n_pools",
            "add_prefix_space",
            "n_token_subsample",
            "identity_n_token_subsample",
            "pad_to_multiple_of",
            "tokenizer_batch_size",
            "tokenizer_noise_mean",
            "tokenizer_noise_std",
        )
    ),
    Key("identity_steps", "identity_steps", note="needs copies=false"),
    Key("identity_lr", note="these steps are part of the one schedule"),
    Key("compat", refused=True, note="networks of the older code are not read; leave it out"),
    Key("eval.tokenizers", "eval.tokenizers", section="tokenizers"),
    Key("model.pretrained_model_name_or_path", "model.source"),
    Key("model.tokenizer_name", "model.tokenizer"),
    Key("output_dir", "output"),
    Key("name", note="a run is called what its folder is"),
    Key("skip_lm_eval", note="a network is measured by bits per byte of real tokenizers (eval.tokenizers)"),
    *(
        Key(f"eval.{name}", note="a network is measured by bits per byte of real tokenizers (eval.tokenizers)")
        for name in data_keys.HARNESS
    ),
    Key("train_model_mode", section="frozen", note="the model stays as it is; lora and full are errors"),
    Key("train_embeddings", note="the model's own rows stay as they are"),
)


def _mappings(given: Given) -> dict[str, Any]:
    folders = [folder for folder in given.get("baseline_mined_mapping_paths") or [] if folder is not None]
    return {"mode": "mined", "mappings": folders} if folders else {}


def _models(given: Given) -> dict[str, Any]:
    """Members of an ensemble, with the guide's names of their keys or ours."""
    names = {"pretrained_model_name_or_path": "source", "tokenizer_name": "tokenizer"}
    models = given.get("models")
    if not isinstance(models, list):
        return {"models": models}
    return {
        "models": [
            {names.get(k, k): v for k, v in model.items() if k != "add_bos"} if isinstance(model, dict) else model
            for model in models
        ]
    }


def _quantization(given: Given) -> dict[str, Any]:
    word = str(given.get("quantization")).lower()
    if word not in QUANTIZATION:
        raise UserError(f"quantization: {word!r} is not known; write one of {', '.join(QUANTIZATION)}")
    return QUANTIZATION[word]


def _lockstep_harness(given: Given) -> dict[str, Any]:
    return data_keys.harness(given, "harness")


def _text(given: Given) -> dict[str, Any]:
    found = data_keys.data(given)
    if "data.mixture" in found:
        raise UserError("data.dataset_configs: several, where tokens are counted on one text; keep one")
    return {key.removeprefix("data."): value for key, value in found.items()}


def _block(given: Given) -> dict[str, Any]:
    return {"data.window_bytes": data_keys.BYTES_PER_TOKEN * given.get("collator.block_size")}


def _tokenizers(given: Given) -> dict[str, Any]:
    """Tokenizers to measure with; the guide's are mappings."""
    found = given.get("eval.tokenizers") or []
    return {"eval.tokenizers": [t.get("tokenizer_name", t) if isinstance(t, dict) else t for t in found]}


def _network_losses(given: Given) -> dict[str, Any]:
    """The losses; `lexical` is a weight of its own here."""
    listed, weights = given.get("losses"), given.get("loss_weights")
    if not isinstance(listed, list) or "lexical" not in listed:
        return loss_keys.losses(given)
    place = listed.index("lexical")
    weight = weights[place] if isinstance(weights, list) and len(weights) == len(listed) else None
    rest = replace(given, values={**given.values, "losses": [name for name in listed if name != "lexical"]})
    if isinstance(weights, list):
        rest.values["loss_weights"] = weights[:place] + weights[place + 1 :]
    return loss_keys.losses(rest) | {"lexical_weight": 0.5 if weight is None else weight, "copies": False}


def _frozen(given: Given) -> dict[str, Any]:
    """Nothing: the model of a network is not trained."""
    mode = given.get("train_model_mode")
    if mode not in ("no", "none", None, False):
        raise UserError(f"train_model_mode: {mode!r}, where the model stays as it is; write no, or leave it out")
    return {}


def guides() -> tuple[Guide, ...]:
    """The guide's commands but for distillation."""
    held = {"held_out": data_keys.held_out}
    tasks: Mapping[str, Any] = {"harness": data_keys.harness, **held}
    lockstep = {"mappings": _mappings, "models": _models, "harness": _lockstep_harness}
    network = (*train_keys.LOOP, *train_keys.OPTIMIZER, *train_keys.BALANCE, *loss_keys.KEYS, *data_keys.DATA)
    network = (
        *SAMPLER,
        *side_keys.RUNNING,
        *data_keys.HELD_OUT,
        *side_keys.HYPERNET[len(side_keys.NETWORK) :],
        *network,
    )
    hypernet = {"block": _block, "tokenizers": _tokenizers, "frozen": _frozen, **train_keys.SECTIONS}
    hypernet |= {**side_keys.SECTIONS, **data_keys.SECTIONS, "losses": _network_losses}
    long = ("dry_run", "resume", "quiet")
    return (
        _guide("zett", "transfer", ZETT),
        _guide("train_zett_hn", "train-hypernet", network, hypernet, switches=long),
        _guide("compute_tokenizer_info", "tokenizer-info", INFO, {"text": _text}, switches=long),
        _guide("compute_mined_mapping", "mined-mapping", PAIR, base={"format": "npy"}),
        _guide("eval", "eval", EVAL, tasks),
        _guide("eval_lockstep", "eval-lockstep", LOCKSTEP, lockstep),
        _guide("export_model", "export", EXPORT, {"quantization": _quantization}, base={"format": "huggingface"}),
        _guide("merge_lora", "merge-lora", MERGE),
        _guide("optimize_for_inference", "export", EXPORT, {"quantization": _quantization}, base={"format": "int8"}),
        _guide("export_to_onnx", "export", EXPORT, {"quantization": _quantization}, base={"format": "onnx"}),
    )


def _guide(
    script: str,
    verb: str,
    keys: tuple[Key, ...],
    sections: Mapping[str, Any] | None = None,
    *,
    base: Mapping[str, Any] | None = None,
    switches: tuple[str, ...] = ("dry_run",),
) -> Guide:
    return Guide(script, verb, lambda: run_schema(verb), keys, sections or {}, None, base or {}, switches)
