"""A synthesis whose work directory is a bucket's folder ends with the bytes of a local one."""

from gtalign_jax.config import writable_directory
from gtalign_jax.synthesis.job import synthesize
from gtalign_jax.synthesis.store import records
from tests.synthesis.conftest import small


def test_a_bucket_holds_what_a_disk_does(gs, server, tmp_path):
    bucket = writable_directory(f"{gs}/chains", "workdir")
    config = small()
    config.synthesis.response.update(teacher="server", model="wise", endpoints=(server.url,))
    synthesize(config, tmp_path)
    synthesize(config, bucket)
    assert (bucket / "train.jsonl").read_bytes() == (tmp_path / "train.jsonl").read_bytes()
    assert list(records(bucket)) == list(records(tmp_path))
    assert (bucket / "tfds" / "chains" / "math" / "1.0.0" / "dataset_info.json").is_file()
    (bucket / "parts" / "00000004.jsonl").unlink()
    synthesize(config, bucket)
    assert (bucket / "train.jsonl").read_bytes() == (tmp_path / "train.jsonl").read_bytes()
