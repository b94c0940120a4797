"""Streams: every row once an epoch, on any number of hosts; a killed run goes on to the row."""

import json
import os
import pathlib
import subprocess
import sys
import threading
import time

import pytest

from gtalign_jax.data.order import REFILL_STRIDE, Batching, Order
from gtalign_jax.data.stream import AHEAD, CHUNK, Left, Reading, Stream
from gtalign_jax.errors import UserError

COUNT, BATCH = 1000, 10


def make(numbers):
    """Every seventh row cannot be used."""
    return [Left(f"row {n}", "is odd") if n % 7 == 3 else n for n in numbers]


KEPT = [n for n in range(COUNT) if n % 7 != 3]


def width(row):
    return 8 << row % 3


ALONE = Reading()


def stream(reading=ALONE, seed=5, window=1, weights=(), counts=(COUNT,), made=make):
    return Stream(made, Order(counts, seed, weights), Batching(BATCH, width, seed, window), reading)


def on_hosts(hosts, steps, go_on=(0, {}), **of_stream):
    """[(batches, state at the end)] of hosts that read together, each on a thread of its own."""
    barrier, slots, found = threading.Barrier(hosts, timeout=60), [None] * hosts, [None] * hosts

    def run(host):
        def exchange(made):
            try:
                slots[host] = (made(), None)
            except Exception as error:  # handed to all, as `mesh.processes.on_each` does
                slots[host] = (None, error)
            barrier.wait()
            all_of_them = list(slots)
            barrier.wait()
            for _, error in all_of_them:
                if error is not None:
                    raise error
            return [value for value, _ in all_of_them]

        feed = stream(Reading(host, hosts, exchange), **of_stream)
        try:
            feed.go_on(*go_on)
            found[host] = [feed.batch(k) for k in steps], feed.state(steps.stop)
        except UserError as error:
            found[host] = error

    threads = [threading.Thread(target=run, args=(host,)) for host in range(hosts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_two_epochs_meet_every_row_once_each_on_any_number_of_hosts(hosts):
    steps = range(-(-2 * len(KEPT) // BATCH))
    found = on_hosts(hosts, steps)
    assert all(one == found[0] for one in found)
    met = [row for batch in found[0][0] for row in batch]
    epochs = met[: len(KEPT)], met[len(KEPT) : 2 * len(KEPT)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == KEPT and epochs[0] != epochs[1]
    assert found == on_hosts(1, steps) * hosts


def test_what_nothing_is_left_out_of_comes_in_the_order_of_rows_in_memory():
    feed = stream(made=list)
    assert [feed.batch(k) for k in range(5)] == [
        Order((COUNT,), 5).rows(k * 10, k * 10 + 10) for k in range(5)
    ]


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("weights", [(), (1.0, 3.0)])
def test_it_goes_on_from_a_state_on_another_number_of_hosts(window, weights):
    of_stream = {"window": window, "weights": weights, "counts": (300, 700)}
    whole = on_hosts(1, range(60), **of_stream)[0][0]
    for k in (1, 17, 40):
        state = json.loads(json.dumps(on_hosts(2, range(k), **of_stream)[0][1]))
        for batches, _ in on_hosts(4, range(k, 60), go_on=(k, state), **of_stream):
            assert batches == whole[k:]


def test_a_step_behind_and_a_state_that_nobody_kept_are_found_again():
    feed = stream(window=2)
    whole = [feed.batch(k) for k in range(40)]
    assert feed.batch(3) == whole[3] and feed.batch(39) == whole[39]
    state = feed.state(12)
    again = stream(window=2)
    again.go_on(12, state)
    assert [again.batch(k) for k in range(12, 40)] == whole[12:]
    unknown = stream(window=2)
    unknown.go_on(30, {})
    assert unknown.batch(30) == whole[30]


def damaged_behind(numbers):
    """In the third chunk of an order with seed 5 something is wrong."""
    if set(numbers) & set(Order((COUNT,), 5).rows(2 * CHUNK, 3 * CHUNK)):
        raise UserError("own/task, row 17: damaged")
    return make(numbers)


def test_worker_processes_give_the_same_rows_and_the_same_errors():
    """An error comes where its row does, and not when it was made ahead."""
    feed, alone = stream(Reading(workers=1), made=damaged_behind), stream()
    try:
        found = [feed.batch(k) for k in range(40)]
        assert found == [alone.batch(k) for k in range(40)]
        with pytest.raises(UserError, match="^own/task, row 17: damaged$"):
            [feed.batch(k) for k in range(40, 60)]
    finally:
        feed.close()


def test_little_is_read_before_the_first_step():
    """Of a large data set, as much as the first steps need; buckets are looked for in these alone."""
    asked = []

    def counted(numbers):
        asked.extend(numbers)
        return numbers

    feed = stream(counts=(10**9,), made=counted)
    widths = feed.steps_by_width(range(10**6))
    assert set(widths.values()) <= set(range(AHEAD)) and len(feed.batch(0)) == BATCH
    assert len(asked) <= 4 * CHUNK


def test_rows_that_refill_a_step_are_others_and_do_not_move_the_stream():
    feed, plain = stream(), stream()
    first = feed.batch(0)
    refills = [feed.batch(n * REFILL_STRIDE) for n in (1, 2)]
    assert all(len(rows) == BATCH and rows != first for rows in refills) and refills[0] != refills[1]
    assert all(row in KEPT for row in refills[0])
    assert stream().batch(REFILL_STRIDE) == refills[0]
    plain.batch(0)
    assert feed.batch(1) == plain.batch(1)


def test_what_is_left_out_is_said_and_counted(caplog):
    feed = stream()
    for k in range(20):
        feed.batch(k)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and all("is odd, and is left out" in line for line in said)
    assert said[1].endswith("(10 so far)")


@pytest.mark.parametrize("hosts", [1, 2])
def test_an_error_of_one_host_ends_all(hosts):
    def damaged(numbers):
        raise UserError(f"own/task, split train: cannot be read from row {numbers[0]} on")

    for error in on_hosts(hosts, range(3), made=damaged):
        assert isinstance(error, UserError) and "cannot be read" in str(error)


@pytest.mark.parametrize("kept", [0, 4])
def test_too_few_rows_for_a_batch_end_it(kept):
    def few(numbers):
        return [n if n < kept else Left("row", "is long") for n in numbers]

    with pytest.raises(UserError, match="of 1000 training rows, . can be used, and a step takes 10; give"):
        stream(made=few).batch(0)


def test_a_run_does_not_go_on_with_other_data():
    with pytest.raises(UserError, match="has 1000 rows and had 999 when the run began"):
        stream().go_on(3, {"rows": 999, "position": 30})


# --- kill -9 ---------------------------------------------------------------------------------------


def reader(folder: pathlib.Path, hosts: int) -> None:
    """A run of 24 steps: writes what it trained on, and every fourth step what a checkpoint holds."""
    saved = folder / "saved.json"
    k, state = json.loads(saved.read_text()) if saved.exists() else (0, {})
    while k < 24:
        stop = k - k % 4 + 4
        ((batches, state), *_) = on_hosts(hosts, range(k, stop), go_on=(k, state))
        for step, batch in zip(range(k, stop), batches, strict=True):
            (folder / f"step_{step}").write_text(json.dumps(batch))
            time.sleep(0.01)
        draft = folder / f"draft_{os.getpid()}"
        draft.write_text(json.dumps([stop, state]))
        draft.rename(saved)
        k = stop


def test_killed_in_mid_epoch_no_row_is_lost_or_repeated(tmp_path):
    """kill -9 to two hosts, and four go on."""
    for hosts, until in ((2, 10), (4, 23)):
        env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, __file__, str(tmp_path), str(hosts)]
        with subprocess.Popen(command, env=env) as process:
            while not (tmp_path / f"step_{until}").exists() and process.poll() is None:
                time.sleep(0.005)
            if until < 23:
                process.kill()
    assert process.returncode == 0
    met = [row for k in range(24) for row in json.loads((tmp_path / f"step_{k}").read_text())]
    alone = stream()
    assert met == [row for k in range(24) for row in alone.batch(k)] and len(set(met)) == 240


if __name__ == "__main__":
    reader(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
