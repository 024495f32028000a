"""The samples of one update as padded tensors, and as batches for a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastpeft.data import PreferenceCollator
from fastpeft.models.decode import Completion


class Rollout:
    """Completions of prompts; every tensor is ``(s, t)``, samples by tokens, or ``(s,)``.

    Args:
        items: the prompts, items of a `PromptDataset`.
        samples: their completions, those of a prompt one after another.
        texts: the same as texts.
        group: completions a prompt.
        device: where the tensors live.
    Attributes:
        mask: which entries are tokens that are learnt from.
        lengths: tokens of each sample.
        logprobs, ref_logprobs: of the tokens under the policy that drew them, and under the reference.
        values, returns, advantages, kl: of each token.
        scores: of each sample.
    """

    def __init__(
        self,
        items: Sequence[Mapping[str, Any]],
        samples: Sequence[Completion],
        texts: Sequence[str],
        group: int,
        device: torch.device,
    ) -> None:
        self.items = items
        self.samples = samples
        self.texts = texts
        self._group = group
        self._device = device
        self.lengths = torch.tensor([len(sample.tokens) for sample in samples], device=device)
        self.tokens = torch.arange(int(self.lengths.max()), device=device) < self.lengths[:, None]
        self.mask = self.tokens
        zeros = torch.zeros(self.tokens.shape, device=device)
        self.logprobs, self.ref_logprobs, self.values, self.returns, self.advantages, self.kl = (
            zeros.clone() for _ in range(6)
        )
        self.scores = zeros[:, 0].clone()

    @property
    def token_count(self) -> int:
        """Tokens of all prompts and samples together."""
        prompts = sum(len(item["input_ids"]) for item in self.items) * self._group
        return prompts + sum(len(sample.tokens) for sample in self.samples)

    def samples_of(self, items: Tensor) -> Tensor:
        """Numbers of the samples of some prompts."""
        members = torch.arange(self._group)
        return (items[:, None] * self._group + members).flatten().to(self._device)

    def batches(
        self, collate: PreferenceCollator, size: int, items: Tensor | None = None
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Batches for a model.

        Args:
            collate: lays them out.
            size: prompts a batch.
            items: which prompts; None for all.
        Yields:
            Numbers of the samples, and what the collator made of them, on the device.
        """
        items = torch.arange(len(self.items)) if items is None else items
        for part in items.split(size):
            rows = [
                {
                    "prompt_ids": list(self.items[item]["input_ids"]),
                    "completions": [
                        sample.tokens for sample in self.samples[item * self._group : (item + 1) * self._group]
                    ],
                    "pairs": [],
                    "margins": None,
                }
                for item in part.tolist()
            ]
            batch = collate(rows)
            yield self.samples_of(part), {name: tensor.to(self._device) for name, tensor in batch.items()}

    def padded(self, index: Tensor, flat: Tensor) -> Tensor:
        """A number a token, in the order of a batch, as rows ``(len(index), t)``; 0 in the padding."""
        where = self.tokens[index]
        return torch.zeros(where.shape, dtype=flat.dtype, device=flat.device).masked_scatter(where, flat)

    def put(self, name: str, index: Tensor, flat: Tensor) -> None:
        """Keep a number a token of a batch as one of the attributes."""
        getattr(self, name)[index] = self.padded(index, flat).float()

    def mean_kl(self) -> Tensor:
        """Nats a sample, over those that are learnt from."""
        return self.kl.sum() / self.mask[:, 0].sum().clamp(min=1)
