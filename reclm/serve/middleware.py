"""Around every request: its id, limits of its body, one line in the log, metrics, and errors as JSON."""

import asyncio
import json
import logging
import re
import secrets
import time
from collections import Counter
from collections.abc import Mapping

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reclm.errors import one_line
from reclm.serve.service import Refused, Service

MOST_BYTES = 1 << 20  # of a body
BODY_SECONDS = 10.0  # in which a body has to arrive
CLOSE = {"Connection": "close"}  # where the rest of a body is not read
CLIENT_LEFT = 499  # in the log and the metrics
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, float("inf"))  # seconds

log = logging.getLogger("reclm.serve")


def error_response(
    status: int, text: str, request_id: str, headers: Mapping[str, str] | None = None
) -> Response:
    content = json.dumps({"error": one_line(text), "request_id": request_id})
    return Response(content, status, headers, "application/json")


class Metrics:
    """Counters since the start, in the text format of Prometheus"""

    def __init__(self):
        self.requests: Counter[tuple[str, int]] = Counter()
        self.seconds: Counter[str] = Counter()
        self.buckets: Counter[tuple[str, float]] = Counter()

    def count(self, path: str, status: int, seconds: float) -> None:
        self.requests[path, status] += 1
        self.seconds[path] += seconds
        self.buckets[path, next(bound for bound in BUCKETS if seconds <= bound)] += 1

    def text(self, service: Service) -> str:
        lines = ["# TYPE reclm_requests_total counter"]
        for (path, status), count in sorted(self.requests.items()):
            lines.append(f'reclm_requests_total{{path="{path}",status="{status}"}} {count}')
        lines.append("# TYPE reclm_request_seconds histogram")
        for path, seconds in sorted(self.seconds.items()):
            below = 0
            for bound in BUCKETS:
                below += self.buckets[path, bound]
                shown = "+Inf" if bound == BUCKETS[-1] else bound
                lines.append(f'reclm_request_seconds_bucket{{path="{path}",le="{shown}"}} {below}')
            lines.append(f'reclm_request_seconds_sum{{path="{path}"}} {seconds:.6f}')
            lines.append(f'reclm_request_seconds_count{{path="{path}"}} {below}')
        for name, kind, value in (
            ("reclm_queue_length", "gauge", service.line.length),
            ("reclm_sessions", "gauge", len(service.model.sessions)),
            ("reclm_model_loads_total", "counter", service.loads),
        ):
            lines += [f"# TYPE {name} {kind}", f"{name} {value}"]
        return "\n".join(lines) + "\n"


class Gate:
    """ASGI middleware. The id of a request is scope["request_id"]."""

    def __init__(self, app: ASGIApp, service: Service, metrics: Metrics):
        self.app, self.service, self.metrics = app, service, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begin, status = time.perf_counter(), CLIENT_LEFT
        request_id = scope["request_id"] = choose_id(scope)

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self.answer(scope, receive, send_with_id)
        except Exception:
            log.exception("%s failed", request_id)
            if status == CLIENT_LEFT:  # no answer has begun
                failed = error_response(500, "internal error", request_id)
                await failed(scope, receive, send_with_id)
        finally:
            seconds = time.perf_counter() - begin
            route = scope.get("route")
            self.metrics.count(getattr(route, "path_format", "other"), status, seconds)
            path = one_line(scope["path"])
            log.info("%s %s %s %d %.1f ms", request_id, scope["method"], path, status, 1000 * seconds)

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if self.service.stopping and scope["path"] != "/health":
                raise Refused(503, "the server is stopping: try again", CLOSE)
            if scope["method"] == "POST":  # all of them call the model
                self.service.line.check()
            message = await read_body(scope, receive)
            if message is not None:
                await self.app(scope, replay(message, receive), send)
        except Refused as refused:
            failed = error_response(refused.status, refused.text, scope["request_id"], refused.headers)
            await failed(scope, receive, send)


def choose_id(scope: Scope) -> str:
    """That of the client where it is short and printable, else a new one"""
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return given.decode() if re.fullmatch(rb"[!-~]{1,64}", given) else secrets.token_hex(8)


def too_large() -> Refused:
    return Refused(413, f"the body has more than {MOST_BYTES:,} bytes", CLOSE)


async def read_body(scope: Scope, receive: Receive) -> Message | None:
    """The whole body as one message; None if the client has left. Raises Refused if it is too large or
    slow."""
    if any(name == b"content-length" and int(value) > MOST_BYTES for name, value in scope["headers"]):
        raise too_large()
    parts, size, more = [], 0, True
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > MOST_BYTES:
                    raise too_large()
                more = message.get("more_body", False)
    except TimeoutError:
        raise Refused(408, f"the body did not arrive within {BODY_SECONDS:g} s", CLOSE) from None
    return {"type": "http.request", "body": b"".join(parts), "more_body": False}


def replay(message: Message, receive: Receive) -> Receive:
    """A `receive` that gives the message first"""
    waiting = [message]

    async def once_more() -> Message:
        return waiting.pop() if waiting else await receive()

    return once_more
