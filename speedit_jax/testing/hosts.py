"""Several processes of one job on this machine."""

import socket


def hosts(count: int) -> list[dict[str, str]]:
    """What --multihost looks for in the environment of each of `count` processes on this machine."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    return [dict(zip(names, (address, str(count), str(host)), strict=True)) for host in range(count)]
