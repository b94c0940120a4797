"""What a key or a password in a config comes to: it is sent, and shown to nobody."""

import pytest

from gtalign_jax.errors import UserError
from gtalign_jax.remote.client import NO_KEY, api_key, check_urls, redacted, redacted_url, redacted_value
from gtalign_jax.rewards.judges.http import HttpJudgeConfig
from gtalign_jax.rollout.servers import ServerConfig

SECRET = "hunter2"
WITH_SECRETS = [
    f"http://user:{SECRET}@host:8000/v1",
    f"http://{SECRET}@host/v1",
    f"https://host/v1?api_key={SECRET}",
    f"https://host/v1#{SECRET}",
    f"http://user:{SECRET}/x@host/v1",
    f"ftp://user:{SECRET}@host",
    f"user:{SECRET}@host:8000",
    f"http://user:{SECRET}@",
    f"http://us er:{SECRET}@host",
    f"http://a@b:{SECRET}@host\n",
]


@pytest.mark.parametrize("url", WITH_SECRETS)
@pytest.mark.parametrize("config", [HttpJudgeConfig, ServerConfig])
def test_credentials_in_a_url_are_refused_and_not_repeated(config, url):
    with pytest.raises(ValueError, match=r"^endpoints: ") as error:
        config(endpoints=(url,))
    assert SECRET not in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="must be a list of URLs") as error:
        config(endpoints=url)
    assert SECRET not in str(error.value)


def test_the_refusal_names_the_field_for_a_key():
    with pytest.raises(
        ValueError, match=r"'http://\*\*\*@host/v1' holds more than host and path.*api_key_env"
    ):
        check_urls(["http://user:pass@host/v1"], "endpoints", "http://host")


def test_urls_without_credentials_are_as_they_were():
    urls = ["http://host:8000/v1", "https://host/a/@b/v1", "http://[::1]:8000"]
    check_urls(urls, "endpoints", "http://host")
    assert redacted_url(urls[0]) == urls[0] and redacted_url(urls[2]) == urls[2]


def test_recorded_urls_are_shown_without_credentials():
    value = ["http://user:pass@host/v1", "a@b", 3, ("https://host/v1?key=x",)]
    assert redacted_value(value) == ["http://***@host/v1", "a@b", 3, ["https://host/v1?***"]]


def test_a_secret_is_starred_in_each_form():
    assert redacted("a key-1 b key-1", ["key-1"]) == "a *** b ***"
    assert redacted(r'{"key": "a\"b\\c"}', ['a"b\\c']) == '{"key": "***"}'
    assert redacted("none of it", [NO_KEY, ""]) == "none of it"
    assert redacted("abcd abc", ["abc", "abcd"]) == "*** ***"


def test_a_key_that_stands_where_its_name_is_due_is_not_shown(monkeypatch):
    with pytest.raises(UserError, match="f: no name of an environment variable") as error:
        api_key("sk-12345", "f")
    assert "sk-12345" not in str(error.value)
    for config in (HttpJudgeConfig, ServerConfig):  # without an endpoint too: it would be recorded
        with pytest.raises(ValueError, match="api_key_env: no name of an env") as error:
            config(api_key_env="sk-12345")
        assert "sk-12345" not in str(error.value)
    for bad in ("sk-1\n", "two words", "schlüssel"):
        monkeypatch.setenv("A_KEY", bad)
        with pytest.raises(UserError, match="f=A_KEY: its key has a space") as error:
            api_key("A_KEY", "f")
        assert bad.strip() not in str(error.value)
    assert api_key("", "f") == NO_KEY
