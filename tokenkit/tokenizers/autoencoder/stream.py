"""Text that arrives bit by bit → ids, and ids that arrive one by one → text; both as if all had been there at once."""

import codecs
from typing import Any

from tokenkit.tokenizers.autoencoder.chunkers import FixedChunker, cut, escaped, to_bytes, to_text
from tokenkit.tokenizers.autoencoder.codec import Codec


class EncodeStream:
    """`feed` gives ids that no later text can change, `flush` the rest. At most one piece of a chunk is held back."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._held = b""

    @property
    def held_bytes(self) -> int:
        """Bytes of which no id was given yet."""
        return len(self._held)

    def feed(self, data: str | bytes) -> list[int]:
        """The ids that are settled after this much more text or bytes."""
        self._held += to_bytes(escaped(data)) if isinstance(data, str) else data
        ready, partial = _whole_characters(self._held)
        chunks = self._codec.chunker.split(to_text(ready))
        if not chunks:
            return []
        ids = self._codec.encode_chunks(chunks[:-1])
        settled, last = _settled(to_bytes(chunks[-1]), self._codec)
        for piece in settled:
            ids += self._codec.spell_piece(piece)
        self._held = last + partial
        return ids

    def flush(self) -> list[int]:
        """The ids of what was held back; the stream is then as new."""
        held, self._held = self._held, b""
        return self._codec.encode_bytes(held)


def _settled(chunk: bytes, codec: Codec) -> tuple[list[bytes], bytes]:
    """The pieces of a chunk that stay when it grows, and the rest."""
    if isinstance(codec.chunker, FixedChunker):
        return [], chunk
    pieces = cut(chunk, codec.max_chunk)
    return pieces[:-1], pieces[-1]


def _whole_characters(data: bytes) -> tuple[bytes, bytes]:
    """What ends with a whole character, and the beginning of one behind it."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    decoder.decode(data)
    pending = decoder.getstate()[0]
    return data[: len(data) - len(pending)], pending


class DecodeStream:
    """`feed` gives the text that an id completes: never half a character, and codes when their run is whole.

    `put` and `end` are what `generate(streamer=...)` of transformers calls.
    """

    def __init__(self, codec: Codec, *, skip_prompt: bool = False) -> None:
        self._codec, self._skip = codec, skip_prompt
        self._run: list[int] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.text = ""

    def feed(self, index: int) -> str:
        """The characters that are complete with this id."""
        layout = self._codec.layout
        if not layout.is_open(index):
            spelled = self._flush_run() + self._codec.decode_bytes([index])
            return self._say(spelled)
        self._run.append(index)
        final = index >= layout.open_base + layout.num_codes
        full = self._codec.open_codes is not None and len(self._run) == self._codec.open_codes.groups
        return self._say(self._flush_run()) if final or full else ""

    def flush(self) -> str:
        """The rest: an unfinished run read as it stands, half a character as U+FFFD."""
        rest = self._flush_run()
        text = self._decoder.decode(rest, final=True)
        self._decoder.reset()
        self.text += text
        return text

    def put(self, value: Any) -> None:
        """Takes ids, in a list or in a tensor of any shape; `text` holds what they said so far."""
        if self._skip:  # what `generate` hands over first is the prompt
            self._skip = False
            return
        flat = value.flatten().tolist() if not isinstance(value, (list, tuple)) else value
        for index in flat:
            self.feed(int(index))

    def end(self) -> None:
        """The generation is over."""
        self.flush()

    def _flush_run(self) -> bytes:
        run, self._run = self._run, []
        return self._codec.decode_bytes(run) if run else b""

    def _say(self, spelled: bytes) -> str:
        text = self._decoder.decode(spelled)
        self.text += text
        return text
