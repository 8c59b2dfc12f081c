"""Look at a run while it trains: its report in the browser, with every new step, or its numbers in the terminal.

    python -m posttrain.watch runs/x [--port N] [--host ADDRESS --public] [--terminal]

The server only reads, and only below the run directory. Whoever asks must know the token that is in the address which is
printed at the start; it is new each time, or what POSTTRAIN_WATCH_TOKEN says. Without --public it listens to this machine
alone; from elsewhere, `ssh -L 8420:127.0.0.1:8420 machine` brings it to yours.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from eval.report_run import stage_directories

PORT = 8420
TOKEN_VARIABLE = "POSTTRAIN_WATCH_TOKEN"
SHORTEST_TOKEN = 16


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 for what cannot be watched."""
    parser = argparse.ArgumentParser(prog="python -m posttrain.watch", description="look at a run while it trains")
    parser.add_argument("run", type=Path, help="its run directory")
    parser.add_argument("--terminal", action="store_true", help="numbers in the terminal instead of a page")
    parser.add_argument("--once", action="store_true", help="with --terminal: show the present state and end")
    parser.add_argument("--port", type=int, default=PORT, help="default %(default)s; 0 takes a free one")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default %(default)s)")
    parser.add_argument("--public", action="store_true", help="allow a --host that other machines reach")
    options = parser.parse_args(argv)
    if options.once and not options.terminal:
        parser.error("--once has no meaning without --terminal")
    try:
        stage_directories(options.run)
        if options.terminal:
            from posttrain.watch_view import watch_terminal

            watch_terminal(options.run, once=options.once)
            return 0
        require_private(options.host, public=options.public)
        return serve(options.run, options.host, options.port, token_of(os.environ.get(TOKEN_VARIABLE)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0


def require_private(host: str, *, public: bool) -> None:
    """Refuse an address that other machines reach, unless the user wants that.

    Raises:
        ValueError: no loopback address, and not `public`.
    """
    if not is_loopback(host) and not public:
        raise ValueError(
            f"--host {host}: other machines reach this address, and the page is sent without encryption; leave --host out "
            f"and use an SSH tunnel, or add --public"
        )


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def token_of(given: str | None) -> str:
    """The token of the environment, or a new one.

    Raises:
        ValueError: the one given is easily guessed.
    """
    if given is None:
        return secrets.token_urlsafe(24)
    if len(given) < SHORTEST_TOKEN or not given.isascii() or not given.replace("-", "").replace("_", "").isalnum():
        raise ValueError(f"{TOKEN_VARIABLE}: give {SHORTEST_TOKEN} or more letters, digits, - and _")
    return given


def serve(run_dir: Path, host: str, port: int, token: str) -> int:
    """Serve until Ctrl-C."""
    from posttrain.watch_server import WatchServer

    with WatchServer(run_dir, token, host, port) as server:
        print(f"watching {run_dir.resolve()}\nopen {server.address}  (Ctrl-C ends)", flush=True)
        server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
