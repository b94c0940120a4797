"""The cache of judge answers: text in, text out, whoever else writes in its folder."""

import concurrent.futures
import multiprocessing
import pathlib
import pickle
import sqlite3

import pytest

from gtalign_jax.errors import UserError
from gtalign_jax.rewards.judges.cache import FILE, TextCache

REPO = pathlib.Path(__file__).resolve().parents[3]


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (pathlib.Path.touch, (self.path,))


def plant_diskcache(folder, key, planted):
    """A folder as diskcache 5 keeps it, with one entry in its pickle mode and one in a file."""
    (folder / "00").mkdir(parents=True)
    (folder / "00" / "entry.val").write_bytes(planted)
    file = sqlite3.connect(folder / "cache.db")
    file.execute("CREATE TABLE Settings (key TEXT NOT NULL UNIQUE, value)")
    file.execute("INSERT INTO Settings VALUES ('disk_pickle_protocol', 5)")
    file.execute(
        "CREATE TABLE Cache (rowid INTEGER PRIMARY KEY, key BLOB, raw INTEGER, store_time REAL,"
        " expire_time REAL, access_time REAL, access_count INTEGER, tag BLOB, size INTEGER, mode INTEGER,"
        " filename TEXT, value BLOB)"
    )
    row = "INSERT INTO Cache VALUES (?, ?, 1, 0, NULL, 0, 0, NULL, 0, 4, ?, ?)"
    file.execute(row, (1, key, None, planted))
    file.execute(row, (2, key + "2", "00/entry.val", None))
    file.commit()
    file.close()


def test_a_planted_pickle_runs_nothing(tmp_path):
    """In a diskcache folder, as the whole file, and as an entry of ours."""
    touched, key = tmp_path / "touched", "k"
    planted = pickle.dumps(Trap(touched))
    folder = tmp_path / "cache"
    plant_diskcache(folder, key, planted)
    cache = TextCache(str(folder))
    assert cache.get(key) is None and cache.get(key + "2") is None
    cache.put("good", "text")
    with sqlite3.connect(folder / FILE) as file:
        file.execute("INSERT INTO verdict (key, text) VALUES (?, ?)", (key, planted))
    file.close()
    assert cache.get(key) is None and cache.get("good") == "text"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / FILE).write_bytes(planted * 50)
    with pytest.raises(UserError, match="not a database"):
        TextCache(str(tmp_path / "other"))
    assert not touched.exists()
    pickle.loads(planted)
    assert touched.exists()  # it is a trap


def test_nothing_in_the_product_unpickles_a_file():
    """What processes of one run send to each other is the one thing that is unpickled: hosts, and those that
    read ahead."""
    found = set()
    for path in (REPO / "gtalign_jax").rglob("*.py"):
        code = path.read_text()
        if any(f"import {name}" in code for name in ("pickle", "marshal", "shelve", "dill", "joblib")):
            found.add(path.relative_to(REPO).as_posix())
        assert "allow_pickle=True" not in code and "torch.load" not in code, path
    assert found == {"gtalign_jax/mesh/processes.py", "gtalign_jax/data/stream.py"}


def test_a_damaged_file_is_one_line_that_names_it(tmp_path):
    TextCache(str(tmp_path)).put("a", "text")
    (tmp_path / FILE).write_bytes(b"damaged" * 1000)
    for left in tmp_path.glob(FILE + "-*"):
        left.unlink()
    with pytest.raises(UserError, match=f"cache_dir={tmp_path}: unusable .*remove {FILE}") as error:
        TextCache(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_file_with_another_table_is_refused(tmp_path):
    with sqlite3.connect(tmp_path / FILE) as file:
        file.execute("CREATE TABLE verdict (x)")
    file.close()
    with pytest.raises(UserError, match="unusable .no such column"):
        TextCache(str(tmp_path))


def test_texts_come_back_and_only_their_end_is_kept(tmp_path):
    cache = TextCache(str(tmp_path))
    cache.put("long", "x" * 9000 + "end")
    cache.put("odd", "a\ud800b\0c")
    cache.put("long", "y" * 9000 + "end")
    again = TextCache(str(tmp_path))
    assert again.get("long") == "y" * 3997 + "end"
    assert again.get("odd") == "a?b\0c"
    assert again.get("none") is None and again.errors == 0


def test_the_oldest_entries_go(tmp_path):
    cache = TextCache(str(tmp_path), limit=2**20)
    for i in range(2048):
        cache.put(str(i), f"{i} " + "x" * 1000)
    assert cache.get("0") is None and cache.get("2047").startswith("2047 ") and cache.errors == 0
    assert (tmp_path / FILE).stat().st_size < 4 * 2**20


def write_and_read(folder, worker):
    cache = TextCache(folder)

    def one(i):
        cache.put(f"{worker}-{i}", f"text {i}")
        cache.put("shared", "same")
        return cache.get(f"{worker}-{i}") == f"text {i}" and cache.get("shared") == "same"

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return all(pool.map(one, range(100))) and not cache.errors


def open_each(folders):
    return [TextCache(folder).errors for folder in folders]


def test_processes_that_open_a_new_folder_at_once_wait_for_each_other(tmp_path):
    folders = [str(tmp_path / str(n)) for n in range(30)]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(4, mp_context=context) as pool:
        assert list(pool.map(open_each, [folders] * 4)) == [[0] * 30] * 4


def test_processes_and_threads_share_a_folder(tmp_path):
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(3, mp_context=context) as pool:
        done = list(pool.map(write_and_read, [str(tmp_path / "new")] * 3, range(3)))
    assert done == [True] * 3
    assert TextCache(str(tmp_path / "new")).get("2-99") == "text 99"
