"""Every key of the guide becomes one of a run file, or says why it changes nothing; none is unknown."""

import importlib.util
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from tests.verbs.guide_samples import BESIDE, SAMPLES
from tokenkit.config import UserError, load, parse_yaml
from tokenkit.verbs.distill_run import DistillRun
from tokenkit.verbs.guide import GUIDES, command_of
from tokenkit.verbs.guide.keys import is_ours
from tokenkit.verbs.guide.page import guide_page

ROOT = Path(__file__).parents[2]
GUIDE = GUIDES["cross_tokenizer_distill"]


def word(key: str, value: Any) -> str:
    return f"{key}={json.dumps(value)}"


def run_of(*words: str) -> DistillRun:
    return load(DistillRun, command_of(GUIDE, words).words)


def at(run: Any, path: str) -> Any:
    """The value of a dotted key of a run."""
    for name in path.split("."):
        run = run.__dict__[name]
    return run


def same(value: Any, expected: Any) -> bool:
    return value == expected or (value is not None and expected is not None and str(value) == str(expected))


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="tokenkit.verbs.guide.reading")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("key", SAMPLES)
def test_a_key_of_the_guide_becomes_ours(key, lines):
    value, expected = SAMPLES[key]
    run = run_of(*(word(k, v) for k, v in BESIDE.get(key, {}).items()), word(key, value))
    for path, there in expected.items():
        assert same(at(run, path), there), path
    told = [line for line in lines() if line.startswith(f"{key} ")]
    table = GUIDE.named[key]
    renamed = table.to != key if table.to else not table.section and value not in (None, False)
    assert len(told) == renamed, told


@pytest.mark.parametrize("script", GUIDES)
def test_what_a_table_leads_to_exists(script):
    guide = GUIDES[script]
    for key in guide.keys:
        for path in re.split(r", | or ", key.to):
            ours = path.replace(".*", "")
            if ours and "." in ours and not ours.startswith(("losses.", "data.mixture.")):
                assert is_ours(guide.schema(), ours), key.name
        assert key.to or key.note, f"{key.name}: no word why it changes nothing"
        assert not key.section or key.section in guide.sections


def test_the_page_is_what_the_tables_say():
    spec = importlib.util.spec_from_file_location("write_reference", ROOT / "scripts" / "write_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.GUIDE_PAGE.read_text("utf-8") == guide_page(), "run make docs"


def guide_text(shared: Path) -> str:
    return next((shared / "seeds").glob("003*")).read_text("utf-8")


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for name, value in values.items():
        path = f"{prefix}{name}"
        inside = isinstance(value, dict) and path not in GUIDE.named
        found |= flat(value, f"{path}.") if inside else {path: value}
    return found


def blocks_of(text: str) -> list[dict[str, Any]]:
    """The YAML of the guide, each block as its dotted keys."""
    return [flat(parse_yaml(block)) for block in re.findall(r"```yaml\n(.*?)```", text, re.S)]


def commands_of(text: str) -> list[tuple[str, list[str]]]:
    """The commands of the guide: script and words."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        python, script, *words = block.replace("\\\n", " ").split()
        assert python == "python"
        found.append((Path(script).stem, words))
    return found


def test_every_key_of_the_guide_is_in_the_list_here(shared):
    text = guide_text(shared)
    keys = {key for block in blocks_of(text) for key in block}
    keys |= {
        w.lstrip("+").partition("=")[0] for script, words in commands_of(text) for w in words if "distill" in script
    }
    assert len(keys) > 40
    assert not keys - SAMPLES.keys()


def test_every_setting_of_the_original_is_in_the_list_here(shared):
    text = (shared / "specs/cross_tokenizer.md").read_text("utf-8")
    table = text.partition("### 5.2 ")[2].partition("Recommended set")[0]
    found: set[str] = set()
    for row in re.findall(r"^\| (.+?) \|", table, re.M)[2:]:
        row = re.sub(r"(\w+)\.\{([^}]*)\}", lambda m: ", ".join(f"{m[1]}.{n.strip()}" for n in m[2].split(",")), row)
        section, shown = "", []
        for name in re.split(r"[,/]", row.replace("`", "")):
            name = name.strip()
            dotted = section + name if section and "." not in name else name
            section = name.rpartition(".")[0] + "." if "." in name else section
            shown.append(dotted)
        found |= {name for name in shown if re.fullmatch(r"[a-z_0-9.]+", name)}
    short = {  # as the table abbreviates them
        "denominator": "distill_main_path_denominator",
        "alpha": "model_lora_alpha",
        "normalization": "latents_normalization",
        "chunks": "latents_chunks",
        "do_project": "latents_do_project",
        "teacher.": "teacher.pretrained_model_name_or_path",
    }
    keys = {short.get(name, name) for name in found} - {"key"}
    assert len(keys) > 70
    assert not keys - SAMPLES.keys(), sorted(keys - SAMPLES.keys())


def test_every_block_of_the_guide_is_read(shared, tmp_path):
    for values in blocks_of(guide_text(shared)):
        words = [word(key, value) for key, value in values.items()]
        if values.get("losses") == ["custom_loss"]:
            with pytest.raises(UserError, match=r"losses: 'custom_loss' is not known; .*plugins=\[FILE\]"):
                run_of(*words)
            continue
        pair = [] if "alm_unbiased" not in values.get("losses", []) else [f"tokenizer_pair_data_path={tmp_path}"]
        assert run_of(*words, *pair).train.steps == 5000, values


def test_what_the_guide_and_we_say_may_be_mixed_in_files_and_words(tmp_path, corpus, lines):
    file = tmp_path / "config.yaml"
    file.write_text(
        "student:\n  pretrained_model_name_or_path: folder\n"
        "optimizer.grad_acc_steps: 2\n"
        "optimizer: {learning_rate: 3e-5, param_groups: [{pattern: 'a', lr_scale: 0.1}]}\n"
        "losses: [sft, alm_unconstrained]\nloss_schedules: {alm_unconstrained: 'linear(0,1,1000)'}\n"
        f"data: {{kind: jsonl, path: {corpus}, batch_size: 8, window_bytes: 99}}\n"
        "train: {log_every: 3, steps: 5}\nsteps: 9\n"
    )
    run = run_of("--config", str(file), "--overrides", "+student.revision=main", "train.seed=7", "loss_weights=[1,2]")
    assert (run.model.source, run.model.revision) == ("folder", "main")
    assert (run.train.steps, run.train.seed, run.train.log_every) == (9, 7, 3)
    assert (run.train.batch_size, run.train.accumulation, run.data.window_bytes) == (8, 2, 99)
    assert run.train.optimizer.learning_rate == 3e-5
    assert run.train.optimizer.param_groups[0].lr_scale == 0.1
    assert run.losses.alm.weight == 2.0
    assert run.losses.alm.schedule.steps == 1000
    assert run.losses.alm.preset == "upstream"
    told = lines()
    assert told.count("steps is train.steps here") == 1
    assert run_of(str(file), "steps=3", "train.steps=4").train.steps == 4
    assert run_of(str(file), "train.steps=4", "steps=3").train.steps == 3
    assert run_of(str(file), "loss_schedules.sft=constant(1)").losses.clm.schedule.kind == "constant"


def test_a_run_file_of_ours_gets_no_defaults_of_the_guides(tmp_path):
    file = ROOT / "runs/distill/two_vocabularies.yaml"
    mine = load(DistillRun, [str(file), "train.steps=3", "output=o"])
    assert run_of(str(file), "steps=3", "output_dir=o") == mine


@pytest.mark.parametrize(("words", "message"), [
    (["trian_model_mode=lora"], "trian_model_mode: unknown key; did you mean 'train_model_mode' or 'train.mode'?"),
    (["optimizer.learning_rat=1"], "did you mean 'optimizer.learning_rate' or 'train.optimizer.learning_rate'?"),
    (["data.batch_sizes=1"], "data.batch_sizes: unknown key; did you mean 'data.batch_size' or 'train.batch_size'?"),
    (["windw_bytes=1"], "did you mean 'data.window_bytes'?"),
    (["qwertyuiop=1"], "qwertyuiop: unknown key; docs/guide_keys.md has the guide's"),
    (["--overide", "a=1"], "--overide: unknown option; did you mean '--overrides'?"),
    (["a.yaml", "b.yaml"], "'b.yaml': the second run file"),
    (["train_model_mode=lorra"], "train_model_mode: 'lorra' is not known; write one of none, no,"),
    (["losses=[alm_unconstraind]"], "did you mean 'alm_unconstrained'"),
    (["losses=[alm_space,alm_unconstrained]"], "'alm_unconstrained' is 'alm' here, which stands twice"),
    (["losses=[alm_space,alm_side_path_unconstrained]"], "alm_space beside alm_side_path_unconstrained: chunks are"),
    (["losses=[alm_unbiased,clm]"], "tokenizer_pair_data_path: missing, and alm_unbiased reads"),
    (["losses=sft"], "losses: 'sft' is no list"),
    (["losses=[sft]", "loss_weights=[1,2]"], "loss_weights: 2 of them, where losses names 1"),
    (["losses=[sft]", "loss_schedules={stf: constant(1)}"], "'stf' is none of the losses; did you mean"),
    (["alm_mode=append_spce"], "alm_mode: 'append_spce' is not known; did you mean 'append_space'?"),
    (["space_mask_mode=space"], "space_mask_mode: 'space' is not made"),
    (["n_suffix_layers=2"], "n_suffix_layers: 2, layers added behind"),
    (["hypernet.embedding_lora_rank=4"], "hypernet.embedding_lora_rank: 4, embeddings have no low-rank"),
    (["num_epochs=3"], "num_epochs: 3, where a run is counted in steps; write steps=..."),
    (["chat_template_mode=surround_instruct"], "chat_template_mode: 'surround_instruct' asks"),
    (["data.kind=jsonl"], "data.path: missing"),
    (["data.kind=hf"], "data.dataset_configs: missing"),
    (["data.kind=json"], "data.kind: 'json', did you mean 'jsonl'?"),
    (["data.dataset_configs=[{kwargs: {path: a, trust: 1}}]"], "data.dataset_configs.0.kwargs.trust: is not read"),
    (["loss_weight_mode=ema", "multitask_aggregation_fn=gradnorm"], "loss_weight_mode: ema beside gradnorm; keep one"),
    (["loss_weight_mode=unknown"], "train.balance: 'unknown' is not known"),
])  # fmt: skip
def test_a_mistake_is_told_with_what_to_write(words, message):
    with pytest.raises(UserError, match=re.escape(message)):
        run_of(*words, *([] if "num_epochs=3" in words else ["steps=3"]))


@pytest.mark.parametrize(("words", "expected"), [
    (["losses=[alm_latents]", "latents_to_align=all_hidden_states", "latents_do_project=true"],
     {"losses.hidden_states.states": "all", "losses.hidden_states.project": True}),
    (["losses=[baseline_dskd]", "baseline.divergence=akl", "baseline.kd_temp=3.0"],
     {"losses.dskd.divergence": "adaptive_kl", "losses.dskd.temperature": 3.0}),
    (["losses=[baseline_uld]"], {"losses.uld.positions": "positional"}),
    (["losses=[baseline_mined]", "baseline.kd_temp=3.0"], {"losses.mined.temperature": 3.0}),
    (["losses=[alm_side_path]", "side_path_mapping_mode=bias_threshold", "tokenizer_pair_data_path=pair",
      "tokenizer_pair_bias_threshold_side_path=1e-3"],
     {"losses.side_path.mapping": "unbiased", "data.bias": "pair", "data.bias_threshold": 1e-3}),
    (["losses=[alm_space]", "alm_mode=merge_by_space_prob+append_space"],
     {"data.chunks": "space", "losses.alm.merge": True, "losses.alm.debias": True}),
    (["losses={alm: {}}", "alm_diff_fn=abs", "binarization_temp=7.0"],
     {"losses.alm.divergence": "abs", "losses.alm.temperature": 7.0, "losses.clm": None}),
    (["losses=[p_kl]", "loss_weights=[2]"], {"losses.p_kl.weight": 2.0}),
    (["loss_weight_mode=uncertainty", "uncertainty_s_init=0.2"], {"train.balance.s_init": 0.2}),
    (["loss_weight_mode=ema", "ema_alpha=0.8"], {"train.balance.alpha": 0.8}),
    (["loss_weight_mode=balance"], {"train.balance.method": "magnitude"}),
    (["multitask_aggregation_fn=gradnorm", "baseline.gradnorm_alpha=0.2", "baseline.gradnorm_lr=0.03"],
     {"train.balance.alpha": 0.2, "train.balance.learning_rate": 0.03}),
    (["prefix_steps=10", "prefix_lr=1e-4", "n_prefix_layers=4", "prefix_trainable=embeddings"],
     {"train.prefix.steps": 10, "train.prefix.layers": 4, "train.prefix.trainable": "embeddings"}),
    (["target_tokenizer=byte", "max_student_length=2048", "max_teacher_length=512"], {"data.window_bytes": 2048}),
    (["use_chat_template=true", "max_student_length=300", "max_teacher_length=512"], {"data.window_bytes": 300}),
    (["target_tokenizer_name=x", "tokens_to_add=['<a>']"], {"target_tokenizer.tokens_to_add": ("<a>",)}),
    (["student.pretrained_model_name_or_path=m", "target_tokenizer=longest_prefix"],
     {"target_tokenizer.name": "m", "target_tokenizer.conversion": "longest_prefix"}),
    (["hypernet.architecture=identity", "hypernet.num_layers=2"], {"hypernet": None}),
    (["data.kind=hf_saved", "data.dataset_configs=[{path: a, p: 1}]"], {"data.source.saved": "a"}),
    (["data.dataset_configs=[{kwargs: {path: json, data_files: a.jsonl, split: train}}]"],
     {"data.source.path": "a.jsonl"}),
    (["data.streaming=true", "data.shuffle_buffer_size=50", "data.path=a.jsonl"], {"data.shuffle_buffer": 50}),
    (["dataset_name=a", "val_split=test"], {"data.source.hub": "a", "eval.source.split": "test"}),
    (["eval.tasks=[arc_easy]", "eval.lengths=[128, 512]", "eval.tokens_per_batch=99"],
     {"eval.harness.max_length": 512, "eval.harness.batch_tokens": 99}),
    (["ppl_eval_data=held.txt"], {"eval.source.path": "held.txt"}),
])  # fmt: skip
def test_keys_that_belong_together(words, expected):
    run = run_of(*words, "steps=30")
    for path, value in expected.items():
        assert same(at(run, path), value), path


def test_several_datasets_are_a_mixture():
    sets = "[{lang_code: en, kwargs: {path: a}, p: 0.7}, {lang_code: de, kwargs: {path: b, name: de}, p: 0.3}]"
    run = run_of(f"data.dataset_configs={sets}", "data.kind=hf", "data.mix_languages=false", "data.n_subsample=5")
    assert [(s.hub, s.hub_name, s.weight, s.language) for s in run.data.mixture] == [
        ("a", None, 0.7, "en"),
        ("b", "de", 0.3, "de"),
    ]
    assert run.data.mixture[0].max_documents == 5
    assert not run.data.mix_languages


def test_a_second_stage_keeps_the_teacher_of_the_first(tmp_path, lines):
    (tmp_path / "stage1/model").mkdir(parents=True)
    (tmp_path / "stage1/run.yaml").write_text("model: {source: first, revision: main}\nteacher: null\n")
    run = run_of(f"+student.pretrained_model_name_or_path={tmp_path}/stage1", "train_embeddings=false")
    assert run.model.source == str(tmp_path / "stage1/model")
    assert (run.teacher.source, run.teacher.revision) == ("first", "main")
    assert run.target_tokenizer is None
    assert any("none, so first, as in the run" in line for line in lines())


def test_switches_and_keys_that_are_switches():
    assert command_of(GUIDE, ["dry_run=true"]).switches == {"dry_run": True}
    assert command_of(GUIDE, ["do_cost_analysis=true", "--resume", "-q"]).switches == {
        "dry_run": True,
        "resume": True,
        "quiet": True,
    }
    assert command_of(GUIDES["eval"], ["--dry-run", "-q", "model_path=a"]).switches == {"dry_run": True}


def test_quiet_says_nothing_but_what_changes_nothing(lines):
    run_of("-q", "steps=3", "sync_interval=5", "eval.limit=3", "data.mix_languages=false")
    assert lines() == [
        "data.mix_languages has no effect: there is one source, and so one language",
        "eval.limit has no effect: eval.tasks names none",
        "sync_interval has no effect: what is logged is fetched when it is logged (train.log_every)",
    ]
