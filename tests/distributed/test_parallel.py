"""A run over several processes is the run of one: losses and weights, however its model and rows are spread."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from parallel_launch import Started, run
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

CLOSE = 1e-5
TENSOR = "train.parallel.model=2"
WAYS = {"data": (2, []), "model": (2, [TENSOR]), "both": (4, [TENSOR])}


@pytest.fixture(scope="session")
def folders(tmp_path_factory, bpe, unigram) -> dict[str, str]:
    """Tiny models with one table and with two, without dropout, and the tokenizer they are moved to."""
    found = {}
    for name, tied in (("tied", True), ("untied", False)):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=bpe.vocab_size,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=tied,
            bos_token_id=bpe.bos_id,
            eos_token_id=bpe.eos_id,
        )
        folder = tmp_path_factory.mktemp("spread") / name
        LlamaForCausalLM(config).save_pretrained(folder)
        bpe.save(folder)
        found[name] = str(folder)
    target = tmp_path_factory.mktemp("spread") / "unigram"
    unigram.save(target)
    return {**found, "target": str(target)}


def words(folders: dict[str, str], corpus: Path, output: Path, model: str = "tied", steps: int = 20) -> list[str]:
    return [
        "distill",
        f"output={output}",
        f"model.source={folders[model]}",
        f"target_tokenizer={folders['target']}",
        "losses={alm: {weight: 10}, clm: {}}",
        f"data={{source: {{path: {corpus}}}, window_bytes: 48}}",
        f"train={{steps: {steps}, batch_size: 8, save_every: 10, log_every: 1}}",
        "train.optimizer={learning_rate: 1e-3, warmup_steps: 5}",
        f"eval={{source: {{path: {corpus}, max_bytes: 500}}}}",
        "--quiet",
    ]


def logged(output: Path, name: str = "loss") -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").open()]
    return [line[name] for line in lines if name in line]


def wait_for_steps(started: Started, metrics: Path) -> None:
    """Comes back when some steps of a run under way are logged."""
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and len(metrics.read_text("utf-8").splitlines()) >= 5):
        assert time.monotonic() < deadline, started.wait()
        time.sleep(0.005)


def assert_alike(one: Path, other: Path) -> None:
    """Equal losses, norms and final weights up to rounding; how far they are apart is printed (`pytest -s`)."""
    apart = {}
    for name, tolerance in (("loss", CLOSE), ("gradient_norm", 1e-3)):
        first, second = logged(one, name), logged(other, name)
        assert len(first) == len(second)
        apart[name] = max(abs(x - y) / max(1.0, abs(x)) for x, y in zip(first, second))
        assert apart[name] <= tolerance
    apart["weights"] = 0.0
    for left, right in zip(*(sorted(f.glob("model/*.safetensors")) for f in (one, other)), strict=True):
        weights, others = load_file(left), load_file(right)
        assert weights.keys() == others.keys()
        for name, tensor in weights.items():
            apart["weights"] = max(apart["weights"], (tensor - others[name]).abs().max().item())
    print("\n ", ", ".join(f"{name} {value:.1e}" for name, value in apart.items()))
    assert apart["weights"] <= CLOSE


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "model, mode, checkpointing",
    [
        ("tied", "full", False),
        pytest.param("untied", "lora", True, marks=pytest.mark.slow),
        pytest.param("untied", "full", True, marks=pytest.mark.slow),
        pytest.param("tied", "lora", False, marks=pytest.mark.slow),
        pytest.param("tied", "full", True, marks=pytest.mark.slow),
        pytest.param("untied", "full", False, marks=pytest.mark.slow),
    ],
)
def test_processes_do_what_one_does(folders, corpus, tmp_path, way, model, mode, checkpointing):
    options = [f"train.mode={mode}", "train.lora.rank=4", f"train.gradient_checkpointing={str(checkpointing).lower()}"]
    run(0, [*words(folders, corpus, tmp_path / "one", model), *options], tmp_path / "said")
    count, spread = WAYS[way]
    run(count, [*words(folders, corpus, tmp_path / "spread", model), *options, *spread], tmp_path / "said")
    assert_alike(tmp_path / "one", tmp_path / "spread")


@pytest.mark.parametrize(
    "count, parts",
    [pytest.param(0, 8, marks=pytest.mark.slow), (2, 4), pytest.param(8, 1, marks=pytest.mark.slow)],
)
def test_eight_parts_of_one_row_are_one_of_eight(folders, corpus, tmp_path, count, parts):
    run(0, words(folders, corpus, tmp_path / "one", "untied"), tmp_path / "said")
    cut = [*words(folders, corpus, tmp_path / "parts", "untied"), f"train.accumulation={parts}"]
    run(count, cut, tmp_path / "said")
    assert_alike(tmp_path / "one", tmp_path / "parts")


def test_dropout_is_that_of_the_part_of_a_step(model_folder, folders, corpus, tmp_path):
    """Two processes draw what one draws that cuts its step in two: the same masks on the same rows."""
    own = {**folders, "drops": str(model_folder)}
    run(0, [*words(own, corpus, tmp_path / "one", "drops", 6), "train.accumulation=2"], tmp_path / "said")
    run(2, words(own, corpus, tmp_path / "spread", "drops", 6), tmp_path / "said")
    assert_alike(tmp_path / "one", tmp_path / "spread")


@pytest.mark.parametrize(
    "before, after",
    [
        ("data", None),
        pytest.param(None, "data", marks=pytest.mark.slow),
        pytest.param("data", "both", marks=pytest.mark.slow),
        pytest.param("both", "model", marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_with_another_number_of_processes(folders, corpus, tmp_path, before, after):
    run(0, words(folders, corpus, tmp_path / "one"), tmp_path / "said")
    count, spread = WAYS[before] if before else (0, [])
    stopping = [*words(folders, corpus, tmp_path / "parts"), *spread, "train.stop_after=10"]
    found = Started(count, stopping, tmp_path / "said").wait()
    assert all("stopped after step 10" in said for _, said in found[:1]), found
    count, spread = WAYS[after] if after else (0, [])
    run(count, [*words(folders, corpus, tmp_path / "parts"), *spread, "--resume"], tmp_path / "said")
    assert_alike(tmp_path / "one", tmp_path / "parts")


def test_a_checkpoint_of_several_holds_each_number_once(folders, corpus, tmp_path):
    run(4, [*words(folders, corpus, tmp_path / "run", "untied", 2), TENSOR, "train.save_every=2"], tmp_path / "said")
    run(0, [*words(folders, corpus, tmp_path / "one", "untied", 2), "train.save_every=2"], tmp_path / "said")
    for part in ("model", "optimizer"):
        sizes = []
        for name, count in (("run", 4), ("one", 1)):
            files = sorted((tmp_path / name / "checkpoints" / "step_00000002").glob(f"{part}*.safetensors"))
            assert len(files) == count
            numbers = 0
            for file in files:
                with safe_open(file, "pt") as opened:
                    numbers += sum(opened.get_tensor(key).numel() for key in opened.keys())  # noqa: SIM118
            sizes.append(numbers)
        assert sizes[0] == sizes[1]


def test_when_a_process_dies_the_others_say_so_and_the_run_goes_on(folders, corpus, tmp_path):
    long = [*words(folders, corpus, tmp_path / "run"), "train.save_every=2"]
    started = Started(2, long, tmp_path / "said")
    wait_for_steps(started, tmp_path / "run" / "metrics.jsonl")
    os.kill(started.processes[1].pid, signal.SIGKILL)
    (code, said), (killed, _) = started.wait()
    assert killed == -signal.SIGKILL
    assert code == 2
    assert said.splitlines()[-1] == (
        "tokenkit: another process of this run is gone; the newest whole checkpoint stands: continue with --resume"
    )
    run(2, [*long, "--resume"], tmp_path / "said")
    run(2, [*words(folders, corpus, tmp_path / "calm"), "train.save_every=2"], tmp_path / "said")
    for one, other in zip(*(load_file(tmp_path / f / "model" / "model.safetensors").values() for f in ("run", "calm"))):
        assert torch.equal(one, other)


def test_a_mistake_is_told_once(folders, corpus, tmp_path):
    run(2, words(folders, corpus, tmp_path / "run", steps=1), tmp_path / "said")
    found = Started(2, words(folders, corpus, tmp_path / "run", steps=1), tmp_path / "said").wait()
    assert [code for code, _ in found] == [2, 2]
    assert "holds another run; add --resume" in found[0][1]
    assert "holds another run" not in found[1][1]


def test_processes_that_were_not_started_are_asked_for(folders, corpus, tmp_path):
    ((code, said),) = Started(0, [*words(folders, corpus, tmp_path / "run"), TENSOR], tmp_path / "said").wait()
    assert code == 2
    assert said.splitlines()[-1] == (
        "tokenkit: train.parallel: 1 (data) x 2 (model) processes, and this run has 1; start it with torchrun "
        "--nproc-per-node 2 --no-python tokenkit ..."
    )
    assert not (tmp_path / "run").exists()


def test_one_process_that_is_asked_to_leave_takes_the_others_along(folders, corpus, tmp_path):
    started = Started(2, words(folders, corpus, tmp_path / "run", steps=2000), tmp_path / "said")
    wait_for_steps(started, tmp_path / "run" / "metrics.jsonl")
    os.kill(started.processes[1].pid, signal.SIGTERM)
    (code, said), (asked, quiet) = started.wait()
    assert (code, asked) == (128 + signal.SIGTERM, 128 + signal.SIGTERM)
    assert "tokenkit: stopped after step" in said
    assert "stopped after step" not in quiet
    step = int(said.rpartition("stopped after step ")[2].partition(";")[0])
    assert (tmp_path / "run" / "checkpoints" / f"step_{step:08d}" / "manifest.json").is_file()
