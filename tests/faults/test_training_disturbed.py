"""A full disk and a signal find a training run at every moment, and cost it nothing."""

import pytest
import trials

WIDE = "model.d_model=64"  # its checkpoint has several times 64 KB


@pytest.fixture(scope="module")
def found():
    """What became of each kind of trial but one, by one process that imports PyTorch once."""
    few = dict.fromkeys(("room_again", "read_only", "signals", "second_signal", "compiling"), 1)
    return trials.ask(few | {"flips": 5000 * trials.TIMES, "stops": 10 * trials.TIMES})


def test_a_disk_full_at_every_64_kb_costs_no_checkpoint():
    """Two refused saves are told of while training goes on; the third ends it with exit code 6."""
    found = trials.ask({"full_disks": 1}, WIDE)["full_disks"]
    assert (found["lost"], found["different"]) == (0, 0)
    *refused, enough = found["codes"]
    assert len(refused) >= 6
    assert set(refused) == {6}
    assert enough == 0


def test_what_a_full_disk_refused_is_written_when_there_is_room(found):
    """Losses too: a line that was not logged is a hole in every curve."""
    assert found["room_again"]["code"] == 0
    assert found["room_again"]["same"]


def test_a_read_only_run_ends_with_6_before_the_first_step(found):
    assert found["read_only"]["code"] == 6
    assert found["read_only"]["untouched"]
    assert found["read_only"]["alike"]


def test_every_flipped_bit_of_a_checkpoint_or_shard_is_found_and_its_file_named(found):
    """`torch.load` notices 5 of 300 such flips, and safetensors no more."""
    assert found["flips"]["unseen"] == []


def test_sigterm_at_any_time_saves_and_exits_75(found):
    codes = found["stops"]["codes"]
    assert set(codes) <= {"75", "0"}
    assert codes["75"] >= 5 * trials.TIMES
    assert found["stops"]["different"] == 0


@pytest.mark.parametrize(
    ("point", "saves"),
    [
        ("model.safetensors-unsynced", [3]),  # the save under way is the one; no second
        ("logged-save", [3]),
        ("validating", [3, 6, 8]),  # the best step saves itself
        ("logged-eval", [3, 6, 8]),
    ],
)
def test_sigterm_within_saving_and_validating_is_obeyed_after_it(found, point, saves):
    stopped = found["signals"][point]
    assert stopped["code"] == 75
    assert stopped["saves"] == saves
    assert stopped["alike"]


def test_sigterm_within_compiling_ends_what_has_nothing_to_lose(found):
    assert found["compiling"]["code"] == -15
    assert not found["compiling"]["there"]


def test_a_second_signal_quits_at_once_and_loses_nothing(found):
    assert found["second_signal"]["code"] == -15
    assert found["second_signal"]["alike"]
