"""Many adapters behind one server: the cost of loading them, and requests for random adapters over loopback.

The server and its model have a process of their own, the clients are threads of this process. In another process, PEFT
loads as many LoRA adapters, with as many trained values, onto the same base model. PEFT loads up to 100, since its time
for one more grows with their number, and a thousand would take many minutes.
"""

import http.client
import json
import multiprocessing
import random
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from statistics import quantiles
from typing import Any

import peft
import torch
import uvicorn
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from randlora import RandLoraConfig
from randlora.serve.adapters import Adapters
from randlora.serve.server import make_app

from . import serving_peer
from .models import Llama, matched_lora_rank
from .serving_peer import measure_loading, prepare

TOLD = ("requests/s", "p50 ms", "p95 ms", "cpu ms")
COLUMNS = (
    "adapters",
    "method",
    "load s",
    "load cpu s",
    "one more cpu ms",
    "adapter kB",
    "resident kB",
    "process MB",
    *TOLD,
)
ARCHITECTURE = Llama(hidden=256, intermediate=704, layers=2, heads=4, vocab=512)
LORA, OURS = "PEFT LoRA", "randlora serve"
COUNTS, QUICK = (1, 10, 100, 1_000), (1, 3)
MOST_LORAS = 100
REQUESTS, CLIENTS, PROMPT, TOKENS = 40, 8, 16, 8


def run(quick: bool) -> Iterator[dict[str, Any]]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sizes = {case: write_patterns(folder, case) for case in (LORA, OURS)}
        lora, server = (stack.enter_context(spawned()) for _ in range(2))
        before = 0
        for count in QUICK if quick else COUNTS:
            if count <= MOST_LORAS:
                new = [write(folder, LORA, number) for number in range(before, count)]
                found = lora.submit(serving_peer.load, folder / "base", new).result()
                yield {"method": LORA, "adapter kB": sizes[LORA], **found, **dict.fromkeys(TOLD)}
            new = [write(folder, OURS, number) for number in range(before, count)]
            found = server.submit(load, folder / "base", new).result()
            port, start = server.submit(listen, folder / "base").result()
            told = ask(port, count, 4 if quick else REQUESTS)
            cpu = server.submit(time.process_time).result() - start
            told["cpu ms"] = cpu / told.pop("requests") * 1e3
            yield {"method": OURS, "adapter kB": sizes[OURS], **found, **told}
            before = count


def spawned() -> ProcessPoolExecutor:
    """Return an executor with one spawned process: PEFT's process must not have imported randlora."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=context, initializer=prepare)


def write_patterns(folder: Path, case: str) -> float:
    """Write a template adapter, and the base model with a tokenizer of numbered words; return kB of the adapter."""
    base, targets = ARCHITECTURE.build(), ARCHITECTURE.targets
    base.generation_config.eos_token_id = None  # so that every text has its full length
    base.save_pretrained(folder / "base")
    inner = Tokenizer(WordLevel({f"w{number}": number for number in range(ARCHITECTURE.vocab)}, unk_token="w0"))
    inner.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0").save_pretrained(folder / "base")
    named: dict[str, Any] = {"target_modules": targets, "task_type": "CAUSAL_LM"}
    if case == LORA:
        config: peft.PeftConfig = peft.LoraConfig(r=matched_lora_rank(base, targets, ARCHITECTURE.rank), **named)
    else:
        config = RandLoraConfig(r=ARCHITECTURE.rank, save_projection=False, **named)
    model = peft.get_peft_model(base, config)
    config.base_model_name_or_path = str(folder / "base")
    model.save_pretrained(str(folder / case))
    return sum(value.nbytes for value in load_file(folder / case / "adapter_model.safetensors").values()) / 1e3


def write(folder: Path, case: str, number: int) -> Path:
    """Write an adapter with random numbers of its own, as if trained, and return its folder."""
    path = folder / f"{case} {number}"
    path.mkdir()
    shutil.copy(folder / case / "adapter_config.json", path)
    draw = torch.Generator().manual_seed(number)
    weights = load_file(folder / case / "adapter_model.safetensors")
    for name, value in weights.items():
        if "lambda" in name or "lora_B" in name:
            value.copy_(0.02 * torch.randn(value.shape, generator=draw))
    save_file(weights, path / "adapter_model.safetensors", {"format": "pt"})
    return path


class Server:
    """The server's model with its adapters, and the server, which starts at the first request."""

    def __init__(self, base: Path) -> None:
        self.adapters, self._port = Adapters.for_paths([], str(base)), 0

    def load(self, path: Path) -> None:
        self.adapters.load(f"a{len(self.adapters.served) - 1}", path)

    def port(self) -> int:
        if not self._port:
            listener = socket.create_server(("127.0.0.1", 0))
            self._port = listener.getsockname()[1]
            server = uvicorn.Server(uvicorn.Config(make_app(self.adapters), log_level="warning"))
            threading.Thread(target=server.run, args=([listener],), daemon=True).start()
        return self._port


@cache
def server_of(base: Path) -> Server:
    """Return the server of this process."""
    return Server(base)


def load(base: Path, paths: list[Path]) -> dict[str, Any]:
    server = server_of(base)
    found = measure_loading(server.load, paths)
    return {"adapters": len(server.adapters.served) - 1, **found}


def listen(base: Path) -> tuple[int, float]:
    """Return the port, and the CPU time of the process until now."""
    return server_of(base).port(), time.process_time()


def ask(port: int, adapters: int, requests: int) -> dict[str, Any]:
    """Return times of requests by many clients at once, each with one request at a time."""
    draw = random.Random(0)
    words = [f"w{number}" for number in range(1, ARCHITECTURE.vocab)]
    asked = [(f"a{draw.randrange(adapters)}", " ".join(draw.choices(words, k=PROMPT))) for _ in range(requests)]
    with ThreadPoolExecutor(CLIENTS) as clients:
        start = time.perf_counter()
        times = list(clients.map(lambda one: seconds_of(port, *one), asked))
        took = time.perf_counter() - start
    shares = quantiles(times, n=20)
    return {
        "requests": requests,
        "requests/s": requests / took,
        "p50 ms": shares[9] * 1e3,
        "p95 ms": shares[18] * 1e3,
    }


def seconds_of(port: int, adapter: str, prompt: str) -> float:
    body = json.dumps({"model": adapter, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0})
    start, connection = time.perf_counter(), http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    answer = json.load(connection.getresponse())
    connection.close()
    if answer.get("usage", {}).get("completion_tokens") != TOKENS:
        raise RuntimeError(f"{adapter}: {answer}")
    return time.perf_counter() - start
