"""What mkdocs does to a page of docs/ beyond Markdown, so that the same files read well on a code host.

Links that leave docs/ have no place on the site, which knows no address of the repository: they become their text and
the path. Comments for the test that runs the snippets go. A pipe in code in a table is escaped for code hosts, and bare
for Python-Markdown.
"""

import re
from posixpath import normpath
from typing import Any

FENCE = re.compile(r"^(```.*?^```)$", re.M | re.S)
LEAVING = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<path>\.\./[^)\s#]+)(?:#[^)]*)?\)")
CODE = re.compile(r"`[^`\n]+`")
COMMENT = re.compile(r"^<!--.*?-->\n", re.M)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """The page's text as Python-Markdown wants it; what stands in fences is left alone."""
    parts = FENCE.split(markdown)
    folder = page.file.src_uri.rpartition("/")[0]
    return "".join(part if part.startswith("```") else prose(part, folder) for part in parts)


def on_page_content(html: str, *, page: Any, **_: Any) -> str:
    """The page's HTML; the tables of run-file keys are marked for the style sheet."""
    if page.file.src_uri != "reference.md":
        return html
    return html.replace("<table>", '<div class="keys"><table>').replace("</table>", "</table></div>")


def prose(text: str, folder: str) -> str:
    """Text between fences, links and tables mended."""
    text = COMMENT.sub("", text)
    text = LEAVING.sub(lambda link: link[0] if inside(link["path"], folder) else as_path(link, folder), text)
    return "\n".join(bare_pipes(line) if line.startswith("|") else line for line in text.split("\n"))


def target(path: str, folder: str) -> str:
    """A link of a page in a folder of docs/, as a path from the top of the repository."""
    return normpath(f"docs/{folder}/{path}")


def inside(path: str, folder: str) -> bool:
    return target(path, folder).startswith("docs/")


def as_path(link: re.Match[str], folder: str) -> str:
    """`[text](../path)` as its text and the path in the repository, once where both are the same."""
    path = target(link["path"], folder)
    return f"`{path}`" if link["text"].strip("`/") == path else f"{link['text']} (`{path}`)"


def bare_pipes(row: str) -> str:
    """A table's row without the backslashes before pipes in code."""
    return CODE.sub(lambda code: code[0].replace("\\|", "|"), row)
