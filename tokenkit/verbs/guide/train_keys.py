"""The guide's keys of training: how long, how fast, what of a model, on how many devices."""

from typing import Any

from tokenkit.config import UserError
from tokenkit.verbs.guide.keys import Given, Key

PRECISIONS = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}
SCHEDULES = {
    "constant_with_warmup": "constant",
    "linear_warmup_linear_decay": "linear",
    "cosine_with_min_lr": "cosine",
    "warmup_stable_decay": "wsd",
}
ONE_BOUND = "one bound is set for all gradients together, not one for each group"
LENGTH_KEYS = ("data.batch_size", "batch_size", "train_batch_size")

LOOP = (
    Key("steps", "train.steps"),
    Key("warmup_steps", "train.optimizer.warmup_steps"),
    Key("seed", "train.seed"),
    Key("dtype", "train.precision", PRECISIONS, note="trained weights, sums and the optimizer stay float32"),
    Key("debug", "train.device", {"true": "cpu", "false": "auto"}, closed=True),
    *(Key(name, "train.batch_size", note="rows of a whole step") for name in LENGTH_KEYS),
    Key("optimizer.grad_acc_steps", "train.accumulation", {"null": 1}),
    Key("gradient_accumulation_steps", "train.accumulation", {"null": 1}),
    Key("log_interval", "train.log_every"),
    Key("logging_interval", "train.log_every"),
    Key("logging_steps", "train.log_every"),
    Key("eval_interval", "train.eval_every"),
    Key("eval_steps", "train.eval_every"),
    Key("save_interval", "train.save_every"),
    Key("save_steps", "train.save_every"),
    Key("keep_last_n_checkpoints", "train.keep_checkpoints"),
    Key("eval_at_step_zero", "train.eval_at", {"true": [0], "false": []}, closed=True),
    Key("use_wandb", "train.sinks", {"true": ["wandb"], "false": []}, closed=True),
    Key("wandb_project", "train.project"),
    Key("n_data_parallel", "train.parallel.data", note="started with `torchrun`, one process for each device"),
    Key("n_model_parallel", "train.parallel.model", note="started with `torchrun`, one process for each device"),
    Key("sync_interval", note="what is logged is fetched when it is logged (train.log_every)"),
    Key("save_at_step_zero", note="the run file and its seed are the state before the first step"),
    Key("export_to_gcs_bucket", note="nothing is uploaded to a bucket; push_to_hub=true uploads to the hub"),
    Key("use_distributed", note="a run is distributed where `torchrun` starts it"),
    Key("distributed_backend", note="NCCL on GPUs and gloo on CPUs"),
    Key("use_model_parallel", note="n_model_parallel says it"),
    Key("eval_batch_size", note="held-out text is read by tokens (eval.batch_tokens)"),
    Key(
        "num_epochs",
        section="epochs",
        note="a run is counted in steps; an error where `steps` is missing",
    ),
)
OPTIMIZER = (
    Key("optimizer.type", "train.optimizer.name", {"adamw_torch": "adamw", "adamw_torch_fused": "adamw"}),
    Key("optimizer.name", "train.optimizer.name", {"adamw_torch": "adamw", "adamw_torch_fused": "adamw"}),
    Key("optimizer.learning_rate", "train.optimizer.learning_rate"),
    Key("optimizer.weight_decay", "train.optimizer.weight_decay", note="on matrices alone"),
    *(
        Key(f"optimizer.{name}", "train.optimizer.betas", section="betas")
        for name in ("b1", "b2", "beta1", "beta2", "betas")
    ),
    Key("optimizer.eps", "train.optimizer.eps"),
    Key("optimizer.epsilon", "train.optimizer.eps"),
    Key("optimizer.max_grad_norm", "train.optimizer.max_grad_norm", note=ONE_BOUND),
    Key("optimizer.param_groups", "train.optimizer.param_groups"),
    Key("optimizer.use_fused_adam", "train.optimizer.fused"),
    Key("optimizer.schedule", "train.optimizer.schedule", SCHEDULES),
    Key("optimizer.lr_scheduler_type", "train.optimizer.schedule", SCHEDULES),
    Key("optimizer.warmup_steps", "train.optimizer.warmup_steps"),
    Key("optimizer.warmup_ratio", "train.optimizer.warmup_ratio"),
    Key("optimizer.lr_min_ratio", "train.optimizer.lr_min_ratio"),
)
MODES = {"none": "embeddings", "no": "embeddings", "null": "embeddings", "false": "embeddings"}
TRAINED = (
    Key("train_model_mode", "train.mode", MODES | {"lora": "lora", "full": "full"}, closed=True),
    Key("train_embeddings", "train.embeddings", {"true": "all", "false": "none"}, closed=True),
    Key("model_lora_rank", "train.lora.rank"),
    Key("model_lora_r", "train.lora.rank"),
    Key("model_lora_alpha", "train.lora.alpha"),
    Key("model_lora_dropout", "train.lora.dropout"),
    Key("model_lora_targets", "train.lora.targets", section="lora"),
    Key("model_lora_target_regex", "train.lora.target_regex", section="lora"),
    Key("model_lora_layers", "train.lora.layers", section="lora"),
    Key("model_lora_modules_to_save", "train.lora.modules_to_save", section="lora"),
    Key("prefix_steps", "train.prefix.steps", section="prefix", note="they come out of `steps`; 0 is none"),
    Key("prefix_lr", "train.prefix.learning_rate", section="prefix"),
    Key("prefix_trainable", "train.prefix.trainable", section="prefix"),
    Key("n_prefix_layers", "train.prefix.layers", section="prefix"),
    Key(
        "n_suffix_layers",
        refused=True,
        note="layers added behind the student's are not made; write student.layers=[0, 1, ...] with layers that stand "
        "twice",
    ),
    Key("gradient_checkpointing", "train.gradient_checkpointing"),
    Key(
        "use_flash_attention",
        "train.attention",
        {"true": "sdpa", "false": "eager"},
        note="sdpa takes torch's flash kernel where there is one; flash_attention_2 is a package of its own",
    ),
)
BALANCE_WORDS = {"balance": "magnitude", "static": "none", "null": "none", "false": "none"}
BALANCE = tuple(
    Key(name, "train.balance", section="balance", note=note)
    for name, note in (
        ("loss_weight_mode", "balance is `magnitude`; static or null is `none`"),
        ("multitask_aggregation_fn", "null is the sum of the weighted means, not their mean"),
        ("uncertainty_weighting", "true is `uncertainty`"),
        ("uncertainty_s_init", "`s_init` of `uncertainty`"),
        ("ema_alpha", "`alpha` of `ema`"),
        ("baseline.gradnorm_alpha", "`alpha` of `gradnorm`"),
        ("baseline.gradnorm_lr", "`learning_rate` of `gradnorm`"),
    )
)
BALANCE_OPTIONS = {
    "uncertainty": {"uncertainty_s_init": "s_init"},
    "ema": {"ema_alpha": "alpha"},
    "gradnorm": {"baseline.gradnorm_alpha": "alpha", "baseline.gradnorm_lr": "learning_rate"},
}
KEYS = (*LOOP, *OPTIMIZER, *TRAINED, *BALANCE)


def epochs(given: Given) -> dict[str, Any]:
    """Nothing: steps have to be written."""
    if "steps" not in given.values and not given.names_ours("train.steps") and given.get("num_epochs") is not None:
        raise UserError(f"num_epochs: {given.get('num_epochs')}, where a run is counted in steps; write steps=...")
    return {}


def betas(given: Given) -> dict[str, Any]:
    """Both decay rates of AdamW, of which one may be left out."""
    whole = given.get("optimizer.betas") or [0.9, 0.95]
    pair = [given.first("optimizer.b1", "optimizer.beta1"), given.first("optimizer.b2", "optimizer.beta2")]
    return {"train.optimizer.betas": [one if one is not None else other for one, other in zip(pair, whole)]}


def lora(given: Given) -> dict[str, Any]:
    """Lists, where the guide also takes one word, and numbers of layers as the ranges they are."""
    found: dict[str, Any] = {}
    for name in ("targets", "target_regex", "layers", "modules_to_save"):
        value = given.get(f"model_lora_{name}")
        if value is None:
            continue
        listed = value if isinstance(value, list) else [value]
        whole = value == "all-linear" or value == ["all-linear"]
        found[f"train.lora.{name}"] = "all-linear" if whole else [str(entry) for entry in listed]
    return found


def prefix(given: Given) -> dict[str, Any]:
    """The first steps, in which a part is trained; 0 steps are no such steps."""
    names = {
        "prefix_steps": "steps",
        "prefix_lr": "learning_rate",
        "prefix_trainable": "trainable",
        "n_prefix_layers": "layers",
    }
    found = {new: given.get(name) for name, new in names.items() if given.get(name) is not None}
    if "prefix_steps" in given.values and not given.get("prefix_steps"):
        return {}
    if "steps" not in found and not found.get("layers"):
        unused = [name for name, new in names.items() if new in found]
        given.warnings += [f"{name} has no effect: prefix_steps is not written" for name in unused]
        return {}
    return {f"train.prefix.{name}": value for name, value in found.items()}


def balance(given: Given) -> dict[str, Any]:
    """One method and its options, of what the guide says in two keys."""
    words = [given.get(name) for name in ("loss_weight_mode", "multitask_aggregation_fn")]
    if given.get("uncertainty_weighting"):
        words.append("uncertainty")
    methods = [BALANCE_WORDS.get(str(word), str(word)) for word in words if word is not None]
    named = sorted({method for method in methods if method != "none"})
    if len(named) > 1:
        raise UserError(f"loss_weight_mode: {named[0]} beside {named[1]}; keep one (train.balance)")
    method = named[0] if named else "none"
    own = {key: (name, given.get(key)) for key, name in BALANCE_OPTIONS.get(method, {}).items()}
    for key in (key for options in BALANCE_OPTIONS.values() for key in options):
        if key not in own and given.get(key) is not None:
            given.warnings.append(f"{key} has no effect: the losses are weighed by {method!r}")
    return {"train.balance": {"method": method, **{name: v for name, v in own.values() if v is not None}}}


SECTIONS = {"epochs": epochs, "betas": betas, "lora": lora, "prefix": prefix, "balance": balance}
