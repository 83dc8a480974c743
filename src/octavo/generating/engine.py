"""The PyTorch engine: the reference that every other engine is tested against, and the fallback.

It draws the next id of many slots at once, and several of a slot where a draft proposes them. The
cache is a matter of speed alone: with ``use_cache=False`` the same windows are read from their
first token at every step.
"""

import numpy as np
import torch
from torch import Tensor

from octavo.errors import NonFiniteError
from octavo.generating.sampling import pick, top_logprobs
from octavo.generating.static import Record, StaticStep, cuda_graph, flash_attention
from octavo.generating.writing import Slot, no_token, window_start
from octavo.model.attention import sdpa
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
        record: Record | None = None,
    ) -> None:
        """Prepare to write up to ``slots`` rows at once.

        Ids from ``vocab`` on are padding and never drawn (default: there are none). A pass reads at
        most ``chunk`` tokens of a row. The cache grows with the longest row, up to block_size.
        On a GPU steps of one token are recorded, by ``record`` or as a CUDA graph, and replayed.
        """
        self.model, self.slots, self.use_cache, self.chunk = model, slots, use_cache, chunk
        self.vocab = vocab or model.config.vocab_size
        self.starts = [0] * slots  # where the window of each slot's cached tokens begins
        on_gpu = model.tok_emb.weight.is_cuda
        self.attend = flash_attention() if on_gpu else sdpa
        record = record or (cuda_graph if on_gpu else None)
        most = model.config.block_size
        self.cache = self._new_cache(most if record else min(chunk, most))
        self.static = StaticStep(model, self.cache, record) if record else None

    @torch.inference_mode()
    def step(self, slots: list[Slot], most: int = 1) -> list[list[int]]:
        """Draw one id of each slot, more only where a draft agrees; see `Engine.step`.

        Puts the model in eval mode. Raises `ConfigError` for ids outside its vocabulary and
        `NonFiniteError` for logits that are not finite.
        """
        if self.model.training:
            self.model.eval()
        drafts = [self._usable_draft(slot, most) for slot in slots]
        read = self._read if self.use_cache else self._reread
        states = torch.cat(read(slots, drafts))
        logits = self.model.lm_head(states).float().cpu().numpy()[:, : self.vocab]
        ends = np.cumsum([len(draft) + 1 for draft in drafts])
        rows = np.split(logits, ends[:-1])
        return [self._draw(*each) for each in zip(slots, rows, drafts, strict=True)]

    def release(self, index: int) -> None:
        """Forget what the cache holds for this slot."""
        self.cache.truncate(index, 0)

    def share(self, source: int, target: int, count: int) -> None:
        """Let slot ``target`` hold the first ``count`` ids that ``source`` holds; reads nothing."""
        self.cache.copy(source, target, count)
        self.starts[target] = self.starts[source]

    def _usable_draft(self, slot: Slot, most: int) -> list[int]:
        """The part of a draft that may be returned and ends before the window does."""
        start = window_start(len(slot.ids), self.model.config.block_size)
        room = self.model.config.block_size - (len(slot.ids) - start)
        return slot.draft[: min(most - 1, slot.left - 1, room)]

    def _draw(self, slot: Slot, logits: np.ndarray, draft: list[int]) -> list[int]:
        """Draw at each position while the draft agrees; then the cache forgets the draft's rest.

        ``logits`` is (1 + draft, V): after what is written and after each id of the draft.
        """
        ids, slot.top, slot.logits = list(slot.ids), [], []
        for row, guess in zip(logits, [*draft, None], strict=True):
            try:
                token = pick(row, ids, slot.sampling, slot.n, len(ids), slot.prompt_length)
            except NonFiniteError:  # NaN among its keys would reach other rows: 0 x NaN is NaN
                self.cache.erase(slot.index)
                raise
            slot.top.append(top_logprobs(row, slot.logprobs, token) if slot.logprobs else [])
            if slot.keep_logits:
                slot.logits.append(row)
            ids.append(token)
            if token != guess or token == slot.eot:
                break
        self.cache.truncate(slot.index, len(ids) - 1 - self.starts[slot.index])
        return ids[len(slot.ids) :]

    def _reread(self, slots: list[Slot], drafts: list[list[int]]) -> list[Tensor]:
        """For each slot its last states, (1 + draft, D); its window is read anew, by itself."""
        block_size = self.model.config.block_size
        windows = [
            slot.ids[window_start(len(slot.ids), block_size) :] + draft
            for slot, draft in zip(slots, drafts, strict=True)
        ]
        return [
            self.model.hidden(self._batch([ids]))[0, -1 - len(draft) :]
            for ids, draft in zip(windows, drafts, strict=True)
        ]

    def _read(self, slots: list[Slot], drafts: list[list[int]]) -> list[Tensor]:
        """For each slot its last states, (1 + draft, D), from the cache and what it lacks.

        Rows that lack one token go together, and so do rows that lack more: neither is padded to
        the other's length. Ordered by slot, a full batch is the whole cache and needs no copying.
        """
        unread = [self._unread(slot, draft) for slot, draft in zip(slots, drafts, strict=True)]
        states: list[list[Tensor]] = [[] for _ in slots]
        in_order = sorted(range(len(slots)), key=lambda row: slots[row].index)
        one = [row for row in in_order if len(unread[row]) == 1]
        more = [row for row in in_order if len(unread[row]) > 1]
        if self.static and one:
            ids = self._batch([unread[row] for row in one])
            read = self.static.read([slots[row].index for row in one], ids)
            for row, state in zip(one, read, strict=True):
                states[row].append(state[None])
            one = []
        for rows in (one, more):
            while rows:
                parts = [unread[row][: self.chunk] for row in rows]
                view = self.cache.view([slots[row].index for row in rows], [len(p) for p in parts])
                # (rows, longest part, D)
                hidden = self.model.hidden(self._batch(parts), view, attend=self.attend)
                for state, row, part in zip(hidden, rows, parts, strict=True):
                    states[row].append(state[: len(part)])
                    unread[row] = unread[row][len(part) :]
                rows = [row for row in rows if unread[row]]
        wanted = zip(states, drafts, strict=True)
        return [torch.cat(parts)[-1 - len(draft) :] for parts, draft in wanted]

    def _unread(self, slot: Slot, draft: list[int]) -> list[int]:
        """The ids of a slot's window that are not cached, at least the last, and its draft."""
        start = window_start(len(slot.ids), self.model.config.block_size)
        if start != self.starts[slot.index]:  # all positions shift: nothing cached is of use
            self.release(slot.index)
            self.starts[slot.index] = start
        window = slot.ids[start:]
        self._reserve(len(window) + len(draft))
        self.cache.truncate(slot.index, len(window) - 1)
        return window[self.cache.lengths[slot.index] :] + draft

    def _batch(self, rows: list[list[int]]) -> Tensor:
        """Ids as (rows, longest row), padded on the right."""
        width, size = max(map(len, rows)), self.model.config.vocab_size
        for row in rows:
            if min(row) < 0 or max(row) >= size:
                raise no_token(next(i for i in row if not 0 <= i < size), size)
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
        weight = next(self.model.parameters())  # a norm's where all matrices are quantized
        return KVCache(self.model.config, self.slots, capacity, weight.device, weight.dtype)
