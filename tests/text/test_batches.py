import json

import numpy as np
import pytest
from command_kit import python
from hypothesis import given
from hypothesis import strategies as st

from octavo.errors import DataError
from octavo.text.batches import Batches, Epochs, document_mask, fixed_windows
from octavo.text.shards import Tokens, write_shard

TOKENS = np.arange(1000, dtype=np.uint16)  # each token is its own position


@given(length=st.integers(2, 3000), block_size=st.integers(1, 64), seed=st.integers(0, 2**63 - 1))
def test_an_epoch_predicts_each_token_once(length, block_size, seed):
    if length < block_size + 1:
        return
    batches = Batches(np.arange(length), block_size, seed)
    for epoch in range(3):
        x, y = batches.rows(epoch * batches.windows, batches.windows)
        np.testing.assert_array_equal(np.sort(y, axis=None), np.arange(1, 1 + y.size))
        np.testing.assert_array_equal(y, x + 1)
        assert y.size == length - 1 - batches.dropped
        assert 0 <= batches.dropped < block_size


@given(data=st.data(), sampling=st.sampled_from(["epoch", "random"]))
def test_rows_are_the_same_however_they_are_asked_for(data, sampling):
    """By one process or four, in large batches or small, before a restart or after."""
    batches = Batches(TOKENS, 7, seed=3, sampling=sampling)
    first, count = data.draw(st.integers(0, 2000)), data.draw(st.integers(1, 300))
    cut = data.draw(st.integers(0, count))
    whole = batches.rows(first, count)
    parts = batches.rows(first, cut), batches.rows(first + cut, count - cut)
    for i in range(2):
        np.testing.assert_array_equal(whole[i], np.concatenate([part[i] for part in parts]))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [
        tuple(Batches(TOKENS, 10, seed).starts(epoch * 99, 99))
        for seed in (0, 1, 2**62)
        for epoch in (0, 1, 10**9)
    ]
    assert len(set(orders)) == 9
    assert all(sorted(order) == list(range(0, 990, 10)) for order in orders)


def test_the_order_is_the_same_on_every_machine_and_in_every_version():
    """Golden values: a run of last year goes on with the rows it would have had."""
    epoch = Batches(TOKENS, 10, seed=1337).starts(95, 8)
    assert epoch.tolist() == [610, 960, 430, 150, 920, 740, 280, 120]
    drawn = Batches(TOKENS, 10, seed=1337, sampling="random").starts(10**12, 8)
    assert drawn.tolist() == [309, 513, 528, 221, 845, 386, 966, 182]


def test_windows_are_shuffled_evenly():
    """Every window comes first about equally often; chi-squared with 12 degrees of freedom."""
    firsts = [Batches(TOKENS[:131], 10, seed).starts(0, 1)[0] // 10 for seed in range(2600)]
    counts = np.bincount(firsts, minlength=13)
    assert ((counts - 200) ** 2 / 200).sum() < 32.9  # p = 0.001


def test_neighbours_are_not_kept_together():
    starts = Batches(np.arange(100_001), 10, seed=5).starts(0, 10_000)
    assert (np.diff(starts) == 10).mean() < 0.001
    assert abs(np.corrcoef(starts[:-1], starts[1:])[0, 1]) < 0.03


def test_random_starts_reach_both_ends():
    starts = Batches(TOKENS[:20], 8, seed=0, sampling="random").starts(0, 2000)
    counts = np.bincount(starts, minlength=12)
    assert len(counts) == 12  # 20 - 8 places, so that the last target is the last token
    assert counts.min() > 110
    assert counts.max() < 230


def test_the_last_tokens_of_a_text_are_not_lost_to_an_error():
    batches = Batches(TOKENS[:9], 4, seed=0)
    assert (len(batches), batches.windows, batches.dropped) == (2, 2, 0)
    assert Batches(TOKENS[:8], 4, seed=0).dropped == 3
    assert Batches(TOKENS[:5], 4, seed=0).rows(0, 3)[1].tolist() == [[1, 2, 3, 4]] * 3


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.uint32, np.int64])
def test_any_integers_and_memory_maps_give_int64(dtype, tmp_path):
    tokens = np.memmap(tmp_path / "tokens.bin", dtype=dtype, mode="w+", shape=100)
    tokens[:] = np.arange(100)
    x, y = Batches(tokens, 9, seed=1).rows(0, 5)
    expected = Batches(np.arange(100), 9, seed=1).rows(0, 5)
    for ours, theirs in zip((x, y), expected, strict=True):
        assert type(ours) is np.ndarray
        assert ours.dtype == np.int64
        assert ours.flags.c_contiguous
        np.testing.assert_array_equal(ours, theirs)


def test_fixed_windows_are_nanogpts_validation_windows():
    tokens = np.arange(111_540)  # Tiny Shakespeare's last tenth
    x, y = fixed_windows(tokens, 64, 384)
    expected = np.floor(np.linspace(0, 111_540 - 66, 384)).astype(int)
    np.testing.assert_array_equal(x[:, 0], expected)
    np.testing.assert_array_equal(y, x + 1)
    assert x.shape == (384, 64)
    assert x.dtype == y.dtype == np.int64


@given(length=st.integers(2, 60), block_size=st.integers(1, 20), count=st.integers(1, 50))
def test_fixed_windows_of_a_short_text_are_distinct_and_inside(length, block_size, count):
    if length < block_size + 1:
        return
    x, y = fixed_windows(np.arange(length), block_size, count)
    assert len(np.unique(x[:, 0])) == len(x) <= count
    assert len(x) == min(count, max(1, length - block_size - 1))
    assert y.max() < length


@pytest.mark.parametrize(
    "make", [lambda t, n: Batches(t, n, 0), lambda t, n: fixed_windows(t, n, 9)]
)
def test_a_text_shorter_than_the_context_names_both_numbers(make):
    with pytest.raises(DataError, match=r"65 tokens, the text has 64.*block_size"):
        make(TOKENS[:64], 64)
    make(TOKENS[:65], 64)
    with pytest.raises(DataError, match="integers, not float64"):
        make(np.zeros(100), 4)
    with pytest.raises(DataError, match=r"shape \(10, 10\)"):
        make(np.zeros((10, 10), dtype=np.int64), 4)


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    block_size=st.integers(1, 16),
    sampling=st.sampled_from(["epoch", "random"]),
)
def test_rows_cross_the_borders_of_shards(sizes, block_size, sampling):
    """A batch over shards is the batch over one long row: nothing is lost or doubled at a border.

    build-nanogpt drops what is left of a shard, and starts the next one at its beginning.
    """
    whole = np.arange(sum(sizes), dtype=np.uint16)
    if len(whole) < block_size + 1:
        return
    tokens = Tokens(np.split(whole, np.cumsum(sizes)[:-1]))
    ours, theirs = (Batches(t, block_size, 3, sampling) for t in (tokens, whole))
    assert len(ours) == len(theirs)
    got, expected = ours.rows(0, 2 * len(ours)), theirs.rows(0, 2 * len(ours))
    np.testing.assert_array_equal(got, expected)
    if sampling == "epoch":
        targets = np.sort(got[1][: len(ours)], axis=None)
        np.testing.assert_array_equal(targets, np.arange(1, len(whole) - ours.dropped))
    for x, y in zip(
        fixed_windows(tokens, block_size, 9), fixed_windows(whole, block_size, 9), strict=True
    ):
        np.testing.assert_array_equal(x, y)


def test_a_pass_is_an_epoch():
    batches = Batches(TOKENS, 10, seed=0)  # 99 windows
    sizes = (1, 33, 50, 99, 100)
    assert [len(Epochs(batches, size)) for size in sizes] == [99, 3, 2, 1, 1]
    epochs = Epochs(batches, 20)
    for epoch in range(3):
        passed = [*epochs]
        assert [len(x) for x, _ in passed] == [20, 20, 20, 20, 19]
        expected = batches.rows(epoch * 99, 99)
        np.testing.assert_array_equal(np.concatenate([x for x, _ in passed]), expected[0])
        np.testing.assert_array_equal(np.concatenate([y for _, y in passed]), expected[1])


@given(st.integers(0, 12), st.integers(1, 30))
def test_a_pass_goes_on_where_it_was_saved(steps, batch_size):
    """In the middle of an epoch, through JSON, in another process: the state is one integer."""
    batches = Batches(TOKENS, 10, seed=0)

    def passes(epochs):
        while True:
            yield from epochs

    first = Epochs(batches, batch_size)
    running = passes(first)
    for _ in range(steps):
        next(running)
    state = json.loads(json.dumps(first.state_dict()))
    other = Epochs(Batches(TOKENS, 10, seed=0), batch_size)
    other.load_state_dict(state)
    for ours, theirs, _ in zip(passes(other), running, range(8), strict=False):
        np.testing.assert_array_equal(ours, theirs)
    assert Epochs(batches, batch_size, row=state["row"]).state_dict() == state


ENDLESS = """
import sys, tracemalloc
from octavo.text.batches import Batches
from octavo.text.shards import Dataset

def anonymous():
    try:
        with open("/proc/self/status", encoding="utf-8") as status:
            return next(int(line.split()[1]) * 1024 for line in status if "RssAnon" in line)
    except OSError:  # not Linux: what Python and numpy have allocated
        return tracemalloc.get_traced_memory()[0]

if sys.platform != "linux":
    tracemalloc.start()
batches = Batches(Dataset.open(sys.argv[1:]).tokens("train"), 64, seed=0)
batches.rows(0, 8)
before = anonymous()
total = sum(int(batches.rows(step * 8, 8)[0].sum()) for step in range(10_000))
print(anonymous() - before, total)
"""


def test_memory_stays_flat_over_ten_thousand_batches(tmp_path):
    """Pages of the files are the kernel's to drop; copies would be the process's own (RssAnon).

    nanoGPT's grew without end (its issue 287) until it mapped the file anew for each batch.
    """
    paths = [tmp_path / f"{n}.npy" for n in range(2)]
    for path in paths:
        write_shard(path, np.ones(8_000_000, np.uint16))
    grown, total = map(int, python(ENDLESS, *paths).stdout.split())
    assert total == 10_000 * 8 * 64
    assert grown < 4_000_000


def test_documents_do_not_see_each_other():
    """By the rule itself: a key is looked at if it is no later and no end lies between."""
    x = np.random.default_rng(0).integers(0, 4, (5, 30))
    x[0], x[1] = 0, 1  # nothing but ends, and none
    mask = document_mask(x, eot_id=0)
    assert mask.shape == (5, 1, 30, 30)
    assert mask.dtype == bool
    for row in range(5):
        for query in range(30):
            for key in range(30):
                sees = key <= query and not (x[row, key:query] == 0).any()
                assert mask[row, 0, query, key] == sees


def test_the_first_token_of_a_document_is_not_predicted_from_another():
    tokens = np.array([5, 6, 0, 7, 0, 8, 9, 0, 5])
    x, y = Batches(tokens, 8, seed=0, eot_id=0).rows(0, 1)
    assert x.tolist() == [[5, 6, 0, 7, 0, 8, 9, 0]]
    assert y.tolist() == [[6, 0, -100, 0, -100, 9, 0, -100]]
    windows = fixed_windows(tokens, 8, 1, eot_id=0)
    np.testing.assert_array_equal(windows, (x, y))
