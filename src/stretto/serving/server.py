"""Runs the server: uvicorn around the app; drain on SIGTERM; an exit code that says whether the engine lived."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import Callable

from stretto.errors import InputError, MissingExtraError
from stretto.serving.service import Service, Settings

__all__ = ["DEAD", "serve"]

DEAD = 70  # exit code when the engine died and nobody started it again (EX_SOFTWARE)


def serve(settings: Settings, host: str, port: int, *, started: Callable[[str], None] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; the exit code: 0, or ``DEAD``. ``started`` gets the address once it answers.

    Raises EngineError when the model cannot be loaded, InputError when the address cannot be used.
    """
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise MissingExtraError("fastapi with uvicorn", "serve") from None
    return asyncio.run(_serve(settings, host, port, started))


async def _serve(settings: Settings, host: str, port: int, started: Callable[[str], None] | None) -> int:
    import uvicorn

    from stretto.serving.app import create_app

    sock = _bind(host, port)
    service = Service(settings)
    try:
        await service.start()
    except BaseException:
        sock.close()
        await service.close()
        raise
    app = create_app(service)
    app.state.service = service
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="on", timeout_graceful_shutdown=2, server_header=False
    )
    server = uvicorn.Server(config)
    running = asyncio.create_task(server._serve(sockets=[sock]))
    ender = asyncio.create_task(_end(service, server))
    if started is not None:
        while not server.started and not running.done():
            await asyncio.sleep(0.01)
        shown = f"[{host}]" if ":" in host else host
        started(f"http://{shown}:{sock.getsockname()[1]}")
    await running
    ender.cancel()
    return DEAD if service.link.lost.is_set() else 0


async def _end(service: Service, server: object) -> None:
    """On a signal: drain, then stop; a second one stops at once. A lost engine: say so for a while, then stop.
    """
    loop, asked = asyncio.get_running_loop(), asyncio.Event()

    def ask() -> None:
        if asked.is_set():
            server.should_exit = server.force_exit = True  # type: ignore[attr-defined]
        asked.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ask)
    lost = asyncio.create_task(service.link.lost.wait())
    wanted = asyncio.create_task(asked.wait())
    await asyncio.wait([lost, wanted], return_when=asyncio.FIRST_COMPLETED)
    if lost.done():
        print(f"stretto: {service.link.reason}; the server ends", file=sys.stderr, flush=True)
        await asyncio.sleep(service.settings.linger)
    else:
        await service.drain()
    server.should_exit = True  # type: ignore[attr-defined]


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        raise InputError(f"cannot listen on {host}:{port}: {error}; choose another --host or --port") from None
    return sock


