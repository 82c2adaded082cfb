"""`randlora serve` as a process."""

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from cli.helpers import invoke


def post(url, **body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def test_a_folder_of_adapters_until_ctrl_c(adapter, tiny_llama, tmp_path):
    for name in ("good", "damaged"):
        shutil.copytree(adapter, tmp_path / "adapters" / name)
    (tmp_path / "adapters/damaged/adapter_model.safetensors").write_bytes(b"none")
    words = ["serve", "adapters", f"v1.2={adapter}", "--port", "0", "--json"]
    command = [sys.executable, "-m", "randlora", *words]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    try:
        told = json.loads(process.stdout.readline())
        assert told["models"] == [tiny_llama, "good", "v1.2"]
        found = post(f"{told['url']}/completions", model="v1.2", prompt="good film", max_tokens=3, temperature=0)
        assert found["usage"]["completion_tokens"] == 3
    finally:
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=300)
    assert (process.returncode, rest) == (0, "")
    assert f"2 adapters: good, v1.2 on {tiny_llama} at {told['url']}" in errors
    assert "note: not served: " in errors
    assert "damaged" in errors
    assert "Traceback" not in errors
    assert "Request received" not in errors


@pytest.mark.parametrize("place", ["words", "environment"])
def test_a_key_is_asked_for_and_never_printed(place, adapter):
    key = "sk-never-printed"
    words = ["--api-key", "other", "--api-key", key] if place == "words" else []
    process = subprocess.Popen(
        [sys.executable, "-m", "randlora", "serve", str(adapter), "--port", "0", "--json", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | ({"RANDLORA_API_KEY": key} if place == "environment" else {}),
    )
    try:
        first = process.stdout.readline()
        request = urllib.request.Request(f"{json.loads(first)['url']}/models")
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(request)
        request.add_header("Authorization", f"Bearer {key}")
        with urllib.request.urlopen(request) as answer:
            assert json.load(answer)["object"] == "list"
    finally:
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=300)
    assert (process.returncode, rest) == (0, "")
    assert "with an API key; Ctrl-C ends it" in errors
    assert key not in first + errors


def test_an_empty_key_is_a_mistake_before_anything_is_loaded(monkeypatch):
    assert "an API key" in invoke("serve", "nowhere", "--api-key", "", code=2).output
    monkeypatch.setenv("RANDLORA_API_KEY", "")
    assert "RANDLORA_API_KEY" in invoke("serve", "nowhere", code=2).output


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nowhere"], "'nowhere' is no folder"),
        ([], "name an adapter, or a base model by --model"),
        (["ADAPTER", "ADAPTER"], "name one of them as NAME=PATH"),
        (["ADAPTER", "--load-from", "nowhere"], "--load-from"),
        (["ADAPTER", "--batch-size", "0"], "--batch-size"),
        (["ADAPTER", "--host", "999.1.1.1"], "cannot listen at host='999.1.1.1', port=8000"),
    ],
)
def test_mistakes_end_with_code_2(words, expected, adapter):
    text = invoke("serve", *[str(adapter) if word == "ADAPTER" else word for word in words], code=2).output
    assert expected in " ".join(text.split())


def test_a_named_adapter_that_cannot_be_served_ends_the_command(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "bad")
    (tmp_path / "bad/adapter_model.safetensors").write_bytes(b"none")
    assert "damaged" in invoke("serve", adapter, tmp_path / "bad", code=2).output


def test_without_its_packages_it_names_them(adapter, monkeypatch):
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    assert "pip install 'randlora[serve]'" in invoke("serve", adapter, code=2).output
