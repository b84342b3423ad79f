"""The guide's commands run as it writes them, on small models, and what they write loads as it says."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from tokenkit.align.bias import load_bias
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.verbs.guide import GUIDES, command_of

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks
SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def run(monkeypatch):
    """Runs a script with words, in this process; its exit code is raised."""

    def start(name: str, *words: str) -> None:
        monkeypatch.setattr(sys, "argv", [name, *words])
        runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")

    return start


def words_of(script: str, *words: str) -> dict[str, str]:
    """The words of the verb, by key."""
    found = command_of(GUIDES[script], words).words
    return {key: json.loads(value) for key, _, value in (word.partition("=") for word in found)}


def test_keys_of_the_other_commands():
    assert words_of(
        "optimize_for_inference", "model_path=a=b", "output_path=o", "quantization=bfloat16", "use_cpu=true"
    ) == {
        "model": {"source": "a=b"},
        "output": "o",
        "format": "huggingface",
        "dtype": "bfloat16",
        "device": "cpu",
    }
    assert words_of("optimize_for_inference", "model_path=a")["format"] == "int8"
    assert words_of("eval", "eval.tasks=[a]", "eval.lengths=[1,9]")["eval"] == {
        "harness": {"tasks": ["a"], "max_length": 9}
    }
    paths = "baseline_mined_mapping_paths=[null, a]"
    models = "models=[{pretrained_model_name_or_path: x, tokenizer_name: y, add_bos: true}, {source: z}]"
    assert words_of("eval_lockstep", "combine_strategy=mean_logits", paths, models) == {
        "combine": "mean_logp",
        "mode": "mined",
        "mappings": ["a"],
        "models": [{"source": "x", "tokenizer": "y"}, {"source": "z"}],
    }
    lexical = words_of("train_zett_hn", "losses=[sft, lexical]", "loss_weights=[1, 0.5]", "collator.block_size=128")
    assert lexical == {
        "data": {"window_bytes": 512},
        "losses": {"clm": {"weight": 1}},
        "lexical_weight": 0.5,
        "copies": False,
    }


def test_the_guides_pipeline_example_runs(run, model_folder, tmp_path):
    run("export_model", f"model_path={model_folder}", f"output_path={tmp_path / 'out'}", "format=huggingface")
    pipe = pipeline("text-generation", model=str(tmp_path / "out"))
    result = pipe("the cat sat", max_new_tokens=8, max_length=None)
    assert result[0]["generated_text"].startswith("the cat sat")


def test_a_mistake_is_one_line_and_exit_code_2(run, model_folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(
            "optimize_for_inference", f"model_path={model_folder}", f"output_path={tmp_path / 'o'}", "quantization=int7"
        )
    assert stopped.value.code == 2
    with pytest.raises(SystemExit) as stopped:
        run("export_model", f"model_path={tmp_path / 'none'}", f"output_path={tmp_path / 'o'}")
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if not line.startswith("INFO")]
    assert [line.partition(":")[0] for line in lines] == ["optimize_for_inference", "export_model"]
    assert not (tmp_path / "o").exists()


def test_what_the_other_scripts_write(run, model_folder, corpus, tmp_path, capsys):
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "lora")
    run("merge_lora", f"base_model={model_folder}", f"lora_model={tmp_path}/lora", f"output_path={tmp_path}/merged")
    ids = AutoTokenizer.from_pretrained(tmp_path / "merged")("the cat", return_tensors="pt")["input_ids"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(merged(ids).logits, adapted.eval()(ids).logits, atol=1e-5)
    run("export_to_onnx", f"model_path={tmp_path}/merged", f"output_path={tmp_path}/m.onnx", "dynamic_axes=true")
    assert (tmp_path / "m.onnx").stat().st_size > 0
    capsys.readouterr()
    run("eval", f"model_path={tmp_path}/merged", f"eval.source.path={corpus}", "eval.source.max_bytes=2000")
    alone = yaml.safe_load(capsys.readouterr().out)["bits_per_byte"]
    models = f'models=[{{"source": "{tmp_path}/merged"}}, {{"source": "{tmp_path}/merged"}}]'
    source = [f"source.path={corpus}", "source.max_bytes=2000"]
    run("eval_lockstep", models, *source, "combine_strategy=mean_logits", f"output={tmp_path}/both.json")
    assert json.loads((tmp_path / "both.json").read_text())["bits_per_byte"] == pytest.approx(alone, abs=1e-6)


SMALL = ["eval.source.max_bytes=300", "train.lora.rank=2", "max_student_length=10", "max_teacher_length=10"]


@pytest.fixture
def sides(model_folder, corpus, unigram, tmp_path) -> list[str]:
    """The words of a small model, its target tokenizer and text, in the guide's names."""
    unigram.save(tmp_path / "unigram")
    rows = [json.dumps({"text": text}) for text in corpus.read_text("utf-8").split("\n\n")]
    (tmp_path / "text.jsonl").write_text("\n".join(rows), "utf-8")
    return [
        f"student.pretrained_model_name_or_path={model_folder}",
        f"target_tokenizer_name={tmp_path / 'unigram'}",
        "data.kind=jsonl",
        f"data.path={tmp_path / 'text.jsonl'}",
        "data.batch_size=2",
        f"ppl_eval_data={corpus}",
        "steps=2",
        *SMALL,
    ]


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text("utf-8"))


def run_yaml(folder: Path) -> dict:
    return yaml.safe_load((folder / "run.yaml").read_text("utf-8"))


def test_the_guides_command_of_mixed_precision(run, sides, tmp_path):
    given = ["dtype=bfloat16", "optimizer.use_fused_adam=true", "use_flash_attention=true"]
    run("cross_tokenizer_distill", *given, *sides, f"output={tmp_path / 'out'}", "-q")
    made = run_yaml(tmp_path / "out")["train"]
    assert (made["precision"], made["optimizer"]["fused"], made["attention"]) == ("bfloat16", True, "sdpa")
    assert results(tmp_path / "out")["steps"] == 2
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out/model").config.vocab_size == 330


def test_the_guides_command_of_the_hypernetwork(run, sides, tmp_path):
    network = ["hypernet.architecture=transformer", "hypernet.num_layers=2", "hypernet.use_attention=true"]
    latents = ["latents_do_project=true", "losses=[sft, alm_unconstrained, alm_latents]"]
    run("cross_tokenizer_distill", *network, *latents, *sides, f"output={tmp_path / 'out'}", "-q")
    made = run_yaml(tmp_path / "out")
    assert made["hypernet"]["num_layers"] == 2
    assert made["losses"]["hidden_states"]["project"] is True
    assert results(tmp_path / "out")["losses"] == ["alm", "clm", "hidden_states"]


def test_the_guides_two_stages(run, sides, model_folder, tmp_path):
    one, two = tmp_path / "stage1_embeddings", tmp_path / "stage2_full"
    first = ["train_embeddings=true", "train_model_mode=none"]
    run("cross_tokenizer_distill", *first, *sides, f"output_dir={one}", "-q")
    made = run_yaml(one)["train"]
    assert (made["mode"], made["embeddings"], made["steps"]) == ("embeddings", "all", 2)
    second = ["train_embeddings=false", "train_model_mode=lora", f"+student.pretrained_model_name_or_path={one}"]
    rest = [word for word in sides if not word.startswith(("student.", "target_"))]
    run("cross_tokenizer_distill", *second, *rest, f"output_dir={two}", "-q")
    made = run_yaml(two)
    assert (made["train"]["mode"], made["train"]["embeddings"]) == ("lora", "none")
    assert made["teacher"]["source"] == str(model_folder)  # what the first stage began with
    assert results(two)["zero_shot_bits_per_byte"] == pytest.approx(results(one)["trained_bits_per_byte"], abs=0.05)


@pytest.mark.slow
def test_a_file_of_the_guides_keys_and_a_run_that_goes_on(run, sides, tmp_path, capsys, caplog):
    values = dict(word.lstrip("+").split("=", 1) for word in sides if not word.startswith(("train.", "eval.source")))
    file = tmp_path / "config.yaml"
    file.write_text("".join(f"{key}: {value}\n" for key, value in values.items()), "utf-8")
    given = ["--config", str(file), "--overrides", *SMALL, f"output={tmp_path / 'out'}", "save_interval=1", "seed=3"]
    capsys.readouterr()
    run("cross_tokenizer_distill", *given, "--dry-run")
    assert yaml.safe_load(capsys.readouterr().out)["train"]["seed"] == 3
    assert "seed is train.seed here" in caplog.messages
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as stopped:
        run("cross_tokenizer_distill", *given, "train.stop_after=1", "-q")
    assert stopped.value.code in (0, 128)
    run("cross_tokenizer_distill", *given, "-q", "--resume")
    assert results(tmp_path / "out")["steps"] == 2


def test_the_pair_of_tokenizers_is_measured_and_used(run, sides, model_folder, tmp_path, capsys):
    pair = [f"teacher_tokenizer_name={model_folder}", f"target_tokenizer_name={tmp_path / 'unigram'}"]
    folder = tmp_path / "pair"
    text = ["data.kind=jsonl", f"data.path={tmp_path / 'text.jsonl'}", "seed=1234", "batch_size=1024", "num_workers=1"]
    run("compute_tokenizer_info", *pair, f"output={folder}", *text, "additive_smoothing_constant=1e-9", "-q")
    run("compute_mined_mapping", *pair, f"output={folder}", "num_workers=1")
    assert (folder / "mined_mapping.npy").is_file()
    teacher, student = load_tokenizer(str(model_folder)), load_tokenizer(str(tmp_path / "unigram"))
    assert len(load_bias(folder, teacher, student)) > 0
    given = ["losses=[alm_unbiased, baseline_mined]", f"tokenizer_pair_data_path={folder}", "baseline.kd_temp=2.0"]
    run("cross_tokenizer_distill", *given, *sides, f"output={tmp_path / 'out'}", "-q")
    made = run_yaml(tmp_path / "out")["data"]
    assert (made["chunks"], made["bias"], made["mined"]) == ("unbiased", str(folder), str(folder))


def test_a_network_is_trained(run, sides, model_folder, corpus, tmp_path):
    given = [f"model.pretrained_model_name_or_path={model_folder}", f"data.path={tmp_path / 'text.jsonl'}", "steps=2"]
    given += [
        f"ppl_eval_data={corpus}",
        f"eval.tokenizers=[{{tokenizer_name: {tmp_path / 'unigram'}}}]",
        "data.batch_size=2",
    ]
    small = [
        "eval.source.max_bytes=300",
        "sampler.vocab_size=400",
        "copies=false",
        "hypernet.num_layers=1",
        "collator.block_size=10",
    ]
    run("train_zett_hn", *given, *small, "losses=[sft]", f"output={tmp_path / 'net'}", "train_model_mode=no", "-q")
    assert (tmp_path / "net/hypernet.safetensors").is_file()


def test_help_is_the_story_of_the_command(run, capsys):
    run("cross_tokenizer_distill", "--help")
    assert "docs/guide_keys.md" in capsys.readouterr().out
