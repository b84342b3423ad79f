"""Runs the blocks of one page in one folder, top to bottom, as a reader would, and says of each what became of it."""

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.docs.snippets import Block, commands_of
from tests.docs.stand_ins import MINIMAL, laid_over
from tokenkit.cli import main
from tokenkit.config import UserError, build, dump_yaml, override, parse_yaml
from tokenkit.report.content import Report
from tokenkit.verbs import run_schema

NOT_RUN = {  # the first words of a command → why no test types it
    "make ": "sets up an environment, or runs the tests that this is one of",
    "pip install": "changes the environment that the tests run in",
    "npx ": "llama.cpp, fetched by npm; benchmarks/ternary_llama_cpp.py reads our files with it",
}
SHELL = ("|", ">", "<", ";", "&&", "$(", "`")


def reason_not_to_run(command: str) -> str | None:
    """Why a command is on the closed list of those that are not run; None for all others."""
    return next((why for start, why in NOT_RUN.items() if f"{command} ".startswith(start)), None)


class PageRun:
    """The state that blocks of a page share: the folder, Python's names, what was printed last."""

    def __init__(self, folder: Path, whole: bool) -> None:
        self.folder = folder
        self.whole = whole
        """Whether slow blocks are run too, and several processes really started."""
        self.names: dict[str, Any] = {"__name__": "__page__"}
        self.printed = ""
        self.done: list[str] = []
        self.left_out: list[str] = []

    def run(self, block: Block) -> None:
        """Runs, or checks, one block; an AssertionError names the line of the page."""
        if block.has("file"):
            self._save(block)
        {
            "sh": self._shell,
            "python": self._python,
            "yaml": self._yaml,
            "json": self._json,
            "text": self._text,
        }[block.language](block)
        if block.place not in self.left_out:
            self.done.append(block.place)

    def _save(self, block: Block) -> None:
        path = self.folder / block.one("file")
        path.parent.mkdir(parents=True, exist_ok=True)
        text = block.text
        if path.suffix == ".jsonl":
            text = json.dumps(json.loads(text), ensure_ascii=False)
        path.write_text(text + "\n", "utf-8")

    def _text(self, block: Block) -> None:
        if block.has("output"):
            assert matches(block.text, self.printed), f"{block.place}: printed was\n{self.printed}"

    def _python(self, block: Block) -> None:
        if block.has("file"):  # a plugin or the like, which a command further down runs
            compile(block.text, block.place, "exec")
            return
        self.printed = self._captured(lambda: exec(compile(block.text, block.place, "exec"), self.names))[1]

    def _captured(self, action: Any) -> tuple[int, str]:
        """The exit code of an action and all that it prints."""
        printed = io.StringIO()
        code = 0
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                action()
            except SystemExit as left:
                code = left.code if isinstance(left.code, int) else int(left.code is not None)
        return code, printed.getvalue()

    def _json(self, block: Block) -> None:
        value = json.loads(block.text)
        if block.has("report"):
            build(Report, value)

    def _yaml(self, block: Block) -> None:
        value = parse_yaml(block.text, block.place)
        verb = block.one("verb")
        assert verb, f"{block.place}: write <!-- verb: NAME --> above it"
        merged = laid_over(MINIMAL.get(verb, {}), value)
        for line in block.all("run"):
            for word in shlex.split(line):
                override(merged, word)
        try:
            build(run_schema(verb), merged)
        except UserError as error:
            raise AssertionError(f"{block.place}: {error}") from None
        if block.has("run"):
            file = self.folder / f"block_{block.line}.yaml"
            file.write_text(dump_yaml(merged), "utf-8")
            self._expect(block, f"tokenkit {verb} {file.name}", 0, "", self._dry(block))

    def _dry(self, block: Block) -> bool:
        return block.has("slow") and not self.whole

    def _shell(self, block: Block) -> None:
        commands = commands_of(block)
        run = [command for command in commands if reason_not_to_run(command) is None]
        if not run:
            self.left_out.append(block.place)
        additions = block.all("run") or [""]
        if len(additions) == 1:
            additions *= len(run)
        assert len(additions) == len(run), f"{block.place}: {len(additions)} run lines for {len(run)} commands"
        self.printed = ""
        for command, added in zip(run, additions):
            code = int(block.one("exit", "0")) if command == run[-1] else 0
            self._expect(block, command, code, added, self._dry(block))

    def _expect(self, block: Block, command: str, expected: int, added: str, dry: bool) -> None:
        code, printed = self._command(command, shlex.split(added), dry)
        self.printed += printed
        assert code == expected, f"{block.place}: exit code {code}\n{command} {added}\n{printed[-3000:]}"

    def _command(self, command: str, added: list[str], dry: bool) -> tuple[int, str]:
        into = re.fullmatch(r"(tokenkit [^|<>;&`$]*[^|<>;&`$\s])\s*>\s*([\w./-]+)", command)
        if into is not None:
            code, printed = self._command(into[1], added, dry)
            Path(into[2]).write_text(printed, "utf-8")
            return code, ""
        if any(sign in re.sub(r"'[^']*'|\"[^\"]*\"", "", command) for sign in SHELL):
            return self._in_a_shell(command)
        words = shlex.split(command, comments=True)
        while "=" in words[0]:
            name, _, value = words.pop(0).partition("=")
            os.environ[name] = value
        if words[0] == "torchrun" and not self.whole:
            words, dry = words[words.index("tokenkit") :], True
        if words[0] == "torchrun":
            return self._in_a_shell(shlex.join([*small_launch(words), *added]))
        added = [*added, "--dry-run"] if dry else added
        if words[0] == "tokenkit":
            return self._in_process(words + added, main)
        if words[0] == "python" and words[1].endswith(".py"):
            return self._in_process(words[1:] + added, lambda: runpy.run_path(words[1], run_name="__main__"))
        if words[0] == "cd":
            os.chdir(words[1])
            return 0, ""
        return self._in_a_shell(command)

    def _in_process(self, words: list[str], action: Any) -> tuple[int, str]:
        before = sys.argv, sys.stdin
        sys.argv, sys.stdin = words, io.TextIOWrapper(io.BytesIO(b""))
        try:
            return self._captured(action)
        finally:
            sys.argv, sys.stdin = before

    def _in_a_shell(self, command: str) -> tuple[int, str]:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(
            ["sh", "-c", command], capture_output=True, text=True, env=os.environ | {"PATH": path}, timeout=600
        )
        return done.returncode, done.stdout + done.stderr


def small_launch(words: list[str]) -> list[str]:
    """The words of a torchrun command with two processes on this machine, whatever it asked for."""
    at = words.index("tokenkit")
    return ["torchrun", "--nproc-per-node", "2", "--no-python", *words[at:]]


def matches(expected: str, printed: str) -> bool:
    """Whether the printed text holds the expected one, up to white space; `...` and `…` alone stand for anything."""
    parts = [re.escape(" ".join(part.split())) for part in re.split(r"(?:^|(?<=\s))(?:\.\.\.|…)(?=[\s,]|$)", expected)]
    pattern = r"[\s\S]*?".join(part.replace(r"\ ", " ") for part in parts)
    return re.search(pattern, " ".join(printed.split())) is not None
