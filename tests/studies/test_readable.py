"""Figures that people read have three digits and stand under each other."""

from octavo.studies.readable import aligned, amount, scaled, size


def test_units():
    assert [size(n) for n in (12, 12_345, 3.4e9)] == ["12 bytes", "12.3 kB", "3.4 GB"]
    assert [amount(n) for n in (7, 152_587, 10**10)] == ["7", "153 k", "10 B"]
    assert [scaled(n) for n in (7, 999_600, 10**10)] == ["7 ", "1 M", "10 G"]


def test_columns_are_as_wide_as_what_is_in_them():
    rows = [("", "loss", "of {which}"), ("a", "1.25", ""), ("long", "10", "x")]
    assert aligned(rows, "<><") == ["      loss  of {which}", "a     1.25", "long    10  x"]
