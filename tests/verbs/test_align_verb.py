"""`tokenkit align` as a newcomer types it: two tokenizers and a text, beside a run file and key=value."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenkit.align.show import compare
from tokenkit.config import UserError
from tokenkit.report.pair import write_pair_page
from tokenkit.tokenizers.bytelevel import ByteTokenizer
from tokenkit.verbs.align import AlignRun, read_text
from tokenkit.verbs.positional import load_positional

NAMES = ("teacher", "student", "text")


def one_line(result, *parts):
    code, out, error = result
    assert code == 2
    assert out == ""
    assert error.count("\n") == 1, error
    for part in parts:
        assert str(part) in error


def test_words_keys_and_run_files_say_the_same(tokenkit, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("teacher: byte\nstudent: byte\ntext: the cat\n", "utf-8")
    wanted = tokenkit("align", "byte", "byte", "the cat")
    assert wanted[0] == 0
    assert "byte: 7 tokens" in wanted[1]
    assert tokenkit("align", "teacher=byte", "student=byte", "text=the cat") == wanted
    assert tokenkit("align", path) == wanted
    assert tokenkit("align", path, "byte", "byte", "the cat") == wanted
    assert tokenkit("align", path, "text=cat")[1] == tokenkit("align", "byte", "byte", "cat")[1]


def test_texts_from_a_file_from_standard_input_and_with_an_at_sign(tokenkit, tmp_path):
    (tmp_path / "text.txt").write_bytes("naïve\r\n".encode())

    def text(*words, stdin=b""):
        code, out, error = tokenkit("align", "byte", "byte", *words, "--json", stdin=stdin)
        assert code == 0, error
        return json.loads(out)["text"]

    assert text(f"@{tmp_path / 'text.txt'}") == "naïve\r\n"
    assert text("-", stdin="é\n".encode()) == "é\n"
    assert text("@@user") == "@user"
    assert text("x = 1") == "x = 1"
    assert text("a=1") == "a=1"
    assert text("text=3 = 3") == "3 = 3"
    assert text("") == ""


def test_json_is_whole(tokenkit, model_folder):
    code, out, _ = tokenkit("align", model_folder, "byte", "the cat", "--json", "special=true")
    found = json.loads(out)
    assert code == 0
    assert found.keys() == {"text", "mode", "a", "b", "chunks", "counts"}
    keys = {"id", "text", "hex", "start", "end", "special", "chunk"}
    assert all(token.keys() == keys for side in "ab" for token in found[side]["tokens"])
    assert [token["special"] for token in found["b"]["tokens"]] == [True] + [False] * 7


def test_the_mode_is_an_option_and_a_key(tokenkit):
    spaced = tokenkit("align", "byte", "byte", "the cat", "--mode", "space", "--json")
    assert [chunk["text"] for chunk in json.loads(spaced[1])["chunks"]] == ["the", " cat"]
    assert tokenkit("align", "byte", "byte", "the cat", "mode=space", "--json") == spaced
    one_line(tokenkit("align", "byte", "byte", "the cat", "--mode", "words"), "mode", "'words'", "space")


def test_mistakes_are_one_line(tokenkit, tmp_path):
    one_line(tokenkit("align", "byte", "byte"), "2 words for 3 names", "write teacher student text")
    one_line(tokenkit("align", "byte", "byte", "a", "b"), "4 words for 3 names")
    one_line(tokenkit("align"), "teacher: missing")
    one_line(tokenkit("align", "teacher=byte", "studnet=byte", "text=a"), "studnet", "did you mean 'student'")
    one_line(tokenkit("align", "byte", "byte", f"@{tmp_path / 'no.txt'}"), "no.txt", "No such file", "@@")
    one_line(tokenkit("align", "byte", "byte", f"@{tmp_path}"), "Is a directory")
    one_line(tokenkit("align", "byte", "byte", "-", stdin=b"a\xff"), "standard input: not UTF-8 text at byte 1")
    one_line(tokenkit("align", "byte", tmp_path / "no", "a"), tmp_path / "no")
    one_line(tokenkit("align", tmp_path / "no.yaml", "a"), "no.yaml: no such run file")


def test_a_dry_run_can_be_run(tokenkit, tmp_path):
    code, out, _ = tokenkit("align", "byte", "byte", "a: [b", "--html", tmp_path / "x.html", "--dry-run")
    assert code == 0
    (tmp_path / "again.yaml").write_text(out, "utf-8")
    assert load_positional(AlignRun, NAMES, [str(tmp_path / "again.yaml")]).text == "a: [b"
    assert not (tmp_path / "x.html").exists()


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.text(min_size=1, max_size=20) | st.sampled_from(["x=1", "=", "texts=3", "a.yaml", "++", "text", "b=text=c"]))
def test_a_third_word_is_the_text_whatever_it_holds(text):
    run = load_positional(AlignRun, NAMES, ["byte", "byte", text])
    assert run.text == text
    assert text.startswith("@") or text == "-" or read_text(text) == text


def test_the_page_holds_everything_and_nothing_from_outside(tokenkit, tmp_path, model_folder):
    text = "the </script><b>cat</b>\n\x1b[31m é"
    page = tmp_path / "new" / "page.html"
    code, _, error = tokenkit("align", model_folder, "byte", text, "--html", page)
    assert code == 0, error
    html = page.read_text("utf-8")
    assert not re.search(r"(src|href)=\"(?!data:)", html)
    assert "<b>cat" not in html
    assert html.count("</script>") == 1
    assert "\x1b" not in html
    chunks = json.loads(tokenkit("align", model_folder, "byte", text, "--json")[1])["chunks"]
    for index in range(len(chunks)):
        assert html.count(f'data-chunk="{index}"') == 2
    for byte in text.encode():
        assert f"B {byte}: " in html
    assert list(page.parent.iterdir()) == [page]


def test_a_page_that_cannot_be_written(tokenkit, tmp_path):
    (tmp_path / "file").write_text("", "utf-8")
    one_line(
        tokenkit("align", "byte", "byte", "a", "--html", tmp_path / "file" / "page.html"), "--html", "cannot be written"
    )
    one_line(tokenkit("align", "byte", "byte", "a", "--html", tmp_path), "--html", "cannot be written")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_page_of_an_empty_text_and_of_tokens_in_no_chunk(tmp_path):
    byte = ByteTokenizer()
    write_pair_page(compare("", byte, byte), tmp_path / "page.html")
    assert "0 of one token" in (tmp_path / "page.html").read_text("utf-8")


def test_reading_a_text_that_is_not_there():
    with pytest.raises(UserError, match="@FILE"):
        read_text("@/no/such/file")


def test_conversations_are_shown_in_both_families(tokenkit, tmp_path):
    path = tmp_path / "rows.jsonl"
    messages = [{"role": "user", "content": "hé"}, {"role": "assistant", "content": "ok <|im_end|>"}]
    path.write_text(json.dumps({"messages": messages}) + "\n", "utf-8")
    code, out, _ = tokenkit("align", "byte:target=Qwen2", "byte:target=Gemma2", "--messages", path, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["text"] == "héok <|im_end|>"
    texts = [chunk["text"] for chunk in found["chunks"]]
    assert [text for text in texts if text] == [*"h", *"ok <|im_end|>"]  # é is two bytes: no text on its own
    for side, literal in (("a", "<|im_end|>"), ("b", "<end_of_turn>")):
        ends = [token for token in found[side]["tokens"] if token["text"] == literal]
        assert [token["special"] for token in ends] == [True, True]
        assert all(token["chunk"] >= 0 for token in ends)
    one_line(tokenkit("align", "byte", "byte", "--messages", path, "--row", 1), "row 1 of 1 conversations")
    one_line(tokenkit("align", "byte", "byte", "text", "--messages", path), "3 words for 2 names")
    one_line(tokenkit("align", "byte", "byte", "text=a", "--messages", path), "not both")
