"""What a tokenizer has done: counters of each thread, added up when they are read."""

import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

MOST_IDS = 10_000  # of the histogram


class Statistics:
    """Counts of chunks, characters, ids and seconds; of single ids too where that is asked for."""

    def __init__(self, count_ids: bool) -> None:
        self.histogram: Counter[int] | None = Counter() if count_ids else None
        self._own = threading.local()
        self._all: list[Counter[str]] = []
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:
        """A copy in another process begins to count anew."""
        return (Statistics, (self.histogram is not None,))

    def encoded(self, chunks: int, characters: int, ids: Sequence[int], seconds: float) -> None:
        """One call of encode."""
        counts = self._counts()
        counts["encode_calls"] += 1
        counts["chunks_encoded"] += chunks
        counts["characters"] += characters
        counts["tokens"] += len(ids)
        counts["encode_nanoseconds"] += round(seconds * 1e9)
        if self.histogram is not None:
            with self._lock:
                self.histogram.update(ids)
                if len(self.histogram) > 2 * MOST_IDS:
                    self.histogram = Counter(dict(self.histogram.most_common(MOST_IDS)))

    def decoded(self, tokens: int, seconds: float) -> None:
        """One call of decode."""
        counts = self._counts()
        counts["decode_calls"] += 1
        counts["tokens_decoded"] += tokens
        counts["decode_nanoseconds"] += round(seconds * 1e9)

    def as_json(self) -> dict[str, Any]:
        """Sums over the threads, and means."""
        with self._lock:
            total: Counter[str] = sum(self._all, Counter())
        found: dict[str, Any] = {
            "chunks_encoded": total["chunks_encoded"],
            "tokens": total["tokens"],
            "tokens_decoded": total["tokens_decoded"],
            "characters": total["characters"],
            "characters_per_token": total["characters"] / max(1, total["tokens"]),
            "mean_encode_ms": total["encode_nanoseconds"] / 1e6 / max(1, total["encode_calls"]),
            "mean_decode_ms": total["decode_nanoseconds"] / 1e6 / max(1, total["decode_calls"]),
        }
        if self.histogram is not None:
            found["ids"] = dict(self.histogram.most_common(MOST_IDS))
        return found

    def text(self, spelled: Sequence[bytes]) -> str:
        """A few lines for people."""
        values = self.as_json()
        lines = [
            f"{name}: {value:,.3f}" if isinstance(value, float) else f"{name}: {value:,}"
            for name, value in values.items()
            if name != "ids"
        ]
        for index, count in list(values.get("ids", {}).items())[:10]:
            literal = spelled[index] if index < len(spelled) else b"(code)"
            lines.append(f"  {index}: {count:,} times {literal!r}")
        return "\n".join(lines)

    def _counts(self) -> Counter[str]:
        try:
            return self._own.counts
        except AttributeError:
            self._own.counts = Counter()
            with self._lock:
                self._all.append(self._own.counts)
            return self._own.counts
