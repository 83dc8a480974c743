"""The PyTorch engine: the reference that every other engine is tested against, and the fallback.

It draws the next id of many slots at once. The cache is a matter of speed alone: with
``use_cache=False`` the same windows are read from their first token at every step.
"""

import numpy as np
import torch
from torch import Tensor

from octavo.errors import ConfigError
from octavo.generating.sampling import pick, top_logprobs
from octavo.generating.writing import Slot, window_start
from octavo.model.gpt import GPT
from octavo.model.kv_cache import KVCache


class TorchEngine:
    """Writes with a `GPT`, on the device and in the precision of its weights."""

    def __init__(
        self,
        model: GPT,
        slots: int = 1,
        vocab: int | None = None,
        use_cache: bool = True,
        chunk: int = 256,
    ) -> None:
        """Prepare to write up to ``slots`` rows at once.

        Ids from ``vocab`` on are padding and never drawn (default: there are none). A pass reads at
        most ``chunk`` tokens of a row. The cache grows with the longest row, up to block_size.
        """
        self.model, self.slots, self.use_cache, self.chunk = model, slots, use_cache, chunk
        self.vocab = vocab or model.config.vocab_size
        self.starts = [0] * slots  # where the window of each slot's cached tokens begins
        self.cache = self._new_cache(min(chunk, model.config.block_size))

    @torch.inference_mode()
    def step(self, slots: list[Slot]) -> list[int]:
        """Draw the next id of each slot, which the caller appends; reads what is not cached yet.

        Puts the model in eval mode. Raises `ConfigError` for ids outside its vocabulary and
        `NonFiniteError` for logits that are not finite.
        """
        if self.model.training:
            self.model.eval()
        states = self._read(slots) if self.use_cache else self._reread(slots)
        logits = self.model.lm_head(states).float().cpu().numpy()[:, : self.vocab]
        return [self._draw(slot, row) for slot, row in zip(slots, logits, strict=True)]

    def release(self, index: int) -> None:
        """Forget what the cache holds for this slot."""
        self.cache.truncate(index, 0)

    def _draw(self, slot: Slot, logits: np.ndarray) -> int:
        position = len(slot.ids)
        drawn = pick(logits, slot.ids, slot.sampling, slot.n, position, slot.prompt_length)
        slot.top = top_logprobs(logits, slot.logprobs, drawn) if slot.logprobs else []
        return drawn

    def _reread(self, slots: list[Slot]) -> Tensor:
        """The last state of each slot's window, (S, D), read anew, each slot by itself."""
        block_size = self.model.config.block_size
        windows = [slot.ids[window_start(len(slot.ids), block_size) :] for slot in slots]
        return torch.stack([self.model.hidden(self._batch([ids]))[0, -1] for ids in windows])

    def _read(self, slots: list[Slot]) -> Tensor:
        """The last state of each slot's window, (S, D), from the cache and what it lacks.

        Rows that lack one token go together, and so do rows that lack more: neither is padded to
        the other's length. Ordered by slot, a full batch is the whole cache and needs no copying.
        """
        unread = [self._unread(slot) for slot in slots]
        last: dict[int, Tensor] = {}
        in_order = sorted(range(len(slots)), key=lambda row: slots[row].index)
        one = [row for row in in_order if len(unread[row]) == 1]
        more = [row for row in in_order if len(unread[row]) > 1]
        for rows in (one, more):
            while rows:
                parts = [unread[row][: self.chunk] for row in rows]
                view = self.cache.view([slots[row].index for row in rows], [len(p) for p in parts])
                hidden = self.model.hidden(self._batch(parts), view)  # (rows, longest part, D)
                for state, row, part in zip(hidden, rows, parts, strict=True):
                    last[row] = state[len(part) - 1]
                    unread[row] = unread[row][len(part) :]
                rows = [row for row in rows if unread[row]]
        return torch.stack([last[row] for row in range(len(slots))])

    def _unread(self, slot: Slot) -> list[int]:
        """The ids of a slot's window that are not cached: at least the last, for its logits."""
        start = window_start(len(slot.ids), self.model.config.block_size)
        if start != self.starts[slot.index]:  # all positions shift: nothing cached is of use
            self.release(slot.index)
            self.starts[slot.index] = start
        window = slot.ids[start:]
        self._reserve(len(window))
        self.cache.truncate(slot.index, len(window) - 1)
        return window[self.cache.lengths[slot.index] :]

    def _batch(self, rows: list[list[int]]) -> Tensor:
        """Ids as (rows, longest row), padded on the right."""
        width, size = max(map(len, rows)), self.model.config.vocab_size
        for row in rows:
            if min(row) < 0 or max(row) >= size:
                wrong = next(i for i in row if not 0 <= i < size)
                raise ConfigError(
                    f"the model has no token {wrong}", f"its vocabulary is 0 to {size - 1}"
                )
        padded = [row + [0] * (width - len(row)) for row in rows]
        return torch.tensor(padded, device=self.model.tok_emb.weight.device)

    def _reserve(self, tokens: int) -> None:
        """Make room for rows of so many tokens, at least doubling the room there is."""
        old = self.cache
        if tokens > old.capacity:
            most = self.model.config.block_size
            self.cache = self._new_cache(min(max(tokens, 2 * old.capacity), most))
            self.cache.keys[..., : old.capacity, :] = old.keys
            self.cache.values[..., : old.capacity, :] = old.values
            self.cache.lengths = old.lengths

    def _new_cache(self, capacity: int) -> KVCache:
        weight = self.model.tok_emb.weight
        return KVCache(self.model.config, self.slots, capacity, weight.device, weight.dtype)
