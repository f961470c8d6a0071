"""Meet before JAX does: all processes say who they are to process 0, or the missing ones are named.

`jax.distributed` ends a process with a stack trace where another one did not start. Here process 0 listens
on the coordinator's port before the coordinator does, each other process tells it its facts (one JSON line),
and all get the list of everybody's facts back, or the names of those who did not come.
"""

import json
import socket
import time

from sfd_jax.errors import SfdError, TryAgain

# A guest that connects and says nothing (a port scanner, a stopped process) keeps the others waiting this long.
_PATIENCE = 10.0


def meet(address: str, count: int, index: int, facts: dict, timeout: float) -> list[dict]:
    """Exchange facts among the processes of a job.

    Args:
      address: "host:port" of the coordinator.
      count: processes in the job.
      index: this one.
      facts: JSON-able; what the others shall know of this process.
      timeout: seconds to wait for all.

    Returns:
      The facts of all processes, by index, each with `clock`: by how many seconds its clock was ahead of
      process 0's.

    Raises:
      TryAgain: processes are missing (each is named), or process 0 cannot be reached.
      SfdError: the address is none, or two processes claim one index.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise SfdError(f"coordinator address '{address}' is not host:port")
    deadline = time.monotonic() + timeout
    if index == 0:
        return _receive(int(port), count, facts, deadline, timeout)
    return _report(host.strip("[]"), int(port), index, facts, deadline, timeout)


def _receive(port: int, count: int, facts: dict, deadline: float, timeout: float) -> list[dict]:
    known, guests, fault, missing = {0: {**facts, "clock": 0.0}}, [], None, False
    try:
        with socket.create_server(("", port)) as server:
            while len(known) < count and not fault:
                server.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    guest, _ = server.accept()
                except TimeoutError:
                    absent = ", ".join(f"process {i}" for i in range(count) if i not in known)
                    came = ", ".join(f"{i} ({known[i].get('host')})" for i in sorted(known))
                    fault, missing = f"{absent} did not start within {timeout:.0f} s; these did: {came}", True
                    break
                try:
                    guest.settimeout(max(0.01, min(_PATIENCE, deadline - time.monotonic())))
                    hello = json.loads(guest.makefile().readline())
                    index, clock = hello["index"], hello["time"] - time.time()
                    taken = index in known or not 0 < index < count
                    known[index] = {**hello["facts"], "clock": clock}
                except (ValueError, OSError, LookupError, TypeError):
                    guest.close()
                    continue  # a port scanner, or a process that died while it spoke
                guests.append(guest)
                if taken:
                    fault = f"process index {index} is taken twice or not below {count}"
    except OSError as error:
        raise SfdError(f"cannot listen on the coordinator's port {port}: {error}") from error
    answer = {"fault": fault, "missing": missing, "facts": [known.get(i) for i in range(count)]}
    for guest in guests:
        try:
            guest.sendall((json.dumps(answer) + "\n").encode())
            guest.close()
        except OSError:
            pass  # it has left; JAX will miss it
    return _read(answer)


def _report(host: str, port: int, index: int, facts: dict, deadline: float, timeout: float) -> list[dict]:
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=left) as guest:
                hello = {"index": index, "time": time.time(), "facts": facts}
                guest.sendall((json.dumps(hello) + "\n").encode())
                # Process 0 speaks only when its own time is up, which began a little later than ours.
                guest.settimeout(left + 30)
                answer = json.loads(guest.makefile().readline())
        except (OSError, ValueError):
            time.sleep(min(0.2, max(0.0, left)))  # it does not listen yet
            continue
        return _read(answer)
    raise TryAgain(f"process 0 at {host}:{port} did not answer process {index} within {timeout:.0f} s; is it running?")


def _read(answer: dict) -> list[dict]:
    if answer["fault"]:
        raise (TryAgain if answer["missing"] else SfdError)(answer["fault"])
    return answer["facts"]
