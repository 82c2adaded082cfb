"""OpenAI's endpoints: Transformers' request handlers, which serve adapters here instead of models."""

from __future__ import annotations

import asyncio
import copy
import json
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from transformers import BatchEncoding, GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.utils import (
    BaseGenerateManager,
    BaseHandler,
    DirectStreamer,
    GenerationState,
    Modality,
    _GenerationCancelled,
    _StreamError,
)

from randlora.errors import ConfigError
from randlora.serve.adapters import Adapters, Served
from randlora.serve.batches import Job, Worker
from randlora.serve.errors import answer_errors
from randlora.serve.keys import Keys, RequireKey
from randlora.serve.request import Asked, AskedChat, AskedText, understood
from randlora.train.infer import answer_ends, asked_tokens, room
from randlora.tuner.layers.rows import BASE


class LoadRequest(BaseModel):
    """The body of ``/v1/load_lora_adapter``, as in vLLM."""

    model_config = ConfigDict(extra="forbid")

    lora_name: str
    lora_path: str


class UnloadRequest(BaseModel):
    """The body of ``/v1/unload_lora_adapter``, as in vLLM."""

    model_config = ConfigDict(extra="forbid")

    lora_name: str


def make_app(
    adapters: Adapters, batch_size: int = 8, load_from: Path | None = None, keys: Keys | None = None
) -> FastAPI:
    """Return the server's application.

    Args:
        adapters: the adapters to serve; from now on only the application's own thread may load, unload or run them.
        batch_size: most requests in a batch.
        load_from: folder from which requests may load adapters; by default they may not.
        keys: keys of which a request must have one; by default it needs none.
    """
    base = adapters.base
    pads = not getattr(base.model, "_is_stateful", False)  # recurrent models would read the padding
    worker = Worker(adapters.rows, batch_size, base.processor.pad_token_id or 0, pads)
    chat, completion = (kind(adapters, worker) for kind in (_Chat, _Completion))
    app = FastAPI(title="randlora serve", docs_url=None, redoc_url=None)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: dict[str, Any]) -> Any:
        return await chat.handle_request(body, f"chatcmpl-{uuid.uuid4().hex}")

    @app.post("/v1/completions")
    async def completions(body: dict[str, Any]) -> Any:
        return await completion.handle_request(body, f"cmpl-{uuid.uuid4().hex}")

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [_entry(one, base.base) for one in adapters.served]}

    @app.get("/health")
    async def health() -> Any:
        return {"status": "ok"}

    @app.post("/v1/load_lora_adapter")
    async def load(asked: LoadRequest) -> Any:
        path = _allowed(asked.lora_path, load_from)
        return _entry(await _in(worker, partial(adapters.load, asked.lora_name, path)), base.base)

    @app.post("/v1/unload_lora_adapter")
    async def unload(asked: UnloadRequest) -> Any:
        _require_hot_loading(load_from)
        served = adapters.withdraw(asked.lora_name)
        await _in(worker, partial(adapters.forget, served))  # after the requests that use the adapter
        return {"id": served.name, "object": "model", "deleted": True}

    answer_errors(app)
    if keys is not None:
        app.add_middleware(RequireKey, keys=keys)
    return app


def _entry(one: Served, base: str) -> dict[str, Any]:
    """Return an entry of the list of models, with vLLM's fields for an adapter's folder and base model."""
    entry: dict[str, Any] = {"id": one.name, "object": "model", "created": one.since, "owned_by": "randlora"}
    return entry | {"root": str(one.trained.path), "parent": None if one.key == BASE else base}


async def _in(worker: Worker, task: Callable[[], Any]) -> Any:
    return await asyncio.wrap_future(worker.run(task))


def _require_hot_loading(load_from: Path | None) -> None:
    if load_from is None:
        raise HTTPException(403, "adapters are not loaded by request: start the server with --load-from FOLDER")


def _allowed(path: str, load_from: Path | None) -> Path:
    """Return the path of an adapter that a request names; relative paths start at ``load_from``.

    Raises:
        HTTPException: if the path is outside of ``load_from``, or requests may not load adapters.
    """
    _require_hot_loading(load_from)
    assert load_from is not None
    root = load_from.resolve()
    found = (root / path).resolve()
    if root not in found.parents:
        raise HTTPException(403, f"lora_path={path!r} is not in the folder from which this server loads adapters")
    return found


class _ByName(BaseHandler):
    """A handler whose models are the served adapters, by name."""

    _asked: type[Asked]

    def __init__(self, adapters: Adapters, worker: Worker) -> None:
        super().__init__(_TextOnly(), _OneManager(worker))  # type: ignore[arg-type]
        self._adapters = adapters

    def _validate_request(self, body: dict[str, Any]) -> None:
        fields = understood(self._asked, body)
        body.clear()
        body.update(fields)

    def _resolve_model(self, body: dict[str, Any]) -> Any:
        served = self._adapters.named(body["model"])
        # the job carries the seed: Transformers would set it now, for whichever batch is being computed
        model = _Model(served, body.pop("seed", None))
        return served.name, model, _Prompts(served.trained.processor)

    def _build_generation_config(
        self, body: dict[str, Any], model_generation_config: GenerationConfig, use_cb: bool = False
    ) -> GenerationConfig:
        """Return the config, with sampling as in `randlora generate`.

        A request that gives a temperature or ``top_p`` is sampled; a temperature of 0 is greedy.
        """
        config: GenerationConfig = super()._build_generation_config(body, model_generation_config, use_cb=use_cb)
        if body.get("temperature") == 0:
            config.do_sample, config.temperature, config.top_p = False, 1.0, 1.0
        elif "temperature" in body or "top_p" in body:
            config.do_sample = True
        return config


class _Chat(_ByName, ChatCompletionHandler):
    _asked = AskedChat

    def _resolve_model(self, body: dict[str, Any]) -> Any:
        name, model, prompts = super()._resolve_model(body)
        prompts.require_template(name)
        ends = answer_ends(model.served.trained)
        if ends:
            model.generation_config.eos_token_id = ends
        return name, model, prompts


class _Completion(_ByName, CompletionHandler):
    _asked = AskedText


class _Model:
    """The attributes of a model that Transformers' handlers read, for one request."""

    def __init__(self, served: Served, seed: int | None) -> None:
        model = served.trained.model
        self.served, self.seed = served, seed
        self.config, self.device = model.config, torch.device("cpu")  # the worker moves a batch as a whole
        self.generation_config = copy.deepcopy(model.generation_config)
        self.generation_config.pad_token_id = served.trained.processor.pad_token_id


class _Prompts:
    """A tokenizer that makes the same prompts as `randlora generate`."""

    def __init__(self, tokenizer: Any) -> None:
        self._of = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)

    def __call__(self, text: str, **_how: Any) -> BatchEncoding:
        return _inputs(asked_tokens(self._of, text))

    def apply_chat_template(self, messages: list[dict[str, Any]], tools: Any = None, **_how: Any) -> BatchEncoding:
        return _inputs(asked_tokens(self._of, messages, **({"tools": tools} if tools else {})))

    def require_template(self, name: str) -> None:
        if not self._of.chat_template:
            raise ConfigError(f"the tokenizer of {name!r} has no chat template: ask /v1/completions with a prompt")


def _inputs(ids: list[int]) -> BatchEncoding:
    return BatchEncoding({"input_ids": torch.tensor([ids])})


class _TextOnly:
    """A substitute for Transformers' manager of models, which would load and unload models."""

    @staticmethod
    def get_model_modality(model: Any, processor: Any = None) -> Modality:
        return Modality.LLM


class _OneManager(GenerationState):
    """A state with one manager for all names. Transformers has one, with a thread, for each model."""

    def __init__(self, worker: Worker) -> None:
        super().__init__()
        self._manager = _Batches(worker)

    def get_manager(self, model_id: str, use_cb: bool = False) -> BaseGenerateManager:
        return self._manager


class _Batches(BaseGenerateManager):
    """A manager that passes prepared requests of Transformers' handlers to the worker."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: Any,
        gen_config: GenerationConfig,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue[Any], DirectStreamer]:
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()
        streamer = DirectStreamer(processor._tokenizer, loop, queue, response_parser=response_parser)
        streamer.put(inputs["input_ids"])  # the streamer skips the prompt

        def put(token: int) -> bool:
            try:
                streamer.put(torch.tensor([token]))
            except _GenerationCancelled:
                return False
            return True

        def told(done: Future[list[int]]) -> None:
            error = done.exception()
            if error is None:
                streamer.end()
            else:
                text = json.dumps(f"{type(error).__name__}: {error}")[1:-1]  # the handler only adds quotes
                loop.call_soon_threadsafe(queue.put_nowait, _StreamError(text))

        self._submit(model, processor, inputs, gen_config, put).add_done_callback(told)
        return queue, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: GenerationConfig, request_id: str
    ) -> tuple[str, int, list[int]]:
        future = self._submit(model, processor, inputs, gen_config, lambda token: True)
        found = await asyncio.wrap_future(future)
        return processor.decode(found, skip_special_tokens=True), inputs["input_ids"].shape[-1], found

    def stop(self) -> None:
        """Do nothing: the worker's thread ends with the process."""

    def _submit(
        self, model: _Model, processor: Any, inputs: Any, config: GenerationConfig, put: Callable[[int], bool]
    ) -> Future[list[int]]:
        ids = inputs["input_ids"][0].tolist()
        # in the handler's own config: by it the handler tells a finished text from one that was cut off
        config.max_new_tokens = room(model.served.trained, len(ids), config.max_new_tokens or 1)
        job = Job(model.served.key, ids, config, put, model.served.trained.processor, model.seed)
        self._worker.submit(job)
        return job.future
