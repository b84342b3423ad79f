"""Times the JAX toolkit's aligner (bminixhofer/tokenkit) from a checkout of it, for `alignment_throughput.py`.

Its package has our name, so it lives in a process of its own: `PYTHONPATH=CHECKOUT python upstream_worker.py FOLDER`,
where FOLDER holds `teacher` and `student` (tokenizer folders) and `texts.json`. For each line on standard input it
aligns everything once and prints the CPU seconds and the number of chunks.
"""

import json
import sys
import time
from pathlib import Path

from tokenkit import align, byteify


def main() -> None:
    """Encodes once, then answers every line of standard input with one measurement."""
    folder = Path(sys.argv[1])
    teacher = byteify.load_byteify_tokenizer(f"{folder / 'teacher'}:source=Llama3")
    student = byteify.load_byteify_tokenizer(f"{folder / 'student'}:source=GPT2")
    texts = json.loads((folder / "texts.json").read_text("utf-8"))
    pairs = [(teacher.tokenize(text), student.tokenize(text)) for text in texts]
    for _ in sys.stdin:
        copies = [(list(a), list(b)) for a, b in pairs]  # the aligner changes the lists it is given
        begin = time.process_time()
        found = [align.get_alignment_indices(a, b, teacher, student)[0] for a, b in copies]
        seconds = time.process_time() - begin
        print(seconds, sum(map(len, found)), flush=True)


if __name__ == "__main__":
    main()
