"""What mergekit-tokensurgeon's own functions make of two vocabularies, for `tokensurgeon.py`; run by its own Python.

`PEER_PYTHON tokensurgeon_worker.py SOURCE DONOR BYTES`: folders of models, and a file of the donor tokens' bytes in
hexadecimal, a line per id. Prints a JSON object: the tokens it finds shared, those whose rows it would make, and how
many of these it would make from other text than the token's.
"""

import json
import sys
from pathlib import Path

from mergekit.tokenizer.normalization import normalized_vocabulary, unnormalize_token
from transformers import AutoTokenizer


def main() -> None:
    """Prints the counts."""
    source, donor = (normalized_vocabulary(AutoTokenizer.from_pretrained(folder)) for folder in sys.argv[1:3])
    spellings = [bytes.fromhex(line) for line in Path(sys.argv[3]).read_text("ascii").split("\n")]
    new = [(token, i) for token, i in donor.items() if token not in source and i < len(spellings) and spellings[i]]
    garbled = sum(unnormalize_token(token).encode() != spellings[i] for token, i in new)
    print(json.dumps({"shared": len(source.keys() & donor.keys()), "new": len(new), "garbled": garbled}))


if __name__ == "__main__":
    main()
