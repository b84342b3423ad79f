"""The user guide's names of keys, which the scripts take beside those of a verb's run file."""

from collections.abc import Mapping, Sequence

from tokenkit.config import UserError

MODEL = {
    "model_path": "model.source",
    "model.pretrained_model_name_or_path": "model.source",
    "model.tokenizer_name": "model.tokenizer.name",
    "tokenizer_path": "model.tokenizer.name",
    "output_path": "output",
}
HARNESS = {
    "eval.tasks": "eval.harness.tasks",
    "eval.limit": "eval.harness.limit",
    "eval.num_fewshot": "eval.harness.num_fewshot",
    "eval.add_bos": "eval.harness.add_bos",
    "eval.tokens_per_batch": "eval.harness.batch_tokens",
    "eval.confirm_run_unsafe_code": "eval.harness.confirm_run_unsafe_code",
}
LOCKSTEP = {
    "baseline_mined_mapping_paths": "mappings",
    "eval.source": "source",
    **{key: new.removeprefix("eval.") for key, new in HARNESS.items()},
    "output_path": "output",
}
VALUES = {  # a key whose values have other names, too
    "use_cpu": {"true": "device=cpu", "false": "device=auto"},
    "eval.chat_template_mode": {
        "surround_instruct": "eval.harness.apply_chat_template=true",
        "direct_encode": "eval.harness.apply_chat_template=false",
    },
    "combine_strategy": {"mean_prob": "combine=mean_prob", "mean_logits": "combine=mean_logp"},
    "quantization": {
        "int8": "format=int8",
        "int4": "format=int4",
        "ternary": "format=ternary",
        "bfloat16": "format=huggingface dtype=bfloat16",
        "float16": "format=huggingface dtype=float16",
        "none": "format=huggingface",
    },
}


def renamed(words: Sequence[str], *tables: Mapping[str, str]) -> list[str]:
    """The words with the guide's keys replaced by those of the run file; other words stay as they are."""
    names = {key: new for table in tables for key, new in table.items()}
    found: list[str] = []
    for word in words:
        key, equals, value = word.lstrip("+").partition("=")
        if equals and key in VALUES:
            if value not in VALUES[key]:
                raise UserError(f"{key}: {value!r} is not known; write one of {', '.join(VALUES[key])}")
            found += VALUES[key][value].split()
        elif equals and key in names:
            found.append(f"{names[key]}={value}")
        else:
            found.append(word)
    return found
