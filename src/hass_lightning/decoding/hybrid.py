"""The head's dynamic tree combined with prompt lookup.

The tokens that followed the current suffix earlier in the text are copied as an additional branch of the tree. Their
scores are the logarithms of the recent accuracy of copies after a match of that length, so that head and copy compete
for the same nodes. If a copy is expected to yield as many tokens as the recent trees of this answer, it is verified
without the head, as a chain of all nodes, which saves the forwards of the head. The head later reads the skipped tokens
in one call with their target features, so its drafts are the same as if it had read them before.

Shapes: L copied tokens, C candidates of the head, N nodes, D hidden (see the legend in types.py).
"""

from __future__ import annotations

from itertools import accumulate
from operator import mul

import torch
from torch import Tensor

from hass_lightning.decoding.drafting import DynamicTreeProposer
from hass_lightning.decoding.models import DecodingModels
from hass_lightning.decoding.prompt_lookup import Chains, SuffixIndex
from hass_lightning.decoding.tree import DraftTree, select_nodes

LONGEST_MATCH = 8  # longer matches share one rate
FIRST_TREES = 1.4  # expected number of accepted tokens per tree before the first one


def first_rate(length: int) -> float:
    """Return the expected accuracy of a copy's next token after `length` matching tokens, before any observation.

    Fitted to greedy answers of SmolLM2-135M: 0.22, 0.55, 0.65, 0.70, 0.75, 0.79, 0.81, 0.82 were measured for 1 to 8.
    """
    return 1 - 1.5 / (length + 1)


class RecentMean:
    """A mean in which older observations have smaller weights; the initial value counts as `weight` observations."""

    def __init__(self, first: float, weight: float = 8.0, decay: float = 0.9):
        self.first, self.weight, self.decay = first, weight, decay
        self.count = self.total = 0.0

    def add(self, value: float) -> None:
        """Add an observation."""
        self.count = self.decay * self.count + 1
        self.total = self.decay * self.total + value

    @property
    def value(self) -> float:
        """The mean."""
        return (self.weight * self.first + self.total) / (self.weight + self.count)


class Copier:
    """A growing text, the earlier position that it currently repeats, and the accuracy of copies from such positions.

    A match is followed as long as the text continues as it did at the earlier position; otherwise the longest suffix is
    looked up again. Each token of the answer is an observation for the rate of the match before it, also if it was not
    drafted. The rates therefore depend only on the text.

    Args:
        first: the prompt's first token.
        num_prompt_tokens: number of tokens that are copied but not used for the rates.
        max_ngram: longest suffix to look up.
    """

    def __init__(self, first: int, num_prompt_tokens: int, max_ngram: int):
        self.index = SuffixIndex([first], max_ngram)
        self.num_prompt_tokens = num_prompt_tokens
        self.match: tuple[int, int] | None = None  # its length, and the index of the token after it
        self._rates = [RecentMean(first_rate(length)) for length in range(1, LONGEST_MATCH + 1)]

    def append(self, token: int) -> None:
        """Add a token of the text."""
        tokens, followed = self.index.tokens, None
        if self.match is not None:
            length, start = self.match
            right = tokens[start] == token
            if len(tokens) >= self.num_prompt_tokens:
                self._rate(length).add(right)
            if right:
                followed = length + 1, start + 1
        self.index.append(token)
        self.match = followed or self.index.find()

    def _rate(self, length: int) -> RecentMean:
        return self._rates[min(length, LONGEST_MATCH) - 1]

    def copy(self, count: int) -> tuple[list[int], list[float]]:
        """Return the next `count` tokens of the match, and the probability of each if those before it are correct.

        The probabilities are in (0, 1). A copy that reaches the end of the text continues with itself. Empty without a
        match.
        """
        if self.match is None:
            return [], []
        (length, start), tokens = self.match, self.index.tokens
        period = len(tokens) - start
        copied = [tokens[start + offset % period] for offset in range(count)]
        return copied, [self._rate(length + offset).value for offset in range(count)]


def add_branch(
    scores: Tensor, parents: Tensor, ids: Tensor, branch: Tensor, log_rates: Tensor, depth: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Add a copied path before the head's candidates; candidates on the path are merged into it.

    A merged node has the larger of both scores, and the head's children of it become its children. The duplicate
    remains with score -inf, so that shapes do not depend on tokens and the host does not wait. No child has a higher
    score than its parent, and no node has two children with the same token, which verification requires.

    Args:
        scores, parents, ids: [C] of the head: cumulative log-probabilities, parents (-1 for the root), tokens.
        branch, log_rates: [L] the copied tokens, and the log-probability of each given the one before.
        depth: depth of the head's candidates.

    Returns:
        scores, parents, ids of all, [L + C].
    """
    count = branch.shape[0]
    below = torch.where(parents >= 0, parents + count, parents)
    siblings = parents < 0  # the head's candidates with the same parent as the next copied token
    score = scores.new_zeros(())
    path_scores = []
    for level in range(count):
        score = score + log_rates[level]
        if level < depth:
            same = siblings & (ids == branch[level])  # [C], at most one
            score = torch.maximum(score, scores.masked_fill(~same, -torch.inf).max())
            scores = scores.masked_fill(same, -torch.inf)
            siblings = same[parents] & (parents >= 0)
            below = below.masked_fill(siblings, level)
        path_scores.append(score)
    path = torch.arange(-1, count - 1, device=parents.device)
    return torch.cat([torch.stack(path_scores), scores]), torch.cat([path, below]), torch.cat([branch, ids])


class HybridProposer:
    """Proposes trees of head and copy, or copied chains.

    Args:
        max_tokens: maximum length of the sequence.
        num_nodes, depth, width: size of the tree.
        max_ngram: longest suffix to look up.
    """

    def __init__(
        self,
        models: DecodingModels,
        prompt: list[int],
        max_tokens: int,
        *,
        num_nodes: int,
        depth: int,
        width: int,
        max_ngram: int,
    ):
        self.max_nodes = num_nodes
        self.tree = DynamicTreeProposer(models, num_nodes, depth, width, max_tokens)
        self.device = models.target.device
        self.copier, self.chains = Copier(prompt[0], len(prompt), max_ngram), Chains(self.device)
        self.tree_tokens = RecentMean(FIRST_TREES)
        self._drafted = False  # whether the head drafted in the last cycle
        self._unread: list[int] = []  # tokens that the head has not read yet …
        self._features: list[Tensor] = []  # … and the target features of those before them, [K, D] per cycle

    def propose(self, token_ids: list[int], features: Tensor) -> DraftTree:
        """Return only the copy if its expected yield is that of recent trees or more, else the best nodes of both."""
        if self._drafted:
            self.tree_tokens.add(len(token_ids) - 1)
        for token in token_ids:
            self.copier.append(token)
        self._unread += token_ids
        self._features.append(features)
        copied, rates = self.copier.copy(self.max_nodes - 1)
        expected = sum(accumulate(rates, mul))
        self._drafted = not copied or expected < self.tree_tokens.value
        return self._draft(copied, rates) if self._drafted else self.chains(token_ids[-1], copied)

    def _draft(self, copied: list[int], rates: list[float]) -> DraftTree:
        tree, token_ids, features = self.tree, self._unread, torch.cat(self._features)
        self._unread, self._features = [], []
        scores, parents, ids = tree.search(token_ids, features)
        depths, depth = tree.candidates.depths, tree.depth
        if copied:
            branch = torch.tensor(copied, device=self.device)
            log_rates = torch.tensor(rates, device=self.device).log()
            scores, parents, ids = add_branch(scores, parents, ids, branch, log_rates, depth)
            depths = torch.cat([torch.arange(1, len(copied) + 1, device=self.device), depths])
            depth = max(depth, len(copied))
        chosen, shape = select_nodes(scores, parents, depths, self.max_nodes - 1, depth)
        root = torch.tensor(token_ids[-1:], device=self.device)
        return DraftTree(torch.cat([root, ids[chosen]]), shape)
