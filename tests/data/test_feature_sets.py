"""hass-prepare cache=list|prune: which feature sets are listed and which are deleted."""

import json
import os
import time

import pytest
from filelock import FileLock

from hass_lightning.data.feature_sets import list_feature_sets, prune_feature_sets


@pytest.fixture
def root(tmp_path):
    """Three sets, 40, 10 and 0 days old."""
    for name, days in (("old", 40), ("middle", 10), ("new", 0)):
        folder = tmp_path / "features" / name
        folder.mkdir(parents=True)
        (folder / "shard-00000.safetensors").write_bytes(b"x" * 1000)
        (folder / ".lock-00000").touch()
        os.utime(folder, (time.time() - 86_400 * days,) * 2)
    return tmp_path / "features"


def test_the_oldest_is_listed_first_with_its_size(root):
    listed = list_feature_sets(root)
    assert [each["name"] for each in listed] == ["old", "middle", "new"]
    assert [(each["num_shards"], each["bytes"]) for each in listed] == [(1, 1000)] * 3
    assert listed[0]["days_unused"] == pytest.approx(40, abs=0.1)


def test_only_what_is_old_and_not_being_written_goes(root):
    with FileLock(root / "old" / ".lock-00000"):
        assert [each["name"] for each in prune_feature_sets(root, 5)] == ["middle"]
    assert [each["name"] for each in prune_feature_sets(root, 30)] == ["old"]
    assert [path.name for path in root.iterdir()] == ["new"]


def test_the_command_lists_and_prunes(root, call_command):
    words = (f"paths.cache_dir={root.parent}", "experiment=smoke")
    listed = json.loads(call_command("prepare", *words, "cache=list").out.splitlines()[-1])
    assert [each["name"] for each in listed["feature_sets"]] == ["old", "middle", "new"]
    pruned = json.loads(call_command("prepare", *words, "cache=prune").out.splitlines()[-1])
    assert [each["name"] for each in pruned["removed"]] == ["old"]
    assert "cache=lsit must be list or prune" in call_command("prepare", *words, "cache=lsit").err
