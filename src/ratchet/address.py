"""Where a server listens: a host of either family, and the URL of what listens there."""

import errno
import os
import socket

from ratchet.errors import Refusal

_EVERYWHERE = {"0.0.0.0", "::"}
_FOR_NUMERIC = socket.AI_PASSIVE | socket.AI_NUMERICSERV


def listen(host: str, port: int) -> socket.socket:
    """A listening socket of the host's family. Raises: Refusal"""
    try:
        family, _, _, _, bound = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=_FOR_NUMERIC)[
            0
        ]
        return socket.create_server(bound, family=family)
    except (OSError, UnicodeError) as error:  # a name with an empty or overlong part is not even looked up
        raise Refusal(_cannot(host, port, error)) from None


def _cannot(host: str, port: int, error: OSError | UnicodeError) -> str:
    if isinstance(error, UnicodeError):
        why = "no host can have this name"
    else:
        why = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
    if isinstance(error, OSError) and error.errno in (errno.EADDRINUSE, errno.EACCES):
        remedy = "choose another --inference.port, 0 for a free one, or stop what uses it"
    else:
        remedy = "name an address of this machine with --inference.host: 127.0.0.1, ::1, or 0.0.0.0 for all"
    return f"{_pair(host, port) if port else host} cannot be served on ({why}): {remedy}."


def url(listener: socket.socket, everywhere: str | None = None) -> str:
    """The URL of a listening socket; `everywhere` is what one is called that listens on all interfaces."""
    host, port = listener.getsockname()[:2]
    return f"http://{_pair(everywhere if everywhere and host in _EVERYWHERE else host, port)}"


def _pair(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
