"""Text in pieces is the whole text up to a stop string, however its bytes are cut."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenkit.config import UserError
from tokenkit.models.stopping import TextSoFar

LETTERS = st.text("abé東😀", max_size=30)
STOPS = st.lists(st.text("abé東😀", min_size=1, max_size=5), max_size=4)


def slow(text: str, stop: list[str]) -> str:
    """Character by character: the first end of a stop string, and of those that end there the longest."""
    for end in range(1, len(text) + 1):
        ending = [one for one in stop if text[:end].endswith(one)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


@given(
    LETTERS, st.lists(st.text("abé東😀", min_size=1, max_size=5), max_size=4), st.lists(st.integers(1, 9), max_size=40)
)
@settings(deadline=None, derandomize=True, max_examples=400)
def test_however_it_is_cut(text, stop, cuts):
    writer, spelled, pieces = TextSoFar(stop), text.encode(), []
    at = 0
    for cut in [*cuts, len(spelled)]:
        pieces.append(writer.add(spelled[at : at + cut]))
        at += cut
        assert not any(one in "".join(pieces) for one in stop)
        if not writer.stopped:  # everything that is surely text has been given out
            whole = spelled[:at].decode(errors="ignore")
            held = whole[len("".join(pieces)) :]
            assert held == "" or any(one.startswith(held) for one in stop)
    pieces.append(writer.finish())
    assert "".join(pieces) == writer.text == slow(text, stop)
    assert writer.stopped == (slow(text, stop) != text or any(text.endswith(one) for one in stop))
    assert writer.add(b"more") == "" or not writer.stopped


def test_half_a_character_is_never_given_out_and_wrong_bytes_are_marked():
    writer = TextSoFar()
    assert [writer.add(bytes([byte])) for byte in "é東".encode()] == ["", "é", "", "", "東"]
    assert writer.add(b"\xff") == "\ufffd"
    assert writer.add(b"a\xf0\x9f") == "a"
    assert writer.finish() == ""
    assert writer.text == "é東\ufffda"


def test_a_stop_string_inside_a_token_and_across_tokens():
    writer = TextSoFar(["\n\n", "END"])
    assert [writer.add(piece) for piece in (b"one\n", b"two EN", b"D", b"three")] == ["one", "\ntwo ", "", ""]
    assert (writer.text, writer.stopped, writer.finish()) == ("one\ntwo ", True, "")
    inside = TextSoFar(["\n\n"])
    assert inside.add(b"a\n\nb") == "a"
    assert inside.stopped


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UserError, match="an empty string is everywhere"):
        TextSoFar(["x", ""])
