"""The corpus in the package: its size, its categories, its split, and that its manifest describes it."""

import gzip
import hashlib
import json
from collections import Counter

from hass_lightning.data.openers import PLAIN, read_openers
from hass_lightning.data.order import split_validation
from hass_lightning.data.prompts import JsonLines
from hass_lightning.target_model.source import local_path

PATH = "package://data/corpora/smollm2_135m.jsonl.gz"
FILE = local_path(PATH)
MANIFEST = json.loads(FILE.with_name("smollm2_135m.manifest.json").read_text())
TEXT = gzip.decompress(FILE.read_bytes())
LINES = [json.loads(line) for line in TEXT.splitlines()]


def num_turns(line):
    return sum(message["role"] == "user" for message in line["messages"])


def test_it_is_large_and_broad():
    counts = MANIFEST["counts"]
    assert counts["answer_tokens"] >= 1_200_000 and len(LINES) >= 6_000
    assert sum(num_turns(line) > 1 for line in LINES) >= 0.2 * len(LINES)
    categories = Counter(line["category"] for line in LINES)
    assert set(categories) == {*read_openers("package://data/openers.yaml"), PLAIN}
    assert min(categories.values()) >= 0.04 * len(LINES)
    assert FILE.stat().st_size <= 5_000_000


def test_its_manifest_describes_it():
    counts = MANIFEST["counts"]
    assert hashlib.sha256(TEXT).hexdigest() == MANIFEST["sha256"]
    assert Counter(line["split"] for line in LINES) == {name: counts[name] for name in ("train", "validation")}
    assert Counter(str(num_turns(line)) for line in LINES) == counts["turns"]
    for name, numbers in counts["categories"].items():
        assert sum(line["category"] == name for line in LINES) == numbers["conversations"]
    assert MANIFEST["command"].startswith("hass-prepare data=self_distilled")
    assert set(MANIFEST["settings"]["benchmarks"]) >= {"gsm8k", "humaneval", "mt_bench"}


def test_no_question_is_in_both_parts_and_validation_is_greedy():
    conversations = JsonLines(PATH).load(None)
    train, validation = split_validation(conversations, 100)
    assert len(validation) == 100 and len(train) > 5_000
    assert not {c.question for c in train} & {c.question for c in validation}
    assert len({c.category for c in validation}) >= 11
    assert all(line["temperature"] == 0 for line in LINES if line["split"] == "validation")
    assert {line["temperature"] for line in LINES if line["split"] == "train"} == {0.0, 1.0}
