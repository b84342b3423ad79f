"""The command line as a newcomer types it: help is quick and plain, a mistake is one line and exit code 2."""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from tokenkit.config import load
from tokenkit.verbs import RUNS, run_schema

ROOT = Path(__file__).parents[2]
RUN_FILES = sorted((ROOT / "runs").rglob("*.yaml"))


@pytest.fixture
def distil(tmp_path, model_folder, corpus):
    """The words of a small working run, each a key and a value."""
    return {
        "output": tmp_path / "out",
        "model.source": model_folder,
        "target_tokenizer": "byte",
        "losses": "{alm: {}}",
        "data.source": f"{{path: {corpus}, separator: '\\n\\n'}}",
        "data.window_bytes": 40,
        "train": "{steps: 2, batch_size: 2}",
        "eval.source": f"{{path: {corpus}, max_bytes: 200}}",
    }


def words(run, **changes):
    values = run | {key.replace("__", "."): value for key, value in changes.items()}
    return [f"{key}={value}" for key, value in values.items() if value is not None]


def one_line(result, *parts):
    code, out, error = result
    assert code == 2
    assert out == ""
    assert error.count("\n") == 1, error
    assert "Traceback" not in error
    for part in parts:
        assert str(part) in error


def test_a_run_from_end_to_end(tokenkit, distil, tmp_path, model_folder):
    code, out, error = tokenkit("distill", "-q", *words(distil), "report.prompts=['the cat']")
    assert code == 0, error
    results = json.loads((tmp_path / "out/results.json").read_text("utf-8"))
    assert results["steps"] == 2
    assert "trained_bits_per_byte" in out
    page = (tmp_path / "out/report.html").read_text("utf-8")
    assert "the cat" in page
    model = tmp_path / "out/model"
    code, out, _ = tokenkit("eval", f"model.source={model}", f"eval.source={distil['eval.source']}")
    assert code == 0
    found = yaml.safe_load(out)["bits_per_byte"]
    assert found == pytest.approx(results["trained_bits_per_byte"], rel=1e-5)
    code, out, _ = tokenkit("generate", f"model.source={model}", "prompts=['the cat']", "max_new_tokens=5")
    assert out.startswith("the cat")
    (tmp_path / "out/report.html").unlink()
    code, out, _ = tokenkit("report", f"run={tmp_path / 'out'}")
    assert (tmp_path / "out/report.html").read_text("utf-8") == page
    one_line(tokenkit("distill", "-q", *words(distil)), "holds another run", "--resume")
    one_line(
        tokenkit("distill", "-q", "--resume", *words(distil, train__seed=5)),
        "train.seed, report.prompts differ",
        "was 0, is 5",
    )
    assert tokenkit("distill", "-q", "--resume", *words(distil), "report.prompts=['the cat']")[0] == 0


def test_transfer_and_align(tokenkit, tmp_path, model_folder):
    words = ("transfer", f"output={tmp_path / 'moved'}", f"model.source={model_folder}", "target_tokenizer=byte")
    assert tokenkit(*words)[0] == 0
    one_line(tokenkit(*words), tmp_path / "moved", "exists already")
    code, out, _ = tokenkit("align", f"teacher={model_folder}", f"student={tmp_path / 'moved'}", "text=the cat")
    assert code == 0
    assert "t" in out


def test_a_dry_run_writes_nothing_and_prints_a_run_file(tokenkit, distil, tmp_path):
    code, out, _ = tokenkit("distill", "--dry-run", *words(distil), "++train.seed=3")
    assert code == 0
    path = tmp_path / "again.yaml"
    path.write_text(out, "utf-8")
    assert load(run_schema("distill"), [str(path)]).train.seed == 3
    assert not (tmp_path / "out").exists()


def test_unknown_keys_types_and_files(tokenkit, distil, tmp_path):
    one_line(tokenkit("distill", *words(distil, train__stepz=3)), "train.stepz: unknown key", "did you mean 'steps'")
    one_line(tokenkit("distill", *words(distil, losses__alm__temprature=3)), "did you mean 'temperature'")
    one_line(tokenkit("distill", *words(distil, train__batch_size="many")), "train.batch_size", "'many'")
    one_line(tokenkit("distill", tmp_path / "no.yaml"), "no.yaml: no such run file")
    one_line(tokenkit("distill", *words(distil, losses="{}")), "losses: empty")
    one_line(tokenkit("distill", *words(distil, model__source=tmp_path / "no")), tmp_path / "no")
    one_line(tokenkit("distill", *words(distil, target_tokenizer=tmp_path / "no")), tmp_path / "no")
    one_line(tokenkit("distill", *words(distil, **{"data.source": "{path: /no/such.txt}"})), "/no/such.txt")
    one_line(tokenkit("schema", "distil"), "did you mean 'distill'")
    assert not (tmp_path / "out").exists()


def test_an_empty_corpus(tokenkit, distil, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n\n \n", "utf-8")
    source = f"{{path: {tmp_path / 'empty.txt'}}}"
    one_line(tokenkit("distill", *words(distil, **{"data.source": source})), "empty.txt", "empty corpus")
    assert not (tmp_path / "out").exists()


def test_two_vocabularies_for_a_loss_that_wants_one(tokenkit, distil, tmp_path):
    result = tokenkit("distill", *words(distil, losses="{forward_kl: {}}"))
    one_line(result, "losses.forward_kl: needs one vocabulary", "use a loss that works across tokenizers: alm, dskd")
    assert not (tmp_path / "out").exists()


def test_one_vocabulary_may_use_it(tokenkit, distil):
    assert tokenkit("distill", "-q", *words(distil, target_tokenizer=None, losses="{forward_kl: {}}"))[0] == 0


def test_a_slow_tokenizer(tokenkit, distil, tmp_path):
    folder = tmp_path / "slow"
    folder.mkdir()
    (folder / "vocab.txt").write_text("a\nb\n", "utf-8")
    (folder / "tokenizer_config.json").write_text("{}", "utf-8")
    one_line(tokenkit("distill", *words(distil, target_tokenizer=folder)), "slow", folder)


def test_a_tokenizer_that_changes_the_text(tokenkit, distil, tmp_path):
    folder = tmp_path / "lower"
    folder.mkdir()
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    lower = Tokenizer(models.BPE(alphabet, []))
    lower.normalizer = normalizers.Lowercase()
    lower.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    lower.save(str(folder / "tokenizer.json"))
    one_line(tokenkit("distill", *words(distil, target_tokenizer=folder)), "lower-cases letters")


def test_a_foreign_output_folder_is_left_alone(tokenkit, distil, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("dear", "utf-8")
    one_line(tokenkit("distill", *words(distil)), "holds files, but no run")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda p: p.relative_to(ROOT / "runs").as_posix())
def test_every_run_file_loads_and_begins_with_its_command(path):
    first = path.read_text("utf-8").splitlines()[0]
    verb = re.fullmatch(rf"# tokenkit ([\w -]+) {re.escape(path.relative_to(ROOT).as_posix())}.*", first)
    assert verb, first
    load(run_schema(verb[1]), [str(path)])


@pytest.mark.parametrize("verb", RUNS)
def test_every_verb_has_a_schema_and_help(tokenkit, verb):
    code, out, _ = tokenkit("schema", *verb.split())
    assert code == 0
    assert json.loads(out)["additionalProperties"] is False
    code, out, _ = tokenkit(*verb.split(), "--help")
    assert code == 0
    assert "Usage: tokenkit" in out


def test_help_does_not_wait_for_torch():
    heavy = ("torch", "transformers", "datasets", "tokenizers")
    code = f"import sys, tokenkit.cli; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_help_in_under_half_a_second_of_computing():
    """Processor time, not the clock: other tests run beside this one."""
    command = [str(Path(sys.executable).with_name("tokenkit")), "--help"]
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(times) < 0.5
