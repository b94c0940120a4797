"""Sums and peaks from many threads."""

import concurrent.futures
import threading

from gtalign_jax.remote.counters import Counters


def test_sums_and_peaks_are_plain_numbers_by_name():
    counters = Counters()
    assert counters.numbers() == {}
    counters.add("b")
    counters.add("a", 2)
    for value in (3, 7, 5):
        counters.peak("most", value)
    numbers = counters.numbers()
    assert list(numbers.items()) == [("a", 2.0), ("b", 1.0), ("most", 7.0)]
    assert all(type(value) is float for value in numbers.values())


def test_how_many_are_within_together_counts_all_threads():
    counters, barrier = Counters(), threading.Barrier(4)

    def enter():
        with counters.at_once("together"):
            barrier.wait(10)
        with counters.at_once("alone"):
            counters.add("entered")

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(enter) for _ in range(4)]:
            done.result()
    assert counters.numbers()["together"] == 4 == counters.numbers()["entered"]
    with counters.at_once("together"):
        assert counters.numbers()["together"] == 4
