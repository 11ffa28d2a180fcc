"""TCP ports for servers: whether they are free, before something long begins."""

from __future__ import annotations

import contextlib
import random
import socket

from trt_razor.errors import RazorError, UsageError


def check_ports(address: str, ports: dict[str, int]) -> None:
    """Ports by the name of their option: free, and different.

    Raises:
        UsageError: one is taken, twice the same, or the address is not this machine's.
    """
    seen: dict[int, str] = {}
    for name, port in ports.items():
        if not 0 < port < 65536:
            raise UsageError(f"{name} {port}: expected 1 .. 65535")
        if port in seen:
            raise UsageError(f"{name} {port}: {seen[port]} has the same; choose another")
        seen[port] = name
        try:
            _bind(address, port).close()
        except PermissionError:
            raise UsageError(
                f"{name} {port}: not allowed for this user; choose one >= 1024"
            ) from None
        except OSError as e:
            if _is_address(address):
                raise UsageError(
                    f"{name} {port}: taken by another program on {address}; choose another with {name}"
                ) from None
            raise UsageError(
                f"--address {address}: expected an address of this machine: {e.strerror or e}"
            ) from None


def free_ports(address: str, count: int) -> list[int]:
    """Ports that are free now, below those that outgoing connections take."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(20000, 32000), 2000):
        if len(found) == count:
            break
        with contextlib.suppress(OSError):
            _bind(address, port).close()
            found.append(port)
    if len(found) < count:
        raise RazorError(f"{address}: no free ports found between 20000 and 32000")
    return found


def _bind(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    s = socket.socket(family, socket.SOCK_STREAM)
    try:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # closed connections do not count
        s.bind((address, port))
    except BaseException:
        s.close()
        raise
    return s


def _is_address(address: str) -> bool:
    try:
        _bind(address, 0).close()
    except OSError:
        return False
    return True
