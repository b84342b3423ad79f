"""How much memory and disk a learned tokenizer takes."""

import os
import subprocess
import sys
from pathlib import Path

from tokenkit.tokenizers.autoencoder.package import Kind

STATM = Path("/proc/self/statm")
CHILD = """
import os, sys
from tokenkit.tokenizers.autoencoder.tokenizer import AutoEncoderTokenizer
if sys.argv[2] == "open":
    import tokenkit.tokenizers.autoencoder.open_codes
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
before = resident()
tokenizer = AutoEncoderTokenizer.load(sys.argv[1], sys.argv[2])
tokenizer.decode(tokenizer.encode("The quick brown fox jumps over the lazy dog 1234 !?"))
print(resident() - before)
"""


def resident_bytes(model: Path, kind: Kind) -> int | None:
    """What loading and using the tokenizer adds to a new process of its own; None where the system does not say."""
    if not STATM.is_file():
        return None
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(model), kind]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


def disk_bytes(model: Path) -> int:
    """The files of a package, or the one of a checkpoint."""
    files = [model] if model.is_file() else [path for path in model.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files)
