"""Reading with the cache gives the logits of reading anew, however the reading is cut."""

import pytest
import torch

from octavo.errors import ConfigError
from octavo.model.counts import cache_bytes
from octavo.model.kv_cache import KVCache
from octavo.model_config import ModelConfig, RopeScaling

ARCHITECTURES = [
    dict(position=position, n_kv_head=heads, norm_position=norm_position)
    for position in ("learned", "rope", "both", "none")
    for heads in (4, 2, 1)
    for norm_position in ("pre", "post", "sandwich")
] + [
    dict(qk_norm=True, bias=True, head_dim=6, norm="layernorm"),
    dict(rope_scaling=RopeScaling(type="yarn", factor=2.0)),
]
FEW = [ARCHITECTURES[i] for i in (0, 10, 20, 29, 36, 37)]


def named(switches):
    return "-".join(map(str, switches.values()))


@torch.no_grad()
def read(model, cache, rows):
    """Feed each slot its new ids in one ragged batch; the logits of each, without padding."""
    counts = [len(new) for new in rows.values()]
    batch = torch.zeros(len(rows), max(counts), dtype=torch.long)
    for row, new in enumerate(rows.values()):
        batch[row, : len(new)] = new
    logits = model(batch, cache=cache.view(list(rows), counts))
    return {slot: logits[row, :n] for row, (slot, n) in enumerate(zip(rows, counts, strict=True))}


@pytest.mark.parametrize("switches", ARCHITECTURES, ids=named)
def test_token_by_token_at_every_position(make_model, ids, assert_near, switches):
    model = make_model(**switches)
    wanted, cache = model(ids), KVCache(model.config, slots=3)
    logits = torch.cat(
        [model(ids[:, t : t + 1], cache=cache.view([0, 1, 2], [1, 1, 1])) for t in range(16)], dim=1
    )
    assert_near(logits, wanted)
    assert cache.lengths == [16, 16, 16]


@pytest.mark.parametrize("switches", FEW, ids=named)
@pytest.mark.parametrize("chunks", [(16,), (5, 11), (1, 6, 2, 7), (8, 8), (15, 1)])
def test_chunked_prefill(make_model, ids, assert_near, switches, chunks):
    model = make_model(**switches)
    wanted, cache = model(ids), KVCache(model.config, slots=3)
    pieces = [
        model(piece, cache=cache.view([0, 1, 2], [piece.size(1)] * 3))
        for piece in ids.split(chunks, dim=1)
    ]
    assert_near(torch.cat(pieces, dim=1), wanted)


@pytest.mark.parametrize("switches", FEW, ids=named)
def test_ragged_rows_do_not_see_each_other_or_their_padding(make_model, ids, assert_near, switches):
    """Batched generation used to differ from one by one: padding moved positions, or was seen."""
    model = make_model(**switches)
    wanted, cache = model(ids), KVCache(model.config, slots=3)
    read_so_far = [0, 0, 0]
    for lengths in [(3, 9, 6), (1, 1, 1), (4, 2, 7), (1, 4, 1), (7, 0, 1)]:
        rows = {s: ids[s, read_so_far[s] : read_so_far[s] + n] for s, n in enumerate(lengths) if n}
        for slot, logits in read(model, cache, rows).items():
            start, stop = read_so_far[slot], read_so_far[slot] + len(rows[slot])
            assert_near(logits, wanted[slot, start:stop])
            read_so_far[slot] = stop
    assert cache.lengths == read_so_far == [16, 16, 16]


@pytest.mark.parametrize("switches", FEW, ids=named)
def test_any_slots_in_any_order(make_model, ids, assert_near, switches):
    """A row is a slot, not a place in the batch: rows come, go and change places."""
    model = make_model(**switches)
    wanted, cache = model(ids), KVCache(model.config, slots=5)
    home = {4: 0, 1: 1, 2: 2}  # slot -> row of ids

    def step(plan):
        rows = {slot: ids[home[slot], cache.lengths[slot] :][:n] for slot, n in plan.items()}
        starts = {slot: cache.lengths[slot] for slot in plan}
        for slot, logits in read(model, cache, rows).items():
            assert_near(logits, wanted[home[slot], starts[slot] : cache.lengths[slot]])

    step({4: 5})
    step({2: 3, 4: 1})
    step({1: 7})
    step({4: 1, 1: 1, 2: 1})
    step({2: 6, 1: 2})
    assert cache.lengths == [0, 10, 10, 0, 7]


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_a_slot_can_be_emptied_or_cut_back_and_read_again(make_model, ids, assert_near, position):
    model = make_model(position=position)
    wanted, cache = model(ids), KVCache(model.config, slots=2)
    read(model, cache, {0: ids[0], 1: ids[2]})
    cache.truncate(0, 0)
    cache.truncate(1, 9)
    cache.truncate(1, 12)  # truncation never lengthens
    assert cache.lengths == [0, 9]
    logits = read(model, cache, {0: ids[1, :4], 1: ids[2, 9:]})
    assert_near(logits[0], wanted[1, :4])
    assert_near(logits[1], wanted[2, 9:])


def test_rope_reaches_as_far_as_the_cache(make_model, assert_near):
    model = make_model()
    ids = torch.randint(0, 17, (1, 40))
    wanted, cache = model(ids), KVCache(model.config, slots=1, capacity=40)
    pieces = [model(piece, cache=cache.view([0], [8])) for piece in ids.split(8, dim=1)]
    assert_near(torch.cat(pieces, dim=1), wanted)


def test_learned_positions_do_not(make_model):
    model = make_model(position="learned")
    cache = KVCache(model.config, slots=1, capacity=40)
    model(torch.zeros(1, 16, dtype=torch.long), cache=cache.view([0], [16]))
    with pytest.raises(ConfigError, match="17 tokens do not fit the 16 learned positions"):
        model(torch.zeros(1, 1, dtype=torch.long), cache=cache.view([0], [1]))


def test_a_full_slot_refuses_more(make_model):
    cache = KVCache(make_model().config, slots=2)
    cache.lengths[1] = 14
    cache.view([0, 1], [16, 2])
    with pytest.raises(ValueError, match="slot 1 holds 14 of 16 tokens; 3 more do not fit"):
        cache.view([0, 1], [1, 3])


@pytest.mark.parametrize("n_kv_head", [12, 4, 1])
def test_memory_is_what_the_arithmetic_says(n_kv_head):
    config = ModelConfig(
        vocab_size=50257, block_size=1024, n_layer=12, n_head=12, d_model=768, n_kv_head=n_kv_head
    )
    cache = KVCache(config, slots=3, device="meta", dtype=torch.bfloat16)
    assert cache.bytes == 3 * cache_bytes(config, bytes_a_number=2)
    assert cache.bytes == 3 * 37_748_736 * n_kv_head // 12


def test_a_half_precision_cache_costs_little_accuracy(make_model, ids, assert_near):
    model = make_model()
    cache = KVCache(model.config, slots=3, dtype=torch.bfloat16)
    first = model(ids[:, :9], cache=cache.view([0, 1, 2], [9, 9, 9]))
    rest = model(ids[:, 9:], cache=cache.view([0, 1, 2], [7, 7, 7]))
    logits = torch.cat((first, rest), dim=1)
    assert_near(logits, model(ids), tolerance=0.05)
