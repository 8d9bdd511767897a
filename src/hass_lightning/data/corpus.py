"""A generated corpus: `corpus.jsonl`, and `manifest.json` with its settings and counts, which is written last."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hass_lightning import __version__
from hass_lightning.data.dialogues import Dialogue, Written
from hass_lightning.runs.files import write_whole


class Corpus:
    """Collects generated conversations and the counts for the manifest."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.dropped: Counter[str] = Counter()  # conversations left out of the corpus, by reason
        self.ended: Counter[str] = Counter()  # conversations with fewer turns than requested, by reason
        self.num_answer_tokens = 0

    def add(self, name: str, written: Written, dialogue: Dialogue, category: str, split: str) -> None:
        """Add a conversation with the id `name`. One without any answer is dropped."""
        if not written.num_turns:
            self.dropped[written.end] += 1
            return
        if written.end:
            self.ended[written.end] += 1
        self.num_answer_tokens += written.num_answer_tokens
        self.lines.append({
            "id": name,
            "split": split,
            "category": category,
            "messages": [{"role": message.role, "content": message.content} for message in written.messages],
            "finished": written.finished,
            "temperature": dialogue.temperature,
        })  # fmt: skip

    def counts(self) -> dict[str, Any]:
        """Return the numbers of conversations by split, turns and category, answer tokens, and reasons for drops."""
        turns = Counter(sum(message["role"] == "user" for message in line["messages"]) for line in self.lines)
        by_category = {}
        for name in sorted({line["category"] for line in self.lines}):
            lines = [line for line in self.lines if line["category"] == name]
            several = sum(sum(message["role"] == "user" for message in line["messages"]) > 1 for line in lines)
            by_category[name] = {"conversations": len(lines), "of_several_turns": several}
        splits = Counter(line["split"] for line in self.lines)
        return {
            **{split: splits[split] for split in ("train", "validation")},
            "answer_tokens": self.num_answer_tokens,
            "unfinished_answers": sum(not line["finished"] for line in self.lines),
            "turns": {str(number): turns[number] for number in sorted(turns)},
            "categories": by_category,
            "dropped": dict(sorted(self.dropped.items())),
            "ended_early": dict(sorted(self.ended.items())),
        }

    def write(self, folder: Path, settings: Mapping[str, Any], notes: Mapping[str, Any] | None = None) -> Path:
        """Write both files. Return the path of the corpus."""
        path = folder / "corpus.jsonl"
        write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self.lines))
        manifest = {"settings": settings, **(notes or {}), "counts": self.counts(), "version": __version__}
        manifest["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        write_whole(folder / "manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
        return path
