"""Meet before JAX does: all processes say who they are to process 0, or the missing ones are named.

`jax.distributed` ends a process with a stack trace where another one did not start. Here process 0 listens
on the coordinator's port before the coordinator does, each other process tells it its facts (one JSON line),
and all get the list of everybody's facts back, or the names of those who did not come.
"""

import json
import socket
import time

from sfd_jax.errors import SfdError


def meet(address: str, count: int, index: int, facts: dict, timeout: float) -> list[dict]:
    """Exchange facts among the processes of a job.

    Args:
      address: "host:port" of the coordinator.
      count: processes in the job.
      index: this one.
      facts: JSON-able; what the others shall know of this process.
      timeout: seconds to wait for all.

    Returns:
      The facts of all processes, by index.

    Raises:
      SfdError: processes are missing (each is named), two claim one index, or process 0 cannot be reached.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise SfdError(f"coordinator address '{address}' is not host:port")
    deadline = time.monotonic() + timeout
    if index == 0:
        return _receive(int(port), count, facts, deadline, timeout)
    return _report(host.strip("[]"), int(port), index, facts, deadline, timeout)


def _receive(port: int, count: int, facts: dict, deadline: float, timeout: float) -> list[dict]:
    known, guests, fault = {0: facts}, [], None
    try:
        with socket.create_server(("", port)) as server:
            while len(known) < count and not fault:
                server.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    guest, _ = server.accept()
                    guests.append(guest)
                    guest.settimeout(max(0.01, deadline - time.monotonic()))
                    hello = json.loads(guest.makefile().readline())
                except TimeoutError:
                    missing = ", ".join(f"process {i}" for i in range(count) if i not in known)
                    came = ", ".join(f"{i} ({known[i].get('host')})" for i in sorted(known))
                    fault = f"{missing} did not start within {timeout:.0f} s; these did: {came}"
                    break
                except (ValueError, OSError):
                    continue  # a port scanner, or a process that died while it spoke
                if hello["index"] in known or not 0 < hello["index"] < count:
                    fault = f"process index {hello['index']} is taken twice or not below {count}"
                known[hello["index"]] = hello["facts"]
    except OSError as error:
        raise SfdError(f"cannot listen on the coordinator's port {port}: {error}") from error
    answer = json.dumps({"fault": fault, "facts": [known.get(i) for i in range(count)]}) + "\n"
    for guest in guests:
        try:
            guest.sendall(answer.encode())
            guest.close()
        except OSError:
            pass  # it has left; JAX will miss it
    if fault:
        raise SfdError(fault)
    return [known[i] for i in range(count)]


def _report(host: str, port: int, index: int, facts: dict, deadline: float, timeout: float) -> list[dict]:
    hello = json.dumps({"index": index, "facts": facts}) + "\n"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=left) as guest:
                guest.sendall(hello.encode())
                # Process 0 speaks only when its own time is up, which began a little later than ours.
                guest.settimeout(left + 30)
                answer = json.loads(guest.makefile().readline())
        except (OSError, ValueError):
            time.sleep(min(0.2, max(0.0, left)))  # it does not listen yet
            continue
        if answer["fault"]:
            raise SfdError(answer["fault"])
        return answer["facts"]
    raise SfdError(f"process 0 at {host}:{port} did not answer process {index} within {timeout:.0f} s; is it running?")
