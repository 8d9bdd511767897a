"""Model card of an exported head: usage, measured results and provenance."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hass_lightning.draft import SavedDraft
from hass_lightning.runs.redaction import redact
from hass_lightning.serving.engines import Profile
from hass_lightning.target_model import TargetModel


@dataclass(frozen=True)
class RunFacts:
    """Information about a head from its run folder; empty if the head has no run folder.

    Args:
        metrics: metrics.json.
        provenance: provenance.json.
        start: start.json (hashes of the tensors before training, and the features).
        settings: the config's `model`, `data` and `trainer` as YAML text.
    """

    metrics: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    start: dict[str, Any] = field(default_factory=dict)
    settings: str = ""

    @classmethod
    def read(cls, run_dir: Path, settings: str = "") -> RunFacts:
        """Read the files of a run folder; missing ones are empty."""

        def content(name: str) -> dict[str, Any]:
            path = run_dir / name
            return json.loads(path.read_text()) if path.exists() else {}

        return cls(content("metrics.json"), content("provenance.json"), content("start.json"), settings)


def _measured(metrics: dict[str, Any]) -> list[str]:
    """Return the lines of a table of results with 95 % intervals, or of a sentence that nothing was measured."""
    rows = []
    for name, title in (("acceptance_length", "acceptance length τ"), ("speedup", "speedup over autoregressive")):
        value, low, high = (metrics.get(f"{name}{end}") for end in ("", "_low", "_high"))
        if value is not None:
            interval = f"[{low:.2f}, {high:.2f}]" if low is not None and high is not None else ""
            rows.append(f"| {title} | {value:.2f} | {interval} |")
    if not rows:
        return ["Not measured when it was exported: `hass-benchmark draft=<this folder>` measures it.", ""]
    return [
        "| | value | 95 % interval |",
        "|---|---|---|",
        *rows,
        "",
        f"{metrics.get('num_prompts', '?')} held-out questions, greedy. τ is the number of tokens of verified cycles "
        "per target forward, including the bonus token. The speedup is valid only for the machine it was measured on.",
        f"Identical to autoregressive decoding in float32: {metrics.get('num_identical', '?')} of "
        f"{metrics.get('num_checked', '?')} checked answers.",
        "",
    ]


def model_card(
    saved: SavedDraft, target: TargetModel, base_model: str, profile: Profile, facts: RunFacts, folder: str
) -> str:
    """Return the text of README.md of the export, without secrets. `base_model` is the target's hub id or name."""
    notes = saved.notes
    front = ["library_name: hass_lightning", "tags: [speculative-decoding, eagle, hass, draft-model]"]
    if base_model.count("/") == 1 and not base_model.startswith((".", "/", "~")):
        front.insert(0, f"base_model: {json.dumps(base_model)}")
    lines = [
        "---", *front, "---",
        f"# Draft head for {target.name}",
        "",
        f"A speculative-decoding draft head for `{base_model}` (EAGLE architecture; hass_lightning, HASS, arXiv "
        "2408.15766). It drafts tokens that the target verifies, so the output is that of the target.",
        "",
        f"Layout `{profile.name}`, checked with {profile.checked_with}. To serve it:",
        "", "```bash", profile.command(folder, base_model, saved.token_ids is not None), "```", "",
    ]  # fmt: skip
    lines += ["## Measured", "", *_measured(facts.metrics)]
    lines += ["## Provenance", ""]
    made = {
        "target fingerprint": target.fingerprint[:16],
        "imported from": notes.get("imported_from"),
        "alignment depth (HCA)": notes.get("alignment_depth"),
        "loss terms and weights": notes.get("loss_terms"),
        "training step": notes.get("step"),
        "features (content hash)": facts.start.get("features"),
        "config hash": facts.provenance.get("config_hash"),
        "git commit": facts.provenance.get("git_commit"),
        "draft vocabulary": None if saved.token_ids is None else f"{len(saved.token_ids)} tokens",
        "bias in fc": saved.draft.fc_bias is not None,
    }
    lines += [f"- {name}: {value}" for name, value in made.items() if value is not None]
    if facts.settings:
        lines += ["", "```yaml", facts.settings.rstrip(), "```"]
    lines += [
        "", "## Limits", "",
        "It fits only this target, with the chat template it was trained with. Fewer draft tokens are accepted in "
        "languages, domains and lengths that differ from its training data. It changes the speed, not the output.", "",
    ]  # fmt: skip
    return redact("\n".join(lines))
