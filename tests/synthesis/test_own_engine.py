"""A model folder as teacher: its texts are the engine's own, the same in every batch."""

from gtalign_jax.synthesis import own_engine
from tests.synthesis.conftest import WORDS, small
from tests.synthesis.test_candidates import check, made


def taught(folder, **synthesis):
    config = small(analyze="solver", **synthesis)
    config.buckets.prompt = (1024, 2048)
    for component in ("thinking", "response"):
        config.synthesis[component].update(teacher="engine", model=str(folder), max_tokens=48)
    return config


def test_a_folder_teaches_and_what_it_writes_does_not_depend_on_the_batch(speaker, tmp_path, monkeypatch):
    monkeypatch.setattr(own_engine, "ROWS", 8)
    found, data = made(taught(speaker, at_once=1), tmp_path / "one")
    assert len(found) == 6
    for record in found:
        check(record)
        assert record["components"]["thinking"]["model"] == str(speaker) and record["tokens"]["out"] > 0
        said = record["chain"].partition("<thinking>\n")[2].partition("\n")[0].split()
        assert said and set(said) <= set(WORDS)
    assert len({record["chain"] for record in found}) == 6
    assert made(taught(speaker, at_once=6), tmp_path / "six")[1] == data


def test_a_prompt_that_no_bucket_holds_costs_its_candidate(speaker, tmp_path):
    config = taught(speaker)
    config.buckets.prompt = (16,)
    found, data = made(config, tmp_path)
    assert not data
    assert all(
        each["rejected"].startswith("thinking prompt too long (") for r in found for each in r["candidates"]
    )
