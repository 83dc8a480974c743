"""The native engine: writes on the CPU without PyTorch, its token loop compiled (native.cpp).

The weights stay where they lie, in a memory-mapped file: fp32 as a checkpoint has them, or packed.
How far logits may be from those of the PyTorch model with the same (dequantized) weights, as a
share of the largest logit:

- fp32 with an fp32 cache: 1e-4. Only the order of sums differs.
- fp16 cache, which packed weights have: 2^-9 a layer. Keys are rounded by 2^-12 of themselves,
  and that is multiplied by the size of a score, about 8 at most.
- int8: no more. What goes into a matrix is rounded by 2^-16 of the token's largest number.
- int4: 8/127 a layer. What goes into four matrices, one after the other, is rounded by half a step
  of 1/127 of a group's largest number, which is about four times a usual one.

These are for layers that pass a difference on as large as it came, to first order; layers that
amplify, such as attention with scores in the hundreds, amplify this too.

What a row gets is the same to the last bit alone, in a batch, in chunks of any size and with any
draft. OCTAVO_THREADS sets the threads, OCTAVO_ISA one instruction set: avx512vnni, avx512, avx2,
neon or scalar.
"""

import ctypes
import math
import os
import threading
import weakref
from array import array
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from octavo.checkpoint import MODEL, Run
from octavo.errors import CheckpointError, ConfigError, ResourceError
from octavo.generating import native_structures as c
from octavo.generating.choosing import tell_once
from octavo.generating.native_build import NoLibraryError, load_library
from octavo.generating.sampling import not_finite
from octavo.generating.writing import Slot, no_token
from octavo.manifest import naming_a_way_out
from octavo.model.counts import tensor_shapes
from octavo.model.rope import Floats, rope_frequencies
from octavo.model_config import Count, ModelConfig
from octavo.packed import Storage, Stored, open_packed
from octavo.settings import convert

SLICE = 0.025  # seconds after which a step returns with what it has
CHUNK = 128  # tokens that go through the model at once
THREAD_BYTES = 4 << 20  # of weights that are worth a thread: with less it waits more than it works
LONGEST_STEP = 1024  # tokens a slot in one step, more than a slice of time can hold


class NativeModel:
    """A model's weights as the engine reads them; many engines can share one."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Stored]) -> None:
        """Take tensors by the names of ``GPT.state_dict``, tied ones under both names.

        Raises `NoLibraryError` for a part that native.cpp has not, and `CheckpointError` where
        names or shapes are not those of ``config``.
        """
        self.config, self.tensors = config, tensors
        self.tables = rope_table(config) if config.uses_rope else ()
        self.blocks = (c.Block * config.n_layer)()
        self.struct = self._empty()
        _check_shapes(config, tensors)
        for name, stored in tensors.items():
            self._place(name, stored)

    @property
    def bytes(self) -> int:
        """What the tensors take, tied ones once: about what a token has to read."""
        arrays = [array for t in self.tensors.values() for array in (t.values, t.scale)]
        return sum({a.ctypes.data: a.nbytes for a in arrays if a is not None}.values())

    @property
    def packed(self) -> bool:
        """Whether any tensor is kept in less than fp32."""
        return any(tensor.storage.kind != "fp32" for tensor in self.tensors.values())

    def _empty(self) -> c.Model:
        """The model's structure, which points at no tensor yet."""
        config = self.config
        struct = c.Model(**{n: getattr(config, n) for n in (*c.SIZES, "gated", "norm_eps")})
        struct.norm = _number(c.NORM_KINDS, config.norm)
        struct.norm_position = _number(c.NORM_POSITIONS, config.norm_position)
        struct.activation = _number(c.ACTIVATIONS, c.GATES.get(config.mlp, config.mlp))
        if self.tables:
            struct.cos, struct.sin = (table.ctypes.data for table in self.tables)
        struct.blocks = ctypes.addressof(self.blocks)
        return struct

    def _place(self, name: str, stored: Stored) -> None:
        """Let the structures point at the tensor ``name``."""
        *path, part, which = name.split(".")
        owner = self.blocks[int(path[1])] if path else self.struct
        if len(stored.shape) == 1:
            setattr(getattr(owner, part), which, stored.values.ctypes.data)
        elif path:
            getattr(owner, part).weight = _matrix(stored)
        else:
            setattr(owner, part, _matrix(stored))


def open_model(run: Run, checkpoint: Path, precision: str | None = None) -> NativeModel:
    """A checkpoint's weights, or the run's weights packed to ``precision``; every byte is verified.

    Errors as in `Run.load` and `open_packed`.
    """
    opened = run.load(checkpoint)
    if precision is None:
        tensors = {name: as_stored(values) for name, values in opened.model_arrays().items()}
    else:
        packed = open_packed(run.path, precision, opened.manifest.files[MODEL]["sha256"])
        tied = {name: packed.tensors[owner] for name, owner in packed.tied.items()}
        tensors = packed.tensors | tied
    with naming_a_way_out(checkpoint):
        return NativeModel(run.config.model, tensors)


def as_stored(values: np.ndarray) -> Stored:
    """An array as an fp32 tensor: itself, or a copy where it is of another type."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    return Stored(Storage("fp32"), values.shape, values, None)


class NativeEngine:
    """Writes with a `NativeModel`; cf. `octavo.generating.writing.Engine`."""

    def __init__(
        self,
        model: NativeModel,
        slots: int = 1,
        vocab: int | None = None,
        threads: int | None = None,
        chunk: int = CHUNK,
    ) -> None:
        """Prepare to write up to ``slots`` rows at once; their caches grow with what they hold.

        Ids from ``vocab`` on are padding and never drawn. ``threads`` defaults to OCTAVO_THREADS,
        else the cores there are. Caches hold fp16 for packed weights and fp32 for fp32. A pass
        reads at most ``chunk`` tokens. Raises `ConfigError` for an instruction set that is not
        here and `NoLibraryError` where nothing can be compiled.
        """
        self.model, self.slots = model, slots
        self.vocab = vocab or model.config.vocab_size
        self.budget = available_memory()
        self._cancelled = ctypes.c_int32()
        settings = c.Settings(
            slots=slots,
            vocab=self.vocab,
            threads=choose_threads(threads, model.bytes),
            cache_storage=c.STORAGE.index("fp16" if model.packed else "fp32"),
            chunk=chunk,
            cache_budget=self.budget,
            cancel=ctypes.addressof(self._cancelled),
        )
        self._lock = threading.Lock()
        self._library = c.declare(load_library())
        reason, isa = ctypes.c_char_p(), os.environ.get("OCTAVO_ISA", "")
        self._engine = self._library.octavo_open(
            ctypes.byref(model.struct), ctypes.byref(settings), isa.encode(), ctypes.byref(reason)
        )
        if not self._engine:
            why = (reason.value or b"").decode()
            raise ConfigError(f"OCTAVO_ISA={isa}: {why}", fix="leave it out: the best is taken")
        weakref.finalize(self, self._library.octavo_close, self._engine)

    def step(self, slots: list[Slot], most: int = 1) -> list[list[int]]:
        """Draw the next ids of each slot; see `Engine.step`.

        Raises `ConfigError` for ids outside the vocabulary, `NonFiniteError` for logits that are
        not finite, `ResourceError` where the cache would not fit into memory, `InterruptedError`
        when cancelled before every slot had a token.
        """
        most = min(most, LONGEST_STEP)
        requests = (c.Request * len(slots))()
        rooms = [self._request(*pair, most) for pair in zip(requests, slots, strict=True)]
        with self._lock:
            result = c.UNFINISHED
            while result == c.UNFINISHED:  # back in Python for a moment, where Ctrl-C is heard
                result = self._library.octavo_step(self._engine, requests, len(slots), most, SLICE)
            if result != c.CANCELLED or not all(request.made for request in requests):
                self._check(result)
            self._cancelled.value = 0
        for slot, request, room in zip(slots, requests, rooms, strict=True):
            slot.top = room.top(request.made, request.logprobs + 1)
            slot.logits = [] if room.logits is None else list(room.logits[: request.made])
        return [room.out[: r.made].tolist() for r, room in zip(requests, rooms, strict=True)]

    def release(self, index: int) -> None:
        """Forget what the cache holds for this slot."""
        with self._lock:
            self._library.octavo_release(self._engine, index)

    def share(self, source: int, target: int, count: int) -> None:
        """Let slot ``target`` hold the first ``count`` ids that ``source`` holds; reads nothing.

        Raises `ResourceError` where they would not fit into memory.
        """
        with self._lock:
            self._check(self._library.octavo_share(self._engine, source, target, count))

    def cancel(self) -> None:
        """From another thread: end the step in progress, or the next, before its next layer."""
        self._cancelled.value = 1

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits (T, V) after each of ``ids`` (T,), T up to block_size; padded ids have theirs."""
        assert 0 < len(ids) <= self.model.config.block_size
        logits = np.empty((len(ids), self.model.config.vocab_size), np.float32)
        with self._lock:
            given, out = self._ids(ids), logits.ctypes.data
            self._check(self._library.octavo_logits(self._engine, *given.buffer_info(), out))
        return logits

    def _request(self, request: c.Request, slot: Slot, most: int) -> "_Room":
        """Fill in what the library is asked for this slot; the room must outlive the call."""
        for name in ("index", "prompt_length", "n", "left"):
            setattr(request, name, getattr(slot, name))
        request.eot = -1 if slot.eot is None else slot.eot
        request.logprobs = min(slot.logprobs, self.vocab)
        for name in c.SAMPLING:
            setattr(request.sampling, name, getattr(slot.sampling, name))
        room = _Room(self._ids(slot.ids), self._ids(slot.draft), most, request.logprobs + 1)
        request.ids, request.count = room.ids.buffer_info()
        request.draft, request.draft_count = room.draft.buffer_info()
        for name in ("out", "top_counts", "top_ids", "top_logprobs"):
            setattr(request, name, getattr(room, name).ctypes.data)
        if slot.keep_logits:
            room.logits = np.empty((most, self.vocab), np.float32)
            request.logits = room.logits.ctypes.data
        return room

    def _ids(self, ids: Sequence[int]) -> "array[int]":
        try:
            return array("i", ids)
        except OverflowError:
            raise no_token(max(ids, key=abs), self.model.config.vocab_size) from None

    def _check(self, result: int) -> None:
        """Turn what the library says into an error."""
        if result == c.DONE:
            return
        self._cancelled.value = 0
        if result == c.CANCELLED:
            raise InterruptedError("the step was cancelled")
        detail = self._library.octavo_detail(self._engine)
        if result == c.BAD_ID:
            raise no_token(detail, self.model.config.vocab_size)
        if result == c.NOT_FINITE:
            raise not_finite()
        raise ResourceError(
            f"the keys and values of these texts need {detail / 1e6:,.0f} MB, "
            f"{self.budget / 1e6:,.0f} MB are free",
            fix="write fewer or shorter texts at once",
        )


class _Room:
    """What the library reads and writes for one slot in one step."""

    def __init__(self, ids: "array[int]", draft: "array[int]", most: int, pairs: int) -> None:
        self.ids, self.draft = ids, draft
        self.out, self.top_counts = np.zeros(most, np.int32), np.zeros(most, np.int32)
        self.top_ids = np.zeros((most, pairs), np.int32)
        self.top_logprobs = np.zeros((most, pairs))
        self.logits: np.ndarray | None = None  # (most, V), where they are wanted

    def top(self, made: int, pairs: int) -> list[list[tuple[int, float]]]:
        """`Slot.top` of the ids made."""
        if pairs == 1:
            return [[] for _ in range(made)]
        rows = zip(self.top_ids.tolist(), self.top_logprobs.tolist(), self.top_counts, strict=True)
        return [list(zip(ids[:n], logs[:n], strict=True)) for ids, logs, n in [*rows][:made]]


def rope_table(config: ModelConfig) -> tuple[Floats, Floats]:
    """Cosines and sines of every position, each (block_size, E/2); cf. `octavo.model.layers`."""
    frequencies, factor = rope_frequencies(config)
    angles = np.arange(config.block_size, dtype=np.float32)[:, None] * frequencies
    return np.cos(angles) * np.float32(factor), np.sin(angles) * np.float32(factor)


def _number(known: Sequence[str], name: str) -> int:
    if name not in known:
        raise NoLibraryError(f"it has no {name}, only {', '.join(known)}")
    return known.index(name)


def _matrix(stored: Stored) -> c.Matrix:
    scales = None if stored.scale is None else stored.scale.ctypes.data
    kind, group = stored.storage
    return c.Matrix(c.STORAGE.index(kind), group, *stored.shape, stored.values.ctypes.data, scales)


def _check_shapes(config: ModelConfig, tensors: Mapping[str, Stored]) -> None:
    wanted = tensor_shapes(config)
    for name in sorted(wanted.keys() ^ tensors.keys()):
        raise CheckpointError(
            f"{name} is {'missing from' if name in wanted else 'left over in'} it"
        )
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name]:
            raise CheckpointError(f"{name} has shape {tensor.shape}, not {wanted[name]}")


def choose_threads(asked: int | None, size: int) -> int:
    """As many as asked, here or by OCTAVO_THREADS; else one a core that ``size`` bytes of weights
    keep busy.
    """
    cores, named = usable_cores(), os.environ.get("OCTAVO_THREADS")
    if named and not asked:
        asked = convert(named, Count, "OCTAVO_THREADS")
    if asked and asked > cores:
        tell_once(f"warning: {asked} threads on {cores} cores wait for each other")
    return asked or max(1, min(cores, size // THREAD_BYTES))


def usable_cores() -> int:
    """Cores this process may use, counting those that share one unit of execution once."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cpus, cores = os.sched_getaffinity(0), set()
    for cpu in cpus:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        with suppress(OSError):
            cores.add(siblings.read_text(encoding="ascii"))
    allowed = math.inf
    with suppress(OSError, ValueError):  # a container's share of time
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        allowed = math.ceil(int(quota) / int(period))
    return max(1, min(len(cores) or len(cpus), allowed))


def available_memory() -> int:
    """Bytes that can be had: the system's, or what a container's limit leaves."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) << 10
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit, used = (
            int((group / f"memory.{name}").read_text(encoding="ascii"))
            for name in ("max", "current")
        )
        free = min(free, max(0, limit - used))
    return free
