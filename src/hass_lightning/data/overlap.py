"""Near-duplicates within a corpus, and passages that it shares with benchmarks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

Ngram = tuple[str, ...]


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())


def ngrams(words: list[str], size: int) -> set[Ngram]:
    """Return all n-grams of `size` words. A shorter text is one n-gram."""
    return {tuple(words[start : start + size]) for start in range(max(1, len(words) - size + 1))}


class NearDuplicates:
    """Keeps the texts that are not near-duplicates of texts kept before.

    Two texts are near-duplicates if the Jaccard similarity of their word trigrams is at least `similarity`. MinHash
    with locality-sensitive hashing (datasketch) finds the candidates; their similarity is then computed exactly.
    """

    def __init__(self, similarity: float):
        from datasketch import MinHashLSH  # seconds: it imports scipy

        if not 0 < similarity <= 1:
            raise ValueError(f"data.source.duplicate_similarity={similarity} must be in (0, 1].")
        self.similarity = similarity
        # weights: a false candidate costs little, because it is checked; a missing one is lost
        self._index = MinHashLSH(threshold=min(similarity, 0.7), num_perm=128, weights=(0.02, 0.98))
        self._kept: list[set[Ngram]] = []

    def keep(self, text: str) -> bool:
        """Keep the text unless it is a near-duplicate. Return whether it was kept."""
        from datasketch import MinHash

        found = ngrams(words_of(text), 3)
        sketch = MinHash(num_perm=128, seed=1)
        sketch.update_batch([" ".join(ngram).encode() for ngram in sorted(found)])
        for candidate in self._index.query(sketch):
            other = self._kept[candidate]
            if len(found & other) >= self.similarity * len(found | other):
                return False
        self._index.insert(len(self._kept), sketch, check_duplication=False)
        self._kept.append(found)
        return True


class BenchmarkOverlap:
    """Finds passages that a text shares with texts of benchmarks.

    A passage is `size` consecutive words, the usual measure of contamination (GPT-3, arXiv 2005.14165, app. C). For a
    shorter text with at least `shortest` words it is the whole text.
    """

    def __init__(self, texts: Mapping[str, Iterable[str]], size: int = 13, shortest: int = 8):
        self.size = size
        self._passages: dict[int, dict[Ngram, str]] = {}  # by number of words
        for name, each in texts.items():
            for words in map(words_of, each):
                if len(words) >= shortest:
                    known = self._passages.setdefault(min(size, len(words)), {})
                    known.update(dict.fromkeys(ngrams(words, size), name))

    def find(self, text: str) -> str | None:
        """Return the name of a benchmark that shares a passage with `text`, or None."""
        words = words_of(text)
        for size, passages in sorted(self._passages.items()):
            if len(words) >= size:
                for ngram in sorted(ngrams(words, size) & passages.keys()):
                    return passages[ngram]
        return None
