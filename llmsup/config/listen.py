"""Addresses as people write them in `gateway.listen`: "127.0.0.1:8000", "[::1]:8000"."""

import ipaddress
import re

_LISTEN = re.compile(r"(?:\[(?P<v6>[^\[\]]+)\]|(?P<v4>[^:\[\]]+)):(?P<port>[0-9]{1,5})")


def parse_listen(text: str) -> tuple[str, int]:
    """The IP address and the port in `text`.

    Raises ValueError with what would be valid.
    """
    expected = 'expected an IP address and a port, such as "127.0.0.1:8000" or "[::1]:8000"'
    match = _LISTEN.fullmatch(text)
    if match is None:
        raise ValueError(expected)
    host, port = match["v6"] or match["v4"], int(match["port"])
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        raise ValueError(expected) from None
    if (address.version == 6) != (match["v6"] is not None) or "%" in host:
        raise ValueError(expected)
    if not 1 <= port <= 65535:
        raise ValueError(f"{expected}: ports are 1 to 65535")
    return str(address), port


def is_loopback(host: str) -> bool:
    """Whether the IP address `host` can be reached from this machine only."""
    return ipaddress.ip_address(host).is_loopback
