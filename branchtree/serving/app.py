"""The server's endpoints: /health, /info and /score. A refused request is answered with a reason of one line."""

# No deferred annotations here: FastAPI reads them, and could not find names that are imported inside a function.
import asyncio
from typing import TYPE_CHECKING

from branchtree.errors import RewardError
from branchtree.serving.access import admits
from branchtree.serving.service import Service
from branchtree.serving.wire import CONTENT_TYPE, EXPECTS, MEBIBYTE, Info, WireError

if TYPE_CHECKING:
    from fastapi import FastAPI, Request

SHOWN = 500  # the most characters of a reward's error
GONE = 499  # the status of an answer whose client is gone


def make_app(service: Service, token: str | None) -> "FastAPI":
    """Return the application that serves ``service`` to clients with the token, or to all where there is none."""
    from fastapi import Depends, FastAPI, HTTPException, Request, Response
    from starlette.requests import ClientDisconnect

    app = FastAPI(title="branchtree reward", docs_url=None, redoc_url=None, openapi_url=None)
    turn = asyncio.Lock()  # first come, first served

    async def admitted(request: Request) -> None:
        if not admits(token, request.headers.get("authorization")):
            raise HTTPException(401, "the token is missing or wrong; show it as 'Authorization: Bearer TOKEN'")

    async def loaded() -> Info:
        if service.info is None:
            raise HTTPException(503, "the reward is being loaded; come again")
        return service.info

    @app.get("/health")
    async def health(response: Response) -> dict[str, str]:
        response.status_code = 503 if service.info is None else 200
        return {"status": "loading" if service.info is None else "ready"}

    @app.get("/info", dependencies=[Depends(admitted)])
    async def info(found: Info = Depends(loaded)) -> Info:  # noqa: B008 (FastAPI's way to ask for it)
        return found

    @app.post("/score", dependencies=[Depends(admitted)])
    async def score(request: Request, found: Info = Depends(loaded)) -> Response:  # noqa: B008
        if request.headers.get(EXPECTS, found.identity) != found.identity:
            raise HTTPException(
                409,
                "this server now serves another reward, checkpoint or version than the client began with: "
                f"'{found.reward}' with fingerprint {found.fingerprint}, branchtree {found.version}",
            )
        try:
            body = await _read(request, service.max_body)
        except ClientDisconnect:
            return Response(status_code=GONE)
        async with turn:
            if await request.is_disconnected():  # the client has stopped waiting
                return Response(status_code=GONE)
            try:
                return Response(await service.score(body), media_type=CONTENT_TYPE)
            except WireError as error:
                raise HTTPException(400, str(error)) from None
            except Exception as error:  # the server survives any error of a reward
                reason = str(error) if isinstance(error, RewardError) else f"{type(error).__name__}: {error}"
                raise HTTPException(500, " ".join(reason.split())[:SHOWN]) from None

    return app


async def _read(request: "Request", limit: int) -> bytes:
    """Return the body of a request of at most ``limit`` bytes. Raises HTTPException."""
    from fastapi import HTTPException

    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    if kind != CONTENT_TYPE:
        raise HTTPException(415, f"the content type must be {CONTENT_TYPE}, not '{kind}'")
    too_large = HTTPException(
        413, f"the body is larger than {limit / MEBIBYTE:g} MiB; send fewer samples, or start with a larger --max-body"
    )
    stated = request.headers.get("content-length", "0")
    if not stated.isdecimal() or int(stated) > limit:
        raise too_large
    pieces, size = [], 0
    async for piece in request.stream():
        pieces.append(piece)
        size += len(piece)
        if size > limit:
            raise too_large
    return b"".join(pieces)
