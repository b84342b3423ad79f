"""The stable names work as the README writes them, whatever was imported before."""

import subprocess
import sys

CODE = """
import tokenkit
from tokenkit.align.spans import align
from tokenkit.align.boundary import boundary_tokens
byte = tokenkit.load_tokenizer("byte")
a, b = byte.encode("Hello, wörld"), byte.encode("Hello, wörld")
found = tokenkit.align(a, b)
assert found.spans.tolist() == [[i, i + 1, i, i + 1] for i in range(len(a))]
assert found.chunk_a.tolist() == found.chunk_b.tolist() == list(range(len(a)))
import tokenkit.losses, tokenkit.transfer
assert "alm" in tokenkit.losses.LOSSES and "fvt" in tokenkit.transfer.INITIALIZERS
assert tokenkit.align is align
print(sorted(tokenkit.__all__))
try:
    tokenkit.nothing
except AttributeError as error:
    print(error)
"""


def test_the_readme_from_python():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    names, error = done.stdout.splitlines()
    assert "load_tokenizer" in names
    assert error == "module 'tokenkit' has no attribute 'nothing'"
