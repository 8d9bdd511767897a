"""Check that overfits one conversation: if the whole draft chain is accepted then, mask, loss, head and decoder agree.

The answer is the target's own greedy answer, so an overfitted draft is accepted to the last token.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from hass_lightning.checks.finding import Finding, error, ok
from hass_lightning.data.batches import FeatureDataset, collate
from hass_lightning.data.features import extract_features
from hass_lightning.data.tokens import encode_prompt
from hass_lightning.decoding import Autoregressive, Chain, DecodingModels
from hass_lightning.draft import SavedDraft, load_draft
from hass_lightning.serving import export_head
from hass_lightning.target_model.model import TargetModel
from hass_lightning.training.module import HassModule
from hass_lightning.types import Conversation, DecodeResult, Tokens

ANSWER_TOKENS = 24
LEARNING_RATE = 3e-3  # at hidden size 64; decreases with the root of the width: 1e-3 at 576, as in the quickstart


def greedy_answer(target: TargetModel, conversations: Sequence[Conversation]) -> tuple[list[int], list[int]]:
    """Return (prompt, answer) of the first question with an answer of sufficient length.

    Raises:
        ValueError: if there is none.
    """
    for conversation in conversations:
        first = next(n for n, message in enumerate(conversation.messages) if message.role == "user")
        prompt = encode_prompt(target.tokenizer, conversation.messages[: first + 1])
        if len(prompt) + ANSWER_TOKENS > target.max_length:
            continue
        answer = Autoregressive().generate(DecodingModels(target), prompt, ANSWER_TOKENS).token_ids
        if len(answer) >= ANSWER_TOKENS // 2:
            return prompt, answer
    raise ValueError(
        f"the target answers none of {len(conversations)} questions with {ANSWER_TOKENS // 2} tokens or more: check "
        "that its chat template is the one it was tuned with."
    )


def accepted(result: DecodeResult) -> tuple[int, int]:
    """Return (accepted, offered) draft tokens of the cycles that end within the answer."""
    position, kept, offered = 1, 0, 0  # the prefill yields one token
    for count, drafted in zip(result.accepted, result.drafted, strict=True):
        if position + drafted <= len(result.token_ids):
            kept, offered = kept + count, offered + drafted
        position += count + 1
    return kept, offered


def with_tokens(token_ids: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """A draft vocabulary of the size of `token_ids` [Vd], ascending, that holds `wanted` [N].

    Raises:
        ValueError: if it is too small for them.
    """
    if len(wanted) > len(token_ids):
        raise ValueError(
            f"model.draft.vocab_size={len(token_ids)} is less than the {len(wanted)} tokens of one answer: raise it."
        )
    others = token_ids[~torch.isin(token_ids, wanted)]
    return torch.cat([wanted, others[: len(token_ids) - len(wanted)]]).sort().values


def check_overfit(
    target: TargetModel,
    module: HassModule,
    conversations: Sequence[Conversation],
    folder: Path,
    max_steps: int = 400,
    every: int = 20,
) -> list[Finding]:
    """Train a new module on one conversation until its chain is accepted; export the head, read it back, decode again.

    The loss terms and alignment are those of the config; optimizer and precision are not (AdamW, float32). In a pruned
    vocabulary, tokens of the answer replace as many others.

    Args:
        target: the target.
        module: a new module.
        conversations: conversations to choose from.
        folder: an empty folder for features and head.
        max_steps: maximum number of steps.
        every: number of steps between decodings.
    """
    prompt, answer = greedy_answer(target, conversations)
    if module.token_ids is not None:
        module.token_ids = with_tokens(module.token_ids, torch.tensor(answer).unique())
    module.float().to(target.device)
    module.head = target.head.to(target.device, torch.float32)
    module.vocabulary = module.head.draft_vocabulary(module.token_ids)
    ids = torch.tensor([*prompt, *answer])
    mask = torch.zeros(len(ids), dtype=torch.bool)
    mask[len(prompt) - 1 : -1] = True
    store = extract_features(target, [Tokens("overfit", ids, mask)], folder)
    batch, _ = collate([FeatureDataset(store)[0]])
    batch = batch.to(target.device)
    batch.features = batch.features.float()
    decoder = Chain(depth=module.alignment.depth)

    def chain(saved: SavedDraft) -> DecodeResult:
        vocabulary = target.head.draft_vocabulary(saved.token_ids)
        models = DecodingModels(target, saved.for_decoding(target.dtype, target.device), vocabulary)
        return decoder.generate(models, prompt, len(answer))

    rate = LEARNING_RATE * min(1.0, (64 / target.hidden_size) ** 0.5)
    optimizer = torch.optim.AdamW(module.draft.parameters(), lr=rate, weight_decay=0.0)
    result, step = None, 0
    while step < max_steps and (result is None or accepted(result)[0] < accepted(result)[1]):
        for _ in range(every):
            optimizer.zero_grad()
            module.aligned_loss(batch, batch.features).total.backward()
            torch.nn.utils.clip_grad_norm_(module.draft.parameters(), 1.0)
            optimizer.step()
        step += every
        result = chain(SavedDraft(module.draft, module.token_ids, {}))
    assert result is not None
    kept, offered = accepted(result)
    learned = f"after {step} steps on one conversation {kept} of {offered} draft tokens are accepted"
    if kept < offered:
        cure = (
            "see mask_alignment, probe_step and rope; if they are ok, the configured loss cannot be learned: compare "
            "with model/loss=hass."
        )
        return [error("overfit", f"{learned} (chain of {decoder.depth})", cure)]
    try:
        saved = SavedDraft(module.draft, module.token_ids, {"target": target.name})
        export_head(saved, target, "hub", folder / "head")
    except ValueError as refusal:
        return [ok("overfit", learned), error("reload", f"hass-export would reject the head: {refusal}")]
    again = chain(load_draft(folder / "head"))
    if (again.token_ids, again.accepted) != (result.token_ids, result.accepted):
        kept, offered = accepted(again)
        message = (
            f"exported and read back, {kept} of {offered} draft tokens of the head are accepted, but all of them "
            "were before"
        )
        return [
            ok("overfit", learned),
            error("reload", message, "the exported head is not the trained head: please report it."),
        ]
    return [ok("overfit", learned), ok("reload", "exported and read back, the head drafts the same tokens")]
