"""Ports of this machine."""

import errno
import os
import socket

from alpaca.common.errors import UserError


def free_port(port: int = 0, host: str = "127.0.0.1") -> int:
    """`port` where nothing listens on it, any free one for 0. Raises UserError where it cannot be listened on."""
    if not 0 <= port < 65536:
        raise UserError(f"--port takes a whole number from 0 to 65535, found {port}.")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            fault = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be used: {os.strerror(error.errno)}"
            raise UserError(
                f"port {port} {fault}. Choose another with --port N; --port 0 takes any free one."
            ) from error
        return probe.getsockname()[1]
