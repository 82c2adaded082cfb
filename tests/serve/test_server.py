"""The server over HTTP, by OpenAI's own client, beside `randlora generate` with each adapter alone."""

import json
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest

from serve.conftest import running, served

HOW = {"max_tokens": 8, "temperature": 0}
PROMPTS = ["good", "a lovely film about nothing at all", "bad poor dull awful", "7 and 8", "fine"]


@pytest.fixture(scope="module")
def server(folder):
    with running(served(folder, "law", "code"), load_from=folder) as server:
        yield server


def words(text):
    return "".join(text.split())


def post(server, path, **body):
    """Status and content of an answer."""
    request = urllib.request.Request(f"{server.url}/v1/{path}", json.dumps(body).encode(), method="POST")
    request.add_header("Content-Type", "application/json")
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def message(server, path, code, **body):
    """Of an error, which must have OpenAI's shape and one line."""
    status, content = post(server, path, **body)
    assert status == code, content
    assert set(content["error"]) == {"message", "type", "param", "code"}
    assert "\n" not in content["error"]["message"]
    return content["error"]["message"]


def complete(server, name, prompt, **how):
    return server.client.completions.create(model=name, prompt=prompt, **(HOW | how)).choices[0].text


@contextmanager
def requests_going_on(server, alone, name="law"):
    """Asks one adapter again and again; each answer must be its own."""
    expected, found, end = words(alone(name, PROMPTS[1])), [], threading.Event()

    def ask():
        while not end.is_set():
            found.append(words(complete(server, name, PROMPTS[1])))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
    assert found
    assert set(found) == {expected}


class TestText:
    def test_the_models_are_the_base_and_its_adapters(self, server, base, folder):
        listed = {one.id: one for one in server.client.models.list()}
        assert list(listed)[:3] == [base, "law", "code"]
        assert (listed["law"].parent, listed["law"].root) == (base, str(folder / "law"))
        assert listed[base].parent is None

    @pytest.mark.parametrize("name", ["law", "code", "BASE"])
    def test_it_is_that_of_generate(self, server, alone, base, name):
        model = base if name == "BASE" else name
        assert words(complete(server, model, PROMPTS[1])) == words(alone(name, PROMPTS[1]))
        said = [{"role": "user", "content": "good film"}]
        answer = server.client.chat.completions.create(model=model, messages=said, **HOW)
        assert words(answer.choices[0].message.content) == words(alone(name, said))
        assert answer.model == model

    def test_adapters_and_base_write_different_texts(self, alone):
        assert len({words(alone(name, PROMPTS[1])) for name in ("law", "code", "third", "BASE")}) == 4

    def test_streams_are_the_same_in_pieces(self, server, alone):
        pieces = list(server.client.completions.create(model="law", prompt=PROMPTS[1], stream=True, **HOW))
        assert len(pieces) > 3
        assert words("".join(piece.choices[0].text for piece in pieces)) == words(alone("law", PROMPTS[1]))
        assert pieces[-1].choices[0].finish_reason == "length"
        said = [{"role": "user", "content": "good film"}]
        pieces = list(server.client.chat.completions.create(model="code", messages=said, stream=True, **HOW))
        text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
        assert words(text) == words(alone("code", said))
        assert pieces[-1].usage.completion_tokens == 8

    def test_parts_of_text_are_a_text(self, server, alone):
        said = [{"role": "user", "content": [{"type": "text", "text": "good film"}]}]
        answer = server.client.chat.completions.create(model="law", messages=said, **HOW)
        assert words(answer.choices[0].message.content) == words(
            alone("law", [{"role": "user", "content": "good film"}])
        )

    def test_a_seed_repeats_what_generate_samples_whatever_else_runs(self, server, alone):
        how = {"temperature": 0.9, "top_p": 0.8, "seed": 3}
        expected = words(alone("code", "good", **how))
        with requests_going_on(server, alone):
            assert [words(complete(server, "code", "good", **how)) for _ in range(2)] == [expected] * 2

    def test_no_more_than_the_model_has_positions_for(self, server, alone, monkeypatch):
        monkeypatch.setattr(server.adapters.base.model.config, "max_position_embeddings", 12)
        answer = server.client.completions.create(model="law", prompt="good film", max_tokens=100, temperature=0)
        assert answer.usage.total_tokens == 12
        for stream in (False, True):
            text = message(server, "completions", 400, model="law", prompt="good " * 20, stream=stream)
            assert "shorten it" in text

    def test_a_stop_string_ends_the_text(self, server, alone):
        whole = alone("law", PROMPTS[1]).split()
        text = complete(server, "law", PROMPTS[1], stop=[whole[2]])
        assert words(text) == words("".join(whole[:3]))

    def test_the_client_of_the_page(self, server, alone, capsys):
        page = (Path(__file__).parents[2] / "docs/serving.md").read_text()
        snippet = page.partition("from openai import OpenAI")
        program = snippet[1] + snippet[2].partition("```")[0]
        exec(
            program.replace("http://127.0.0.1:8000", server.url).replace(
                "stream=True", "stream=True, temperature=0, max_tokens=8"
            )
        )
        listed, _, text = capsys.readouterr().out.partition("\n")
        assert "'law', 'code'" in listed
        assert words(text) == words(alone("law", [{"role": "user", "content": "May I quote a whole page?"}]))


class TestTogether:
    def test_different_adapters_at_once_each_with_its_own_text(self, server, alone, base):
        asked = [(name, prompt, n) for name in ("law", "code", base) for prompt in PROMPTS for n in (3, 8)]
        with ThreadPoolExecutor(len(asked)) as clients:
            texts = list(clients.map(lambda one: complete(server, one[0], one[1], max_tokens=one[2]), asked))
        for (name, prompt, n), text in zip(asked, texts, strict=True):
            assert words(text) == words(alone(name, prompt, max_new_tokens=n)), (name, prompt, n)
        assert max(len(set(keys)) for keys in server.batches) > 1  # one batch had several adapters

    def test_a_client_that_leaves_leaves_the_others(self, server, alone):
        with requests_going_on(server, alone):
            stream = server.client.completions.create(model="code", prompt="good", stream=True, max_tokens=500)
            next(iter(stream))
            stream.close()
        assert words(complete(server, "code", "good")) == words(alone("code", "good"))


class TestHotLoading:
    def test_load_and_unload_while_requests_run(self, server, alone, folder, base):
        with requests_going_on(server, alone):
            for _ in range(2):
                status, entry = post(server, "load_lora_adapter", lora_name="v1.2/new", lora_path="third")
                assert (status, entry["id"], entry["parent"]) == (200, "v1.2/new", base)
                assert words(complete(server, "v1.2/new", PROMPTS[0])) == words(alone("third", PROMPTS[0]))
                assert "'v1.2/new' already" in message(
                    server, "load_lora_adapter", 400, lora_name="v1.2/new", lora_path="law"
                )
                assert post(server, "unload_lora_adapter", lora_name="v1.2/new")[1]["deleted"]
                with pytest.raises(openai.NotFoundError, match=r"no model 'v1.2/new' here; there are .*'law', 'code'"):
                    complete(server, "v1.2/new", "good")
        assert words(complete(server, "code", "good")) == words(alone("code", "good"))

    def test_what_was_asked_before_the_unloading_is_answered(self, server, alone, folder):
        post(server, "load_lora_adapter", lora_name="gone", lora_path=str(folder / "third"))
        stream = server.client.completions.create(
            model="gone", prompt="good", stream=True, **(HOW | {"max_tokens": 40})
        )
        assert post(server, "unload_lora_adapter", lora_name="gone")[0] == 200
        text = "".join(piece.choices[0].text for piece in stream)
        assert words(text) == words(alone("third", "good", max_new_tokens=40))

    def test_nothing_outside_of_the_folder(self, server, folder, tmp_path):
        for path in ("../x", "/etc", ".", str(tmp_path)):
            assert "is not in the folder" in message(server, "load_lora_adapter", 403, lora_name="x", lora_path=path)
        (folder / "link").symlink_to(tmp_path)
        assert "is not in the folder" in message(server, "load_lora_adapter", 403, lora_name="x", lora_path="link")
        assert "is no folder" in message(server, "load_lora_adapter", 400, lora_name="x", lora_path="none")

    def test_the_base_stays(self, server, base):
        assert "only adapters can be unloaded" in message(server, "unload_lora_adapter", 400, lora_name=base)
        assert "no model 'x' here" in message(server, "unload_lora_adapter", 404, lora_name="x")

    def test_a_damaged_adapter_leaves_the_others(self, server, alone, folder):
        bad = folder / "damaged"
        bad.mkdir()
        (bad / "adapter_config.json").write_bytes((folder / "law/adapter_config.json").read_bytes())
        weights = (folder / "law/adapter_model.safetensors").read_bytes()
        (bad / "adapter_model.safetensors").write_bytes(weights[: len(weights) // 2])
        text = message(server, "load_lora_adapter", 400, lora_name="bad", lora_path="damaged")
        assert "damaged" in text
        assert words(complete(server, "law", "good")) == words(alone("law", "good"))
        assert "bad" not in [one.id for one in server.client.models.list()]

    def test_it_is_off_unless_asked_for(self, folder):
        with running(served(folder, "law")) as server:
            for path, body in [("load_lora_adapter", {"lora_path": "third"}), ("unload_lora_adapter", {})]:
                assert "--load-from FOLDER" in message(server, path, 403, lora_name="law", **body)


class TestErrors:
    def test_an_unknown_model_is_openai_s_404_with_the_names(self, server):
        with pytest.raises(openai.NotFoundError) as error:
            server.client.chat.completions.create(model="lwa", messages=[{"role": "user", "content": "hi"}])
        assert error.value.body["code"] == "model_not_found"
        assert "'law', 'code'" in error.value.body["message"]

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ({"temperature": -1}, "temperature=-1: "),
            ({"top_p": 0}, "top_p=0: "),
            ({"max_tokens": 0}, "max_tokens=0: "),
            ({"n": 2}, "n=2: not supported"),
            ({"prompt": ["a", "b"]}, "prompt=['a', 'b']: "),
            ({"frobnicate": 1}, "frobnicate=1: not supported"),
            ({"model": None}, "model: missing"),
            ({"logprobs": 3, "seed": "x"}, "seed='x': "),
        ],
    )
    def test_what_cannot_be_followed_is_named(self, server, change, expected):
        assert expected in message(server, "completions", 400, **({"model": "law", "prompt": "good"} | change))

    def test_what_changes_nothing_is_taken(self, server, alone):
        harmless = {"n": 1, "user": "me", "presence_penalty": 0, "echo": False, "logprobs": None}
        assert words(complete(server, "law", "good", **harmless)) == words(alone("law", "good"))

    def test_conversations_need_messages_of_text_and_a_template(self, server, monkeypatch):
        image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
        assert "image_url" in message(server, "chat/completions", 400, model="law", messages=image)
        assert "messages" in message(server, "chat/completions", 400, model="law", messages=[])
        monkeypatch.setattr(server.adapters.named("law").trained.processor, "chat_template", None)
        said = [{"role": "user", "content": "hi"}]
        assert "has no chat template" in message(server, "chat/completions", 400, model="law", messages=said)

    def test_a_failure_in_the_middle_is_told_and_the_next_request_answered(self, server, alone, monkeypatch):
        true = server.adapters.base.model.generate

        def fail(*args, **kwargs):
            raise RuntimeError('no "memory"\nleft')

        monkeypatch.setattr(server.adapters.base.model, "generate", fail)
        status, content = post(server, "completions", model="law", prompt="good")
        assert (status, content["error"]["type"]) == (500, "server_error")
        request = {"model": "law", "prompt": "good", "stream": True}
        raw = urllib.request.Request(f"{server.url}/v1/completions", json.dumps(request).encode(), method="POST")
        raw.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(raw) as answer:
            told = json.loads(answer.read().decode().removeprefix("data: "))
        assert 'no "memory"' in told["error"]
        monkeypatch.setattr(server.adapters.base.model, "generate", true)
        assert words(complete(server, "law", "good")) == words(alone("law", "good"))

    @pytest.mark.parametrize(
        ("path", "shown", "code"),
        [
            ("responses", "responses", 404),
            ("embeddings", "embeddings", 404),
            ("x%0Ay", "x\\ny", 404),
            ("models", "models", 405),
        ],
    )
    def test_another_path_or_method_is_told_the_endpoints(self, server, path, shown, code):
        assert message(server, path, code) == (
            f"there is no POST '/v1/{shown}' here; there are GET /health, POST /v1/chat/completions, "
            "POST /v1/completions, POST /v1/load_lora_adapter, GET /v1/models, POST /v1/unload_lora_adapter"
        )

    def test_openai_s_client_is_told_too(self, server):
        with pytest.raises(openai.NotFoundError, match="there is no POST '/v1/responses' here; there are GET /health"):
            server.client.responses.create(model="law", input="good")
