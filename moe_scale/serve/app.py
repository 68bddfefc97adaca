"""The web application: completions whole or as a stream of events, models, health and metrics."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moe_scale.generate.batch import Event, Request
from moe_scale.generate.text_model import TextModel
from moe_scale.serve.completions import Answer, CompletionBody, RequestError, read_body, requests_of
from moe_scale.serve.metrics import exposition
from moe_scale.serve.scheduler import Failed, FullError, Scheduler, StoppingError

BODY_SECONDS = 30.0
"""How long a body may take to arrive."""


class Service:
    """What the routes share.

    Args:
        model: what generates.
        scheduler: of its batch; not started yet.
        max_body: bytes of a request's body, at most.
    """

    def __init__(self, model: TextModel, scheduler: Scheduler, max_body: int):
        self.model, self.scheduler, self.max_body = model, scheduler, max_body
        self.answered: Counter[int] = Counter()
        """Completions by the status of their answer; 499 stands for a client that left."""

    async def completions(self, http: HttpRequest) -> Response:
        try:
            body = read_body(await self._read(http))
            requests = await asyncio.to_thread(requests_of, body, self.model, self.scheduler.max_running)
            sequences = Sequences(self.scheduler, requests)
        except RequestError as error:
            return self._refused(error)
        except ClientDisconnect:
            self.answered[499] += 1
            return Response(status_code=499)
        answer = Answer(self.model.name, requests, body.n)
        if body.stream:
            return EventStream(self._events(sequences, answer, body), sequences.close)
        try:
            return await self._whole(http, sequences, answer)
        finally:
            sequences.close()

    async def _read(self, http: HttpRequest) -> bytes:
        data = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in http.stream():
                    data += chunk
                    if len(data) > self.max_body:
                        raise RequestError(f"the body has more than {self.max_body} bytes", status=413)
        except TimeoutError:
            raise RequestError(f"the body did not arrive in {BODY_SECONDS:.0f} s", status=408) from None
        return bytes(data)

    async def _whole(self, http: HttpRequest, sequences: Sequences, answer: Answer) -> Response:
        texts = [""] * len(sequences.keys)
        ends: list[Any] = [None] * len(texts)
        leaving = asyncio.ensure_future(_left(http))
        try:
            while not all(ends):
                coming = asyncio.ensure_future(sequences.next())
                await asyncio.wait({coming, leaving}, return_when=asyncio.FIRST_COMPLETED)
                if not coming.done():
                    coming.cancel()
                    self.answered[499] += 1
                    return Response(status_code=499)  # nobody reads it
                index, event = coming.result()
                answer.completion_tokens += 1
                texts[index] += event.text
                ends[index] = event.finish
        except RequestError as error:
            return self._refused(error)
        finally:
            leaving.cancel()
        self.answered[200] += 1
        return JSONResponse(answer.whole(list(zip(texts, ends, strict=True))))

    async def _events(self, sequences: Sequences, answer: Answer, body: CompletionBody) -> AsyncIterator[str]:
        """Server-sent events: a piece each time that there is something to show, and at the end ``[DONE]``."""
        status = 499
        try:
            left = len(sequences.keys)
            while left:
                index, event = await sequences.next()
                answer.completion_tokens += 1
                left -= event.finish is not None
                if event.text or event.finish:
                    yield _sse(answer.piece(index, event.text, event.finish))
            if body.stream_options is not None and body.stream_options.include_usage:
                yield _sse(answer.last())
            status = 200
        except RequestError as error:
            status = error.status
            yield _sse(error.body())
        finally:
            self.answered[status] += 1
        yield "data: [DONE]\n\n"

    def _refused(self, error: RequestError) -> Response:
        self.answered[error.status] += 1
        headers = {"Retry-After": "1"} if error.status in (429, 503) else None
        return JSONResponse(error.body(), error.status, headers)

    async def models(self, http: HttpRequest) -> Response:
        card = {"id": self.model.name, "object": "model", "created": 0, "owned_by": "moe_scale"}
        name = http.path_params.get("name")
        if name is None:
            return JSONResponse({"object": "list", "data": [card]})
        if name != self.model.name:
            error = RequestError(f"there is no model {name!r}", status=404, param="model", code="model_not_found")
            return JSONResponse(error.body(), error.status)
        return JSONResponse(card)

    async def health(self, http: HttpRequest) -> Response:
        alive = self.scheduler.is_alive
        return JSONResponse({"status": "ok" if alive else "the generating thread has ended"}, 200 if alive else 503)

    async def metrics(self, http: HttpRequest) -> Response:
        text = exposition(self.scheduler.figures, self.answered, self.scheduler.max_running)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


class Sequences:
    """The running texts of one request, their events handed over from the scheduler's thread.

    Raises:
        RequestError: when the server has no room for them.
    """

    def __init__(self, scheduler: Scheduler, requests: Sequence[Request]):
        self._scheduler = scheduler
        self._queue: asyncio.Queue[tuple[int, Event[int] | Failed]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def listener(index: int) -> Callable[[Event[int] | Failed], None]:
            def hear(event: Event[int] | Failed) -> None:
                with suppress(RuntimeError):  # the loop is closed: the server was told to stop at once
                    loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))

            return hear

        try:
            self.keys = scheduler.submit(requests, listener)
        except FullError:
            message = "too many requests are waiting; try again in a while"
            raise RequestError(message, status=429, code="rate_limit_exceeded") from None
        except StoppingError:
            raise RequestError("the server is stopping", status=503) from None

    async def next(self) -> tuple[int, Event[int]]:
        """The place of a text, and its next event."""
        index, event = await self._queue.get()
        if isinstance(event, Failed):
            if event.stopping:
                raise RequestError(event.reason, status=503)
            raise RequestError(f"generating failed: {event.reason}", status=500)
        return index, event

    def close(self) -> None:
        """Whatever is still running ends."""
        self._scheduler.cancel(self.keys)


class EventStream(StreamingResponse):
    """Server-sent events. However the answer ends, by itself or by a client that leaves, ``close`` is called."""

    def __init__(self, events: AsyncIterator[str], close: Callable[[], None]):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._events, self._close = events, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()
            await self._events.aclose()  # type: ignore[attr-defined]


class KeyRequired:
    """Refuses whatever is asked without the API key, but for the health.

    Args:
        key: what ``Authorization: Bearer`` has to name.
    """

    def __init__(self, app: ASGIApp, key: str):
        self.app, self.expected = app, f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            if not hmac.compare_digest(given, self.expected):
                message = "the API key is missing or wrong; give it as 'Authorization: Bearer KEY'"
                error = RequestError(message, status=401, code="invalid_api_key")
                await JSONResponse(error.body(), 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
                return
        await self.app(scope, receive, send)


def build_app(model: TextModel, scheduler: Scheduler, *, api_key: str = "", max_body: int = 2**20) -> Starlette:
    """The application. Its lifespan starts and stops the scheduler."""
    service = Service(model, scheduler, max_body)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        scheduler.start()
        yield
        scheduler.close()
        await asyncio.to_thread(scheduler.join)

    async def not_found(http: HttpRequest, error: Exception) -> Response:
        status = getattr(error, "status_code", 500)
        message = f"{http.method} {http.url.path}: there is no such thing here"
        headers = getattr(error, "headers", None)
        return JSONResponse(RequestError(message, status=status).body(), status, headers)

    return Starlette(
        routes=[
            Route("/v1/completions", service.completions, methods=["POST"]),
            Route("/v1/models", service.models),
            Route("/v1/models/{name}", service.models),
            Route("/health", service.health),
            Route("/metrics", service.metrics),
        ],
        middleware=[Middleware(KeyRequired, key=api_key)] if api_key else [],
        exception_handlers={404: not_found, 405: not_found},
        lifespan=lifespan,
    )


async def _left(http: HttpRequest) -> None:
    """Returns when the client has left."""
    message: Message = {"type": ""}
    while message["type"] != "http.disconnect":
        message = await http.receive()


def _sse(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
