"""Peers that need an environment of their own: made once, from the package index, under .peers/ (which git ignores).

    python benchmarks/peers.py

mergekit 0.1.5 goes into a Python environment, with the torch of constraints.txt; node-llama-cpp into a Node folder. TRL
and lm-eval are in the development environment. What cannot be installed is said in one line, and its benchmark goes on
without it.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / ".peers"
MERGEKIT, NODE_LLAMA_CPP = "mergekit==0.1.5", "node-llama-cpp@3.22.0"
LIMIT = 1200  # seconds for one installation


def said(command: list[str], folder: Path) -> str | None:
    """None where the command did what it should, else the last thing that it wrote."""
    try:
        done = subprocess.run(command, check=False, cwd=folder, capture_output=True, text=True, timeout=LIMIT)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    lines = (done.stderr or done.stdout).strip().splitlines()
    return None if done.returncode == 0 else lines[-1] if lines else f"exit code {done.returncode}"


def mergekit() -> str | None:
    """Why mergekit is not there; None where it is."""
    folder = PEERS / "mergekit"
    if (folder / "bin/mergekit-tokensurgeon").exists():
        return None
    pip = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    return said([sys.executable, "-m", "venv", str(folder)], ROOT) or said(
        [*pip, "-c", "constraints.txt", "torch", MERGEKIT], ROOT
    )


def node_llama_cpp() -> tuple[Path | None, str | None]:
    """The folder that holds node_modules, or why there is none."""
    named = os.environ.get("TOKENKIT_NODE_LLAMA_CPP")
    if named is not None:
        return Path(named), None
    folder = PEERS / "node-llama-cpp"
    if (folder / "node_modules/node-llama-cpp/package.json").exists():
        return folder, None
    npm = shutil.which("npm")
    if npm is None:
        return None, "npm is not installed"
    folder.mkdir(parents=True, exist_ok=True)
    # its install script would fetch sources; the prebuilt library is a package of its own
    why = said([npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", NODE_LLAMA_CPP], folder)
    return (folder, None) if why is None else (None, why)


def main() -> None:
    """Makes both and says how it went."""
    for name, why in ((MERGEKIT, mergekit()), (NODE_LLAMA_CPP, node_llama_cpp()[1])):
        print(f"{name}: {'ready' if why is None else f'absent: {why}'}")


if __name__ == "__main__":
    main()
