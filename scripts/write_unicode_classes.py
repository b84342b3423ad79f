"""Writes tokenkit/assets/unicode_classes.json: letters with marks, digits and white space, as chunkers see them.

The classes are pinned, so that chunks do not change with the Unicode version of a library. Needs `pip install regex`.
"""

import json
from pathlib import Path

import regex

TARGET = Path(__file__).parents[1] / "tokenkit" / "assets" / "unicode_classes.json"


def ranges(pattern: str) -> list[list[int]]:
    """Inclusive ranges of the code points that a pattern matches."""
    matches = regex.compile(pattern).fullmatch
    found: list[list[int]] = []
    for point in range(0x110000):
        if matches(chr(point)):
            if found and found[-1][1] == point - 1:
                found[-1][1] = point
            else:
                found.append([point, point])
    return found


if __name__ == "__main__":
    classes = {"letters": ranges(r"[\p{L}\p{M}]"), "digits": ranges(r"\p{N}"), "spaces": ranges(r"\p{White_Space}")}
    TARGET.write_text(json.dumps({"made_with": f"regex {regex.__version__}", **classes}) + "\n", "utf-8")
