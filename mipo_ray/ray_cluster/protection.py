"""Who may command a local Ray cluster: whoever has its token, and nobody else on this machine can read it.

Whoever may talk to Ray's processes runs code here. By themselves they listen on all interfaces of the machine; here
they listen on loopback, which leaves the machine's other users. What keeps those out is a token, which Ray asks for
unless RAY_AUTH_MODE says otherwise, in a file of the user's.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from mipo_ray.ray_cluster.resources import ResourceError

ALLOWED = "MIPO_RAY_WITHOUT_AUTHENTICATION"


def protect_local_cluster(environment: Mapping[str, str] = os.environ) -> None:
    """To be called before a local cluster is started: refuses one without authentication, and keeps the token private.

    Raises ResourceError where the environment turns authentication off and does not say that this is meant.
    """
    mode = environment.get("RAY_AUTH_MODE", "token")
    if mode.lower() != "token":
        if environment.get(ALLOWED) != "1":
            raise ResourceError(
                f"RAY_AUTH_MODE={mode}: expected token (or none) for a cluster of this machine: whoever "
                f"reaches its processes could run programs here. {ALLOWED}=1 starts it all the same"
            )
        return
    if not environment.get("RAY_AUTH_TOKEN"):
        _keep_private(Path(environment.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token"))


@contextlib.contextmanager
def on_loopback(is_local: bool) -> Iterator[None]:
    """While the block starts a local cluster, or joins one on loopback, Ray takes the machine for part of no network.

    That is what it does by itself on macOS and Windows: the node's address is 127.0.0.1, and every process of it binds
    to that. `_node_ip_address="127.0.0.1"` of `ray.init` would be replaced by an address of the network.
    """
    from ray._private import ray_constants

    if not is_local:
        yield
        return
    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    before = os.environ.get(name), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before[1]
        if before[0] is None:
            del os.environ[name]
        else:
            os.environ[name] = before[0]


def is_on_loopback(address: str) -> bool:
    """Whether a cluster to be joined listens on this machine's loopback alone, as those do that a command started.

    Ray would look for it at the machine's address in its network, and for ever.
    """
    from ray._private.services import get_node_ip_address

    host, _, port = address.rpartition(":")
    if host not in ("127.0.0.1", "localhost") or not port.isdigit():
        return False
    return _answers("127.0.0.1", int(port)) and not _answers(get_node_ip_address(), int(port))


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except (OSError, OverflowError):  # no such port
        return False
    return True


def _keep_private(file: Path) -> None:
    """The token's file for its owner alone; makes one where there is none, as Ray would for all to read."""
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        if not file.exists():
            raise ResourceError(f"{file}: expected the token of Ray's cluster, found a link to nothing") from None
        mode = file.stat().st_mode
        if file.stat().st_uid == os.geteuid() and mode & (stat.S_IRWXG | stat.S_IRWXO):
            file.chmod(stat.S_IMODE(mode) & ~(stat.S_IRWXG | stat.S_IRWXO))
    except OSError as error:
        raise ResourceError(f"{file}: the token of Ray's cluster cannot be written: {error}") from None
    else:
        with os.fdopen(descriptor, "w") as token:
            token.write(secrets.token_hex(32))
