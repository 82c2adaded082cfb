"""Errors as OpenAI's clients expect them."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from randlora.errors import RandLoraError, UnknownModelError


def answer_errors(app: FastAPI) -> None:
    """Let the application answer with errors in OpenAI's format."""

    @app.exception_handler(RandLoraError)
    async def ours(_request: Request, error: RandLoraError) -> JSONResponse:
        if isinstance(error, UnknownModelError):
            return error_answer(404, str(error), "model_not_found", param="model")
        return error_answer(400, str(error))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code in (404, 405):  # only the router's own errors have these codes
            known = ", ".join(f"{method} {path}" for path, method in _endpoints(app))
            message = f"there is no {request.method} {request.scope['path']!r:.80} here; there are {known}"
            return error_answer(error.status_code, message)
        return error_answer(error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def unreadable(_request: Request, error: RequestValidationError) -> JSONResponse:
        faults = [f"{'.'.join(map(str, fault['loc'][1:]))}: {fault['msg']}" for fault in error.errors()]
        return error_answer(400, f"the request's body cannot be read: {'; '.join(faults)}")

    @app.exception_handler(Exception)
    async def failed(_request: Request, error: Exception) -> JSONResponse:
        return error_answer(500, f"{type(error).__name__}: {error}")


def _endpoints(app: FastAPI) -> list[tuple[str, str]]:
    """Return path and method of each endpoint, in the order of the paths."""
    routes = [route for route in app.routes if isinstance(route, APIRoute)]
    return sorted((route.path, method) for route in routes for method in route.methods or ())


def error_answer(status: int, message: str, code: str | None = None, param: str | None = None) -> JSONResponse:
    """Return an answer with an error in OpenAI's format."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": code}}, status)
