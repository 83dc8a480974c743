"""One token a slot in shapes that never change, so that a GPU can record the step and replay it.

A small model's step is hundreds of short kernels, and starting them one by one takes longer than
they do. A CUDA graph starts all of them at once, if every tensor stays where it was: so all slots
take part in every step, the cache has its whole capacity, and a mask hides what is not there yet.
"""

import importlib
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from octavo.errors import first_line
from octavo.model.attention import Attend, sdpa
from octavo.model.gpt import GPT
from octavo.model.kv_cache import CacheView, KVCache

Step = Callable[[], Tensor]
Record = Callable[[Step], Step]
"""Turns a step that reads and writes the same tensors every time into a faster one."""


class StaticView(CacheView):
    """All slots of a cache as a batch about to read one token each, at ``positions`` (S, 1)."""

    def __init__(self, cache: KVCache) -> None:
        slots, device = cache.keys.size(1), cache.keys.device
        self.cache, self.end = cache, cache.capacity
        self.positions = torch.zeros((slots, 1), dtype=torch.long, device=device)
        self.rows = torch.arange(slots, device=device)
        self.indices = torch.arange(cache.capacity, device=device)

    def mask(self) -> Tensor:
        """Which keys each query may see, (S, 1, 1, capacity)."""
        return (self.indices <= self.positions[:, :, None])[:, None]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values (S, K, 1, E); return all there is room for."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.rows, :, self.positions[:, 0]] = k[:, :, 0].to(keys.dtype)
        values[self.rows, :, self.positions[:, 0]] = v[:, :, 0].to(values.dtype)
        return keys.to(k.dtype), values.to(v.dtype)

    def commit(self) -> None:
        """Lengths are counted where they are known, outside what is recorded."""


class StaticStep:
    """Reads one token of some slots; recorded at its first call."""

    def __init__(self, model: GPT, cache: KVCache, record: Record) -> None:
        self.model, self.cache, self.record = model, cache, record
        self.view = StaticView(cache)
        self.ids = torch.zeros_like(self.view.positions)
        self.recorded: Step | None = None

    def read(self, slots: list[int], tokens: Tensor) -> Tensor:
        """The states (R, D) after one more token, ``tokens`` (R, 1), of each of R ``slots``.

        The others read one beyond their end, where their next token will overwrite it.
        """
        lengths, last = self.cache.lengths, self.cache.capacity - 1
        rows = torch.tensor(slots, device=tokens.device)
        self.ids[rows] = tokens
        self.view.positions.copy_(torch.tensor([[min(length, last)] for length in lengths]))
        if self.recorded is None:
            self.recorded = _or_plain(self.record, self._step)
        states = self.recorded()[rows]
        for slot in slots:
            lengths[slot] += 1
        return states

    def _step(self) -> Tensor:
        return self.model.hidden(self.ids, self.view)[:, 0]


def cuda_graph(step: Step) -> Step:
    """Record the kernels of ``step``; what is returned replays them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # libraries prepare themselves in their first calls
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        states = step()

    def replay() -> Tensor:
        graph.replay()
        return states

    return replay


def _or_plain(record: Record, step: Step) -> Step:
    try:
        recorded = record(step)
        recorded()
    except Exception as error:  # recorders and compilers fail in many ways; the step works without
        _say(f"the step cannot be recorded ({first_line(error)}); going on without it")
        return step
    return recorded


def flash_attention() -> Attend:
    """The flash-attn package's kernel where it is installed and fits, PyTorch's where not.

    It takes half precision and no mask. After a call that fails it is left alone.
    """
    try:
        kernel = [importlib.import_module("flash_attn").flash_attn_func]
    except ImportError:
        return sdpa

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        if kernel and mask is None and q.dtype in (torch.float16, torch.bfloat16):
            turned = (part.transpose(1, 2) for part in (q, k, v))  # (B, T, H, E)
            try:
                return kernel[0](*turned, dropout_p=dropout, causal=q.size(2) > 1).transpose(1, 2)
            except RuntimeError as error:
                _say(f"flash-attn does not work here ({first_line(error)}); PyTorch's attention")
                kernel.clear()
        return sdpa(q, k, v, mask, dropout)

    return attend


def _say(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)
