"""A tiny language model that chats, adapters of it, and a server of these on a port of its own."""

import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import openai
import pytest
import uvicorn
from transformers import AutoTokenizer

from cli.conftest import save_adapter
from randlora.serve.adapters import Adapters
from randlora.serve.server import make_app
from randlora.train.infer import generate_text
from randlora.train.trained import load_trained

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} [SEP] {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


@pytest.fixture(scope="session")
def base(tmp_path_factory, tiny_llama) -> str:
    folder = tmp_path_factory.mktemp("chats") / "base"
    shutil.copytree(tiny_llama, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def folder(tmp_path_factory, base) -> Path:
    """Adapters `law`, `code` and `third`, without bases."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("law", "code", "third")):
        save_adapter(base, folder / name, seed=seed, save_projection=False)
    return folder


@pytest.fixture(scope="session")
def alone(folder, base):
    """What `randlora generate` writes with one adapter, or with the base model, without a server."""
    models = {}

    def write(name, prompt, **how):
        path = folder / name if (folder / name).is_dir() and name in ("law", "code", "third") else Path(base)
        if name not in models:
            models[name] = load_trained(path)
        options = {"max_new_tokens": 8, "temperature": 0, **how}
        return generate_text(models[name], prompt, lambda text: None, **options)

    return write


@contextmanager
def running(adapters: Adapters, **options) -> Iterator[SimpleNamespace]:
    """The server in a thread: its address, OpenAI's own client, and the adapters of each batch."""
    batches, rows = [], adapters.rows
    adapters.rows = lambda keys: batches.append(keys) or rows(keys)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(make_app(adapters, **options), log_level="error"))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
    yield SimpleNamespace(url=url, client=client, adapters=adapters, batches=batches)
    client.close()
    server.should_exit = True
    thread.join()


def served(folder: Path, *names: str) -> Adapters:
    adapters = Adapters.for_paths([folder / name for name in names])
    for name in names:
        adapters.load(name, folder / name)
    return adapters
