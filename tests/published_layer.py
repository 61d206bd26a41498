"""The published MoRAM layer in PyTorch, each of its quirks a switch; it exists to be compared with, in tests only.

Written from facts, no line of it is theirs. github.com/Artificer-AI-Lab/MoRAM at commit 05c3d61 has a half for language
models in TRACE/utils/my_peft/tuners/moram.py and one for CLIP in XTAIL/loralib/moram.py. Without a switch this is the
layer of the paper (arXiv 2506.21035, Eq. 4 to 8). The switches have the names of `quirks.py`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

DROPOUT = 0.1  # lora_dropout of the TRACE runs


class PublishedLayer(torch.nn.Module):
    """What one adapted linear layer adds to W x. The mode (train or eval) decides as it does there: the threshold acts
    in eval only, dropout in train only. Frozen experts come first, then the `rank` fresh ones.
    """

    def __init__(self, keys: Tensor, d_out: int, method: Any, quirks: Collection[str] = ()):
        """`keys` [rank, d_in]: where the first fresh experts start. `method`: top_k, temperature, threshold, scale."""
        super().__init__()
        self.method, self.quirks = method, frozenset(quirks)
        self.register_buffer("frozen_keys", keys.new_zeros(0, keys.shape[1]))
        self.register_buffer("frozen_values", keys.new_zeros(0, d_out))
        self.keys = torch.nn.Parameter(keys.clone())
        self.values = torch.nn.Parameter(keys.new_zeros(len(keys), d_out))

    def freeze(self, keys: Tensor) -> None:
        """The end of a task. The next fresh experts begin at once, with these keys [rank, d_in] and values 0."""
        self.frozen_keys = torch.cat([self.frozen_keys, self.keys.detach()])
        self.frozen_values = torch.cat([self.frozen_values, self.values.detach()])
        self.keys.data = keys.clone()
        self.values.data = torch.zeros_like(self.values)

    def experts(self) -> tuple[Tensor, Tensor]:
        """Keys [n, d_in] and values [n, d_out] that take part, the scale multiplied into the values it applies to."""
        scale = self.method.scale
        old = self.frozen_values if "scale_lost_at_freeze" in self.quirks else scale * self.frozen_values
        if not self.training and "fresh_at_inference" not in self.quirks:
            return self.frozen_keys, old
        return torch.cat([self.frozen_keys, self.keys]), torch.cat([old, scale * self.values])

    def gates(self, z: Tensor) -> Tensor:
        """g [tokens, n] from responses z: softmax over the k best scores; in eval cut by the threshold afterwards, and
        what is left is not normalised again.
        """
        s = torch.nn.functional.normalize(z, dim=-1, eps=1e-12)
        k = max(self.method.top_k, 2) if "top_k_at_least_two" in self.quirks else self.method.top_k
        # the CLIP half never asks how many experts there are
        k = max(k, 2) if "rank_below_two_fails" in self.quirks else min(k, s.shape[-1])
        best, index = torch.topk(s, k, dim=-1)
        g = torch.zeros_like(s).scatter(-1, index, torch.softmax(best / self.method.temperature, dim=-1))
        if not self.training and self.method.threshold > 0:
            g = torch.where(s >= self.method.threshold, g, 0.0)
        return g

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """x [tokens, d_in] -> [tokens, d_out]. `keep` [tokens, d_in] says what dropout leaves standing."""
        if self.training and "dropout_before_scoring" in self.quirks:
            x = x * keep / (1.0 - DROPOUT)
        keys, values = self.experts()
        z = x @ keys.T
        return (self.gates(z) * z) @ values
