"""API keys: who gets an answer, and who gets 401."""

import json
import urllib.error
import urllib.request

import openai
import pytest

from randlora.errors import ConfigError
from randlora.serve.keys import Keys
from serve.conftest import running, served

FIRST, SECOND = "sk-first", "sk-second"


@pytest.fixture(scope="module")
def server(folder):
    with running(served(folder, "law"), keys=Keys([FIRST, SECOND])) as server:
        yield server


def client(server, key):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


def status(server, path, authorization=None, body=None):
    request = urllib.request.Request(f"{server.url}{path}", body)
    if authorization is not None:
        request.add_header("Authorization", authorization)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize("key", [FIRST, SECOND])
def test_each_key_opens_the_server_to_openai_s_client(server, key):
    answer = client(server, key).completions.create(model="law", prompt="good", max_tokens=2)
    assert answer.usage.completion_tokens <= 2
    pieces = client(server, key).completions.create(model="law", prompt="good", max_tokens=2, stream=True)
    assert list(pieces)


@pytest.mark.parametrize("key", ["sk-third", "sk-firs", "sk-first2", "SK-FIRST", "sk-first sk-second"])
def test_another_key_is_openai_s_401_and_reaches_no_model(server, key):
    server.batches.clear()
    with pytest.raises(openai.AuthenticationError) as error:
        client(server, key).completions.create(model="law", prompt="good")
    assert error.value.body["code"] == "invalid_api_key"
    assert error.value.body["type"] == "invalid_request_error"
    assert not [name for name in (FIRST, SECOND, key) if name in error.value.body["message"]]
    assert error.value.response.headers["WWW-Authenticate"] == "Bearer"
    assert not server.batches


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", FIRST, f"Basic {FIRST}", f"Bearer {FIRST}\xe9"])
def test_what_is_no_bearer_of_a_key_is_refused_everywhere_but_for_health(server, header):
    for path in ("/v1/models", "/v1/completions", "/v1/load_lora_adapter", "/v1", "/v1/none", "//v1/models", "/"):
        assert status(server, path, header) == 401
    assert status(server, "/v1/completions", header, body=b"not JSON" * 1000) == 401
    assert status(server, "/openapi.json", header) == 401
    assert status(server, "/health", header) == 200


def test_the_scheme_is_of_any_case(server):
    assert status(server, "/v1/models", f"bearer {FIRST}") == 200


def test_nothing_prints_or_logs_a_key(server, caplog, capfd):
    with caplog.at_level("DEBUG"):
        client(server, FIRST).models.list()
        status(server, "/v1/models", "Bearer sk-wrong")
    ours = [record for record in caplog.records if not record.name.startswith(("openai", "httpx", "httpcore"))]
    printed = "".join(capfd.readouterr()) + json.dumps([record.getMessage() for record in ours])
    assert not [key for key in (FIRST, SECOND, "sk-wrong") if key in printed + repr(vars(Keys([FIRST])))]


@pytest.mark.parametrize("key", ["", " ", "a b", "a\n", "schlüssel"])
def test_keys_that_no_header_can_hold_are_refused_and_not_named(key):
    with pytest.raises(ConfigError, match=r"an API key .* take another") as error:
        Keys([FIRST, key])
    assert FIRST not in str(error.value)
    assert key not in str(error.value) or not key.strip()
