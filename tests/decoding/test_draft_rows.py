"""The head computes the same features in drafting as in training: f^j of `unroll`, with target features to the root."""

import pytest
import torch
from decoding_toys import make_draft, make_target

from hass_lightning.decoding import Chain, DecodingModels, DynamicTree, Hybrid, StaticTree
from hass_lightning.decoding.drafting import HeadRows
from hass_lightning.draft import Alignment, unroll
from hass_lightning.types import Sampling


class Recorder:
    """Records the inputs of all calls of the head."""

    def __init__(self, monkeypatch):
        self.cycles = []
        accept, draft_rows = HeadRows.accept, HeadRows.draft_rows

        def recorded_accept(rows, token_ids, features):
            output = accept(rows, token_ids, features)
            context = [token for cycle in self.cycles for token in cycle["new"]] + token_ids
            keys = rows.cache.keys[0][:, :, : rows.num_rows].clone()
            self.cycles.append({"new": token_ids, "context": context, "first": output, "keys": keys, "rows": []})
            return output

        def recorded_rows(rows, token_ids, features, mask, level):
            output = draft_rows(rows, token_ids, features, mask, level)
            drafted = self.cycles[-1]["rows"]
            known = len(drafted)
            for slot, token in enumerate(token_ids.tolist()):
                # the drafted tokens that this one attends to, by depth: its ancestors
                earlier = range(known) if mask is None else mask[slot, :known].nonzero()[:, 0].tolist()
                path = [drafted[index]["token"] for index in earlier]
                path.append(token)
                assert len(path) == level
                drafted.append({"token": token, "path": path, "output": output[slot]})
            return output

        monkeypatch.setattr(HeadRows, "accept", recorded_accept)
        monkeypatch.setattr(HeadRows, "draft_rows", recorded_rows)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0)], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "decoder", [Chain(depth=4), StaticTree(), DynamicTree(12, 4, 3), Hybrid(12, 4, 3)], ids=lambda d: d.name
)
def test_drafting_matches_the_alignment_steps(decoder, sampling, monkeypatch):
    # with a vocabulary of 7, random heads are sometimes accepted
    target = make_target(vocab=7, dtype=torch.float64, seed=4)
    draft = make_draft(target)
    prompt = [3, 1, 4, 1, 5]
    recorder = Recorder(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    result = decoder.generate(DecodingModels(target, draft), prompt, 14, sampling, generator)
    assert sum(result.accepted) > 0
    depth = max(len(row["path"]) for cycle in recorder.cycles for row in cycle["rows"]) + 1
    for cycle in recorder.cycles:
        known = [prompt[0], *cycle["context"]]  # the root is its last token
        true = target.encode(torch.tensor([known]))[:, :-1]
        # accepted positions hold only target features, and nothing from earlier drafts
        rotary = draft.rotary(torch.arange(true.shape[1])[None])
        u = draft.fuse(target.head.embed(torch.tensor([known[1:]])), true)
        expected = draft.layer.self_attn.keys_values(u, rotary)[0]
        torch.testing.assert_close(cycle["keys"], expected, atol=1e-10, rtol=0)
        for row in [{"path": [], "output": cycle["first"][0]}, *cycle["rows"]]:
            tokens = torch.tensor([[*known[1:], *row["path"]]])
            # training has target features here, drafting has none, and f^j must not depend on them
            unknown = torch.full((1, len(row["path"]), true.shape[-1]), 7.0, dtype=true.dtype)
            steps = unroll(draft, target.head.embed(tokens), torch.cat([true, unknown], dim=1), Alignment(depth))
            aligned = list(steps)[len(row["path"])][0, -1]
            torch.testing.assert_close(row["output"], aligned.detach(), atol=1e-10, rtol=0)
