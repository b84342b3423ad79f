"""What a tokenizer does not keep of ordinary text, found by probing, in words."""

from collections.abc import Callable

from tokenkit.tokenizers.pieces import Definition, is_byte_level

NFC, NFKC = "normalises to NFC", "normalises compatibility characters (NFKC)"
LACKS_BYTES, LACKS_CHARACTERS = "lacks some bytes", "lacks some characters"
TOLERATED = frozenset({NFC, NFKC, LACKS_BYTES, LACKS_CHARACTERS})  # ordinary text survives these

# What an ordinary text may hold; a tokenizer that cannot spell one of these changes every corpus.
LETTERS, ACCENTS = "Hello World, it's 12:30!", "Crème brûlée à Noël"
WHITE_SPACE = ("two  spaces   and\ttab", "line\n\nother line\r\n", "end ")
UNUSED_BYTES = frozenset({0xC0, 0xC1, *range(0xF5, 0x100)})  # by UTF-8


def find_changes(definition: Definition, table: list[bytes], spell: Callable[[str], bytes | None]) -> tuple[str, ...]:
    """The changes; `spell` gives what the tokens of a text spell, None where one of them is the unknown token."""
    found = [words for words, probe in PROBES.items() if probe(spell)]
    if TOLERATED.issuperset(found):
        found += [words for text in (LETTERS, ACCENTS, *WHITE_SPACE) if (words := _otherwise(text, spell))][:1]
    if is_byte_level(definition):
        single = {spelled[0] for spelled in table if len(spelled) == 1}
        lacks = LACKS_BYTES if len(single | UNUSED_BYTES) < 256 else ""
    else:
        lacks = "" if definition["model"].get("byte_fallback") else LACKS_CHARACTERS
    return (*found, lacks) if lacks else tuple(found)


def _spelled(text: str, spell: Callable[[str], bytes | None]) -> str | None:
    spelled = spell(text)
    return None if spelled is None else spelled.decode("utf-8", errors="replace")


def _letters(text: str, spell: Callable[[str], bytes | None]) -> str | None:
    """What is spelled besides white space."""
    spelled = _spelled(text, spell)
    return None if spelled is None else "".join(spelled.split())


def _drops_white_space(spell: Callable[[str], bytes | None]) -> bool:
    for text in WHITE_SPACE:
        spelled = _spelled(text, spell)
        if (
            spelled is not None
            and spelled not in (text, " " + text)
            and "".join(spelled.split()) == "".join(text.split())
        ):
            return True
    return False


PROBES: dict[str, Callable[[Callable[[str], bytes | None]], bool]] = {
    "lower-cases letters": lambda spell: _letters("Hello World", spell) == "helloworld",
    "strips accents": lambda spell: (_letters(ACCENTS, spell) or "").lower() == "cremebruleeanoel",
    "drops white space": _drops_white_space,
    NFC: lambda spell: (_letters("cafe\u0301", spell) or "").lower() == "café",
    "normalises to NFD": lambda spell: (_letters("café", spell) or "").lower() == "cafe\u0301",
    NFKC: lambda spell: (_letters("ﬁn", spell) or "").lower() == "fin",
}


def _otherwise(text: str, spell: Callable[[str], bytes | None]) -> str:
    spelled = _spelled(text, spell)
    if spelled is None or spelled in (text, " " + text):
        return ""
    return f"changes ordinary text ({text!r} becomes {spelled!r})"
