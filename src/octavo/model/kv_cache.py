"""Keys and values of the tokens already read, so that a new token costs one token's work.

A slot is one row of the cache. Index equals position: the key of a slot's token p lies at index p,
so a mask is a comparison of indices and rows of unequal length need no padding on the left.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.model_config import ModelConfig


class KVCache:
    """Preallocated keys and values of every layer, each (slots, K, capacity, E)."""

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        capacity: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Allocate room for ``slots`` rows of ``capacity`` tokens (default: block_size)."""
        self.capacity = capacity or config.block_size
        shape = (config.n_layer, slots, config.n_kv_head, self.capacity, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = [0] * slots

    @property
    def bytes(self) -> int:
        """Memory held, in bytes."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def view(self, slots: Sequence[int], counts: Sequence[int]) -> "CacheView":
        """These slots as a batch about to read ``counts`` new tokens each, right-padded."""
        for slot, count in zip(slots, counts, strict=True):
            if self.lengths[slot] + count > self.capacity:
                raise ValueError(
                    f"slot {slot} holds {self.lengths[slot]} of {self.capacity} tokens; "
                    f"{count} more do not fit"
                )
        return CacheView(self, list(slots), list(counts))

    def truncate(self, slot: int, length: int) -> None:
        """Forget a slot's tokens from position ``length`` on; 0 empties it."""
        self.lengths[slot] = min(self.lengths[slot], length)

    def copy(self, source: int, target: int, length: int) -> None:
        """Let one slot hold the first ``length`` tokens that another holds; it may be itself."""
        for buffer in (self.keys, self.values):
            buffer[:, target, :, :length] = buffer[:, source, :, :length]
        self.lengths[target] = length

    def erase(self, slot: int) -> None:
        """Empty a slot and put zeros where its numbers were."""
        self.keys[:, slot] = 0
        self.values[:, slot] = 0
        self.lengths[slot] = 0


class CacheView:
    """A batch of slots during one forward pass.

    Rows with fewer new tokens than the longest are padded on the right; padding that is written
    lies beyond a row's length, hidden by the mask until real tokens overwrite it.
    """

    def __init__(self, cache: KVCache, slots: list[int], counts: list[int]) -> None:
        self.cache, self.slots, self.counts = cache, slots, counts
        starts = [cache.lengths[slot] for slot in slots]
        width = max(counts)
        self.end = min(max(starts) + width, cache.capacity)
        self.aligned = len(set(starts)) == 1 and max(starts) + width <= cache.capacity
        self.start = starts[0]
        steps = torch.arange(width)
        self.positions = (torch.tensor(starts)[:, None] + steps).clamp(max=cache.capacity - 1)
        self.positions = self.positions.to(cache.keys.device)
        self.slot_index = torch.tensor(slots, device=cache.keys.device)
        self.whole = slots == list(range(cache.keys.size(1)))

    def mask(self) -> Tensor | None:
        """Which keys each query may see, (B, 1, T, end); None where plain causality says it."""
        if self.aligned and (self.start == 0 or self.positions.size(1) == 1):
            return None
        keys = torch.arange(self.end, device=self.positions.device)
        return (keys <= self.positions[:, :, None])[:, None]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values (B, K, T, E); return all up to ``end``, (B, K, end, E)."""
        return self._store(self.cache.keys[layer], k), self._store(self.cache.values[layer], v)

    def _store(self, buffer: Tensor, new: Tensor) -> Tensor:
        if self.aligned and self.whole:
            buffer[:, :, self.start : self.end] = new
            return buffer[:, :, : self.end].to(new.dtype)
        if self.positions.size(1) == 1:  # one token each: no padding, one store for all
            buffer[self.slot_index, :, self.positions[:, 0]] = new[:, :, 0].to(buffer.dtype)
        else:
            for row, (slot, count) in enumerate(zip(self.slots, self.counts, strict=True)):
                start = self.cache.lengths[slot]  # up to its own count: padding is not kept
                buffer[slot, :, start : start + count] = new[row, :, :count]
        rows = buffer if self.whole else buffer[self.slot_index]  # a full batch needs no gather
        return rows[:, :, : self.end].to(new.dtype)

    def commit(self) -> None:
        """Count the new tokens as read; called once, after the last layer."""
        for slot, count in zip(self.slots, self.counts, strict=True):
            self.cache.lengths[slot] += count
