"""Every command and code block of the documents is run, in order, in a folder of its own, on tiny models."""

import collections
import os
import re
from pathlib import Path
from unittest import mock

import pytest
import typer.main
from typer.core import TyperGroup

from tests.docs.run_blocks import NOT_RUN, PageRun, matches, reason_not_to_run
from tests.docs.snippets import DIRECTIVES, LANGUAGES, PAGES, ROOT, Block, commands_of, page_name, read_blocks
from tests.docs.stand_ins import lay_out, make_stand_ins
from tokenkit.cli import app

BLOCKS = {page_name(path): read_blocks(path) for path in PAGES}
RUN = {page: blocks for page, blocks in BLOCKS.items() if any(block.language != "text" for block in blocks)}
WHOLE = [page for page, blocks in RUN.items() if any(b.has("slow") or "torchrun " in b.text for b in blocks)]
LONG = {"export", "learned_tokenizer", "pairs", "tokenizers"}  # half a minute and more, of things that other tests hold
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # peft asks
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True:UserWarning"),
]


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory, model_folder, bpe, unigram, documents) -> Path:
    return make_stand_ins(tmp_path_factory.mktemp("pages") / "stand_ins", model_folder, bpe, unigram, documents)


def needs_shared(blocks: list[Block]) -> bool:
    """Whether a block, or a run file that one names, speaks of the folder of real data beside the project."""
    text = "\n".join(block.text for block in blocks if block.language != "text")
    files = [ROOT / name for name in re.findall(r"runs/[\w/.-]+\.yaml", text)]
    return "../shared" in text or any("../shared" in file.read_text("utf-8") for file in files)


def run_page(page: str, request, monkeypatch, tmp_path, whole: bool) -> None:
    blocks = BLOCKS[page]
    shared = request.getfixturevalue("shared") if needs_shared(blocks) else None
    monkeypatch.chdir(lay_out(request.getfixturevalue("stand_ins"), tmp_path, shared))
    state = PageRun(Path.cwd(), whole)
    with mock.patch.dict(os.environ, COLUMNS="125", NO_COLOR="1"):
        for block in blocks:
            state.run(block)
    alone = [block.place for block in blocks if only_listed(block)]
    assert state.left_out == alone
    assert len(state.done) + len(alone) == len(blocks)


def only_listed(block: Block) -> bool:
    """Whether a block holds nothing but commands of the closed list."""
    return block.language == "sh" and all(reason_not_to_run(command) for command in commands_of(block))


@pytest.mark.parametrize("page", [pytest.param(p, marks=pytest.mark.slow) if p in LONG else p for p in RUN])
def test_blocks_run(page, request, monkeypatch, tmp_path):
    run_page(page, request, monkeypatch, tmp_path, whole=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", WHOLE)
def test_blocks_run_whole(page, request, monkeypatch, tmp_path):
    run_page(page, request, monkeypatch, tmp_path, whole=True)


def test_every_block_has_a_language_and_directives_that_exist():
    for block in (block for blocks in BLOCKS.values() for block in blocks):
        assert block.language in LANGUAGES, f"{block.place}: write one of {', '.join(LANGUAGES)} behind the fence"
        assert {name for name, _ in block.directives} <= DIRECTIVES.keys(), block.place


@pytest.mark.parametrize("page", RUN)
def test_a_saved_file_is_used_further_down(page):
    for number, block in enumerate(BLOCKS[page]):
        name = block.one("file")
        if name:
            later = [other.text for other in BLOCKS[page][number + 1 :]]
            assert any(name in text for text in later), f"{block.place}: nothing uses {name}"


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_no_command_stands_outside_a_fence(path):
    outside = re.sub(r"^(```+)[\s\S]*?^\1", "", path.read_text("utf-8"), flags=re.M)
    assert not re.findall(r"^ {4,}(?:\$ )?(?:tokenkit|python|pip|make|torchrun) .*", outside, re.M)


def test_the_list_of_commands_that_are_not_run_is_short_and_used():
    commands = [c for blocks in BLOCKS.values() for b in blocks if b.language == "sh" for c in commands_of(b)]
    used = collections.Counter(start for start in NOT_RUN for c in commands if f"{c} ".startswith(start))
    assert set(used) == set(NOT_RUN)
    assert sum(used.values()) <= 0.1 * len(commands)


def names_of_commands() -> list[str]:
    """`distill`, `vocabulary prune`, ...: every command of the command line."""
    found = []
    for name, command in typer.main.get_command(app).commands.items():
        group = isinstance(command, TyperGroup)
        found += [f"{name} {word}" for word in command.commands] if group else [name]
    return found


def test_every_command_is_shown_in_some_block():
    text = "\n".join(block.text for blocks in BLOCKS.values() for block in blocks if block.language == "sh")
    missing = [name for name in names_of_commands() if not re.search(rf"tokenkit {name}(\s|$)", text)]
    assert not missing


def test_outputs_are_compared_up_to_white_space():
    assert matches("a  b\n c", "x\na b c\n")
    assert matches("a\n...\nd", "a\nb c\nd")
    assert not matches("a\nd", "a\nb\nd")
    assert not matches("a ... e", "a b d")
