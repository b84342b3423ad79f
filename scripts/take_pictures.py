"""docs/report_page.png and docs/report_page_dark.png: the top of a page in both colour schemes, as Chromium draws it.

tokenkit distill runs/distill/embedded_unigram.yaml
tokenkit distill runs/distill/embedded_unigram.yaml output=outputs/embedded/clm losses={clm:{}}
tokenkit distill runs/distill/embedded_unigram.yaml output=outputs/embedded/bytes target_tokenizer=byte
tokenkit report runs/report/embedded.yaml
python scripts/take_pictures.py outputs/embedded/comparison.html docs/report_page
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

WIDTH, HEIGHT = 1200, 1230  # down to the curves
COLOURS = 64  # of the palette: flat areas and a little text
FLAGS = """--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update
--disable-sync --no-first-run --hide-scrollbars""".split()  # noqa: SIM905
SCHEMES = {"": ["--blink-settings=preferredColorScheme=1"], "_dark": ["--blink-settings=preferredColorScheme=0"]}


def take(page: Path, picture: Path, flags: list[str]) -> None:
    """The top of the page as a PNG with a palette."""
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if binary is None:
        sys.exit("take_pictures: no chromium on the PATH; install one")
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "page.png"
        size = [f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={raw}", f"--user-data-dir={folder}/profile"]
        subprocess.run(
            [binary, *FLAGS, *flags, *size, page.resolve().as_uri()], check=True, stderr=subprocess.DEVNULL, timeout=120
        )
        Image.open(raw).convert("RGB").quantize(COLOURS).save(picture, optimize=True)


def main() -> None:
    """Both pictures of the page that the command line names."""
    if len(sys.argv) != 3:
        sys.exit(f"take_pictures: {len(sys.argv) - 1} words; write PAGE PREFIX")
    for scheme, flags in SCHEMES.items():
        picture = Path(f"{sys.argv[2]}{scheme}.png")
        take(Path(sys.argv[1]), picture, flags)
        print(f"{picture}: {picture.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
