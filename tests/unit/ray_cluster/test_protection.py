"""Who may command a local cluster: the token's file, and a mode without one.

python -m pytest tests/unit/ray_cluster/test_protection.py
"""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from mipo_ray.ray_cluster.protection import ALLOWED, is_on_loopback, protect_local_cluster
from mipo_ray.ray_cluster.resources import ResourceError


def _mode(file: Path) -> int:
    return file.stat().st_mode & 0o777


@pytest.mark.parametrize("mode", ["disabled", "k8s", "", "Disabled"])
def test_a_cluster_without_a_token_is_refused_unless_it_is_meant(mode: str) -> None:
    with pytest.raises(ResourceError, match=rf"^RAY_AUTH_MODE={mode}: expected token .*{ALLOWED}=1"):
        protect_local_cluster({"RAY_AUTH_MODE": mode})
    protect_local_cluster({"RAY_AUTH_MODE": mode, ALLOWED: "1"})


@pytest.mark.parametrize("environment", [{}, {"RAY_AUTH_MODE": "token"}, {"RAY_AUTH_MODE": "Token"}])
def test_the_token_is_for_its_owner_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    protect_local_cluster(environment)
    file = tmp_path / ".ray" / "auth_token"
    assert _mode(file) == 0o600
    token = file.read_text()
    assert len(token) == 64
    file.chmod(0o644)
    protect_local_cluster(environment)
    assert (_mode(file), file.read_text()) == (0o600, token)


def test_a_token_elsewhere_is_kept_private_too_and_one_in_the_environment_needs_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    elsewhere = tmp_path / "token"
    elsewhere.write_text("secret")
    elsewhere.chmod(0o664)
    protect_local_cluster({"RAY_AUTH_TOKEN_PATH": str(elsewhere)})
    protect_local_cluster({"RAY_AUTH_TOKEN": "secret"})
    assert _mode(elsewhere) == 0o600
    assert not (tmp_path / "home").exists()


def test_a_link_in_place_of_the_token_is_not_written_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ResourceError, match="link to nothing"):
        protect_local_cluster({})
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(("host", "found"), [("127.0.0.1", True), ("0.0.0.0", False)])
def test_a_cluster_on_loopback_is_told_from_one_of_the_network(
    monkeypatch: pytest.MonkeyPatch, host: str, found: bool
) -> None:
    monkeypatch.setattr("ray._private.services.get_node_ip_address", lambda: "127.0.0.2")  # of the network
    with socket.create_server((host, 0)) as server:
        port = server.getsockname()[1]
        assert is_on_loopback(f"127.0.0.1:{port}") is found
        assert is_on_loopback(f"localhost:{port}") is found
        assert not is_on_loopback(f"192.0.2.1:{port}")
    assert not is_on_loopback(f"127.0.0.1:{port}")


@pytest.mark.parametrize(
    "address", ["auto", "ray://127.0.0.1:10001", "127.0.0.1", "127.0.0.1:99999", "127.0.0.1:", "", "localhost:x"]
)
def test_other_addresses_are_not_on_loopback(address: str) -> None:
    assert not is_on_loopback(address)
