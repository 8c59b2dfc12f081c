"""Who can reach Ray. Whoever reaches a Ray that asks for no token runs code on its machines.

A Ray that a run starts itself listens on 127.0.0.1 alone and asks for a token. A cluster that it joins must do one of the two.
Ray's own token authentication (since 2.52) is what is used: `RAY_AUTH_MODE=token` on every node and for the run, the token in
`RAY_AUTH_TOKEN`, `RAY_AUTH_TOKEN_PATH` or `~/.ray/auth_token`. Imports no Ray.
"""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from posttrain.errors import RunStopped

MODE = "RAY_AUTH_MODE"
TOKEN = "RAY_AUTH_TOKEN"
TOKEN_PATH = "RAY_AUTH_TOKEN_PATH"
TOKEN_FILE = ".ray/auth_token"  # in the home directory
ALLOWED = "POSTTRAIN_ALLOW_OPEN_RAY"  # 1 joins a cluster without a token, on a network that nobody else is on
IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for what `ray job submit` runs
# Ray's own switch for desktops: its services then listen on 127.0.0.1 instead of every interface.
CLUSTER_SWITCH = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
# What the processes of a local Ray are told: where to listen, and over which interface gloo and NCCL talk.
LOOPBACK = {
    CLUSTER_SWITCH: "0",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "VLLM_HOST_IP": "127.0.0.1",
}


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches an address ("host:port", "ray://host:port", "auto", "local")."""
    if address in ("auto", "local"):
        return True
    host = urlsplit(address if "//" in address else f"//{address}").hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_closed(address: str | None, environment: Mapping[str, str], home: Path | None = None) -> None:
    """Refuse a Ray that others can reach without a token; inside a Ray job, or where the user says so, warn of it.

    Args:
        address: of the cluster to join; None starts a Ray here.
        environment: variables of the run.
        home: where the token's file is looked for; None is the user's.

    Raises:
        RunStopped: token authentication is off, or there is no token, where one is needed.
    """
    mode = environment.get(MODE, "").lower()
    if mode not in ("", "token", "disabled"):
        raise RunStopped(f"{MODE}={mode!r} is none of Ray's: set token")
    if address is None or is_loopback(address):
        return  # 127.0.0.1 alone
    if mode != "token" and (IN_A_JOB in environment or environment.get(ALLOWED) == "1"):
        # Whoever submitted a job reaches that cluster already, and a job that gave up would close nothing.
        print(
            f"warning: the Ray at {_without_user(address)} takes orders without a token; see SECURITY.md",
            file=sys.stderr,
        )
        return
    cure = (
        f"set {MODE}=token and the same token on every node before `ray start` (ray get-auth-token --generate makes one), "
        f"and both for this run; see SECURITY.md (on a network that nobody else is on, {ALLOWED}=1 joins it all the same)"
    )
    if mode != "token":
        raise RunStopped(
            f"the Ray at {_without_user(address)} is on an interface that other machines reach, and token authentication is "
            f"off: anybody there could run code; {cure}"
        )
    file = Path(environment.get(TOKEN_PATH) or (home or Path.home()) / TOKEN_FILE)
    if not environment.get(TOKEN) and not file.is_file():
        raise RunStopped(f"{MODE}=token, and there is no token in {TOKEN}, {TOKEN_PATH} or ~/{TOKEN_FILE}; {cure}")


def _without_user(address: str) -> str:
    return address.rpartition("@")[2]
