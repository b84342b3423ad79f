"""What is installed from a wheel: everything the commands read lies in it, and they run from another folder."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DATA = {".jinja", ".css", ".js", ".json", ".jsonl", ".yaml", ".safetensors", ".py"}
TINY = [
    "targets=[byte]", "data.source.max_bytes=4000", "train.steps=2", "train.eval_at=[]", "train.device=cpu",
    "eval.source.max_bytes=400", "report.prompts=[]",
]  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built of a copy of what git would send, so that no leftover of an earlier build comes along."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("tokenkit", "pyproject.toml", "README.md", "LICENSE"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(target)]
    subprocess.run([*command, str(source)], check=True)
    (found,) = target.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(tmp_path_factory, wheel) -> Path:
    """The `tokenkit` of an environment with the wheel; what it needs is lent by the environment of the tests."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (packages / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n", "utf-8")
    python = folder / "bin/python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run([*command, "--no-index", "--ignore-installed", "--disable-pip-version-check"], check=True)
    return folder / "bin/tokenkit"


def run(installed: Path, folder: Path, *words: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(installed), *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_all_that_is_read_lies_in_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("tokenkit/")}
    files = (path for path in (ROOT / "tokenkit").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert held == {str(path.relative_to(ROOT)) for path in files if path.suffix in DATA}


@pytest.mark.slow
def test_the_commands_run_from_another_folder(installed, tmp_path):
    where = subprocess.run(
        [str(installed.with_name("python")), "-c", "import tokenkit; print(tokenkit.__file__)"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert Path(where.strip()).is_relative_to(installed.parents[1])  # and not the checkout
    assert "distill" in run(installed, tmp_path, "--help")
    resolved = yaml.safe_load(run(installed, tmp_path, "demo", "--dry-run"))
    assert resolved["targets"] == ["unigram", "byte"]
    run(installed, tmp_path, "demo", "--quiet", "output=demo", *TINY)
    assert (tmp_path / "demo/report.html").is_file()
    assert (tmp_path / "demo/byte/alm/model/config.json").is_file()
