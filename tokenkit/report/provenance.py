"""What a result was made with: this package and its commit, Python, the libraries, the machine in general words."""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenkit.version import __version__

DISTRIBUTION = "tokenkit-torch"
PACKAGE_LICENSE = "Apache-2.0"
UNKNOWN = "unknown"
MAIN = ("torch", "transformers", "tokenizers", "safetensors", "datasets", "numpy", "huggingface_hub")
CHECKOUT = Path(__file__).resolve().parents[2]
"""The folder that holds the package: a checkout, or where packages are installed."""


@dataclass(frozen=True)
class Commit:
    """Which source this is."""

    commit: str
    dirty: bool | None
    """Whether files differ from that commit; None where nobody knows."""


def package_commit(checkout: Path = CHECKOUT) -> Commit:
    """The commit of the package's own checkout, or the one it was installed from; never that of a repository it merely
    lies in."""
    if _is_ours(checkout):
        head = _git(checkout, "rev-parse", "HEAD")
        changes = _git(checkout, "status", "--porcelain")
        if head is not None:
            return Commit(head, None if changes is None else bool(changes))
    return Commit(_installed_from() or UNKNOWN, None)


def provenance() -> dict[str, Any]:
    """Version, commit and environment, as plain values."""
    commit = package_commit()
    return {
        "version": __version__,
        "commit": commit.commit,
        "dirty": commit.dirty,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": _threads(),
        "device": _device(),
        "libraries": libraries(),
    }


def libraries() -> dict[str, str]:
    """Versions of what this package needs, as installed here."""
    try:
        lines = [line for line in importlib.metadata.requires(DISTRIBUTION) or () if "extra ==" not in line]
        wanted = [re.split(r"[\s;<>=!~\[(]", line)[0] for line in lines]
    except importlib.metadata.PackageNotFoundError:
        wanted = []
    found = {}
    for name in dict.fromkeys([*MAIN, *wanted]):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _is_ours(checkout: Path) -> bool:
    """Whether the folder is the top of a git repository, and that repository is this package's."""
    top = _git(checkout, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != checkout.resolve():
        return False
    try:
        project = tomllib.loads((checkout / "pyproject.toml").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return project.get("project", {}).get("name") == DISTRIBUTION


def _git(folder: Path, *words: str) -> str | None:
    """What git says of a folder, whatever repository the caller's environment points at."""
    environment = {key: value for key, value in os.environ.items() if key[:4] != "GIT_"}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=20, env=environment
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _installed_from() -> str | None:
    """The commit that pip installed, where it was installed from a repository (PEP 610)."""
    try:
        text = importlib.metadata.distribution(DISTRIBUTION).read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return None
    origin = json.loads(text) if text else {}
    return origin.get("vcs_info", {}).get("commit_id")


def _threads() -> int:
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch is not None else os.cpu_count() or 1


def _device() -> str:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "CPU"
