"""The command ``serve-reward``, which serves a reward to runs elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from branchtree.cli.arguments import parse_overrides
from branchtree.cli.console import make_console

if TYPE_CHECKING:
    from branchtree.serving.service import NamedAdapter


def serve_reward(
    reward: Annotated[str, typer.Argument(help="A reward's name.")],
    options: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="The reward's options, as in batch=8.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen at; 0 takes a free one.")] = 8765,
    host: Annotated[str, typer.Option(help="The address to listen at; any but this machine's own needs a token.")] = (
        "127.0.0.1"
    ),
    token_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="The environment variable with the token that clients must show.")
    ] = None,
    max_body: Annotated[int, typer.Option(metavar="MIB", min=1, help="The largest request, in MiB.")] = 256,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is one.")] = "auto",
) -> None:
    """Serve a reward over HTTP, for the `remote` reward of runs on this machine or others."""
    from branchtree.planning.devices import named_device
    from branchtree.serving.access import read_token
    from branchtree.serving.server import RewardServer, bind, require_packages
    from branchtree.serving.service import Service
    from branchtree.serving.wire import MEBIBYTE, Info

    require_packages()
    token = read_token(token_env)
    service = Service(make_adapter(reward, options or []), named_device(device), max_body * MEBIBYTE)
    server = RewardServer(service, bind(host, port, token), token)

    def announce(info: Info) -> None:
        identified = f"fingerprint {info.fingerprint[:12]}" if info.fingerprint else "no fingerprint"
        make_console(soft_wrap=True).print(f"Serving {reward} at {server.url} ({identified})")

    server.run(announce)


def make_adapter(name: str, words: list[str]) -> NamedAdapter:
    """Return a reward, not yet loaded, with options given as ``key=value``. Raises PluginError or RecipeError."""
    from branchtree.recipe.build import make_reward
    from branchtree.serving.service import NamedAdapter

    adapter, config = make_reward(name, parse_overrides(words), (name,))
    return NamedAdapter(name, config.model_dump(mode="json"), adapter)
