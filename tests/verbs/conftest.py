"""What the tests of verbs share: a command line, run in this process."""

import io
import sys

import pytest

from tokenkit.cli import main


@pytest.fixture
def tokenkit(monkeypatch, capsys):
    """Runs a command line: exit code, standard output, standard error."""

    def run(*words, stdin=b""):
        monkeypatch.setattr(sys, "argv", ["tokenkit", *map(str, words)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = 0
        try:
            main()
        except SystemExit as left:
            code = left.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
