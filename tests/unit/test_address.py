"""A server listens on a host of either family, and its URL is one that a client can use."""

import re
import socket
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler

import pytest

from ratchet import address
from ratchet.errors import Refusal


def has_ipv6():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


HOSTS = {
    "127.0.0.1": r"http://127\.0\.0\.1:\d+",
    "0.0.0.0": r"http://0\.0\.0\.0:\d+",
    "::1": r"http://\[::1\]:\d+",
    "::": r"http://\[::\]:\d+",
}


class Hello(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(204)
        self.end_headers()

    def log_message(self, *arguments): ...


def answer_one(listener):
    connection, where = listener.accept()
    with connection:
        Hello(connection, where, None)


@pytest.mark.parametrize("host", HOSTS)
def test_what_listens_is_reached_by_its_url(host):
    if ":" in host and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    with address.listen(host, 0) as listener:
        url = address.url(listener)
        assert re.fullmatch(HOSTS[host], url)
        threading.Thread(target=answer_one, args=(listener,), daemon=True).start()
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=10) as response:
            assert response.status == 204


def test_one_that_listens_on_all_interfaces_is_called_as_others_reach_it():
    with address.listen("0.0.0.0", 0) as listener:
        port = listener.getsockname()[1]
        assert address.url(listener, everywhere="node7") == f"http://node7:{port}"
    with address.listen("127.0.0.1", 0) as listener:
        assert address.url(listener, everywhere="node7").startswith("http://127.0.0.1:")


@pytest.mark.parametrize("host", ["192.0.2.1", "a..b", "[::1]", "2001:db8::1", "x" * 300])
def test_a_host_that_cannot_be_served_on_is_refused_by_name(host):
    with pytest.raises(
        Refusal, match=r"cannot be served on \(.+\): name an address of .* --inference\.host"
    ) as found:
        address.listen(host, 0)
    assert host in str(found.value)


def test_a_port_that_is_taken_is_refused_with_another_remedy():
    with address.listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(Refusal, match=rf"127\.0\.0\.1:{port} cannot be served on .*--inference\.port, 0"):
            address.listen("127.0.0.1", port)
