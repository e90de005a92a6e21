"""The steps of a sweep on a Ray cluster. Knows Ray; not what steps are about.

Every machine has this package with the same libraries, and sees the sweep's folder and the checkpoints under
the same paths (a shared file system): each step checks both before it works. A step asks Ray for the
processors and the memory that it needs; the machine that drives the sweep keeps all results, so that a worker
or a whole machine may be lost at any time, and what it was doing is done again elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from benchmarks.common.machine import versions
from benchmarks.sweep.plan import Step
from benchmarks.sweep.step import do_elsewhere, with_threads
from fox_edge.errors import FoxEdgeError, MissingPackageError
from fox_edge.processors import available_cores

_ANSWER_S = 10  # that a cluster has to answer
_STORE_BYTES = 256 << 20  # results are small
# How HTTP/2 begins, on which gRPC stands: both sides send a frame of settings (RFC 9113, 3.4 and 6.5).
_SETTINGS = b"\x04"
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + _SETTINGS + bytes(5)
_FRAME_BYTES, _TYPE_AT = 9, 3
_ADDRESS = re.compile(r"(?:ray://)?(?P<host>\[[0-9A-Fa-f:]+\]|[A-Za-z0-9_.-]+):(?P<port>[0-9]{1,5})")


class RayPool:
    """The machines of a cluster. Raises FoxEdgeError when there is none at this address."""

    def __init__(self, address: str, folder: Path, threads: int | None) -> None:
        try:
            import ray
        except ImportError:
            raise MissingPackageError("ray", "ray") from None
        self._ray = ray
        _connect(ray, address)
        self._sight = folder.absolute() / f".seen-{secrets.token_hex(8)}"
        try:
            self._sight.touch()
            smallest = min(node["CPU"] for node in self._nodes())
            self.threads = min(threads or int(smallest), int(max(node["CPU"] for node in self._nodes())))
        except OSError as error:
            ray.shutdown()
            raise FoxEdgeError(f"{folder}: cannot be written ({error.strerror})") from None
        except BaseException:
            self.close()
            raise
        self._do = ray.remote(do_elsewhere)
        self._versions = versions()

    def _nodes(self) -> list[dict[str, float]]:
        """What each living machine that works has; raises FoxEdgeError when there is none."""
        alive = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        able = [node for node in alive if node.get("CPU", 0) >= 1]
        if not able:
            raise FoxEdgeError(f"the Ray cluster has {len(alive)} machines, and none with a processor to use")
        return able

    def fits(self, step: Step) -> bool:
        """Ray keeps what does not fit yet."""
        return True

    def start(self, step: Step) -> Future[dict[str, Any]]:
        """Give it to Ray; what asks for more memory than any machine has gets all of one."""
        most = max(node.get("memory", 0) for node in self._nodes())
        task = self._do.options(
            name=step.label,
            num_cpus=self.threads,
            memory=int(min(step.memory_bytes, most)) or None,
            max_retries=0,  # the sweep does it again, and counts
            scheduling_strategy="SPREAD",
        )
        job = with_threads(step.job, self.threads)
        future: Future[dict[str, Any]] = task.remote(job, str(self._sight), self._versions).future()
        return future

    def lost(self, error: BaseException) -> str | None:
        """Whether the machine or the worker is gone: anything that Ray says but a task's own mistake."""
        exceptions = self._ray.exceptions
        if isinstance(error, exceptions.RayTaskError) or not isinstance(error, exceptions.RayError):
            return None
        return f"its worker was lost ({type(error).__name__})"

    def check(self) -> None:
        """Raise FoxEdgeError when the machines that are left are too small for a step."""
        if all(node["CPU"] < self.threads for node in self._nodes()):
            raise FoxEdgeError(f"no machine with {self.threads} processors is left in the Ray cluster")

    def close(self) -> None:
        """Leave the cluster: what still runs there ends."""
        with contextlib.suppress(OSError):
            self._sight.unlink(missing_ok=True)
        self._ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    """Join a cluster: 'auto' the one that runs on this machine, 'local' a new one, else HOST:PORT."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    own: dict[str, Any] = {}
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or address  # Ray's own word for a cluster elsewhere
    if address == "local":
        own = {"num_cpus": available_cores(), "object_store_memory": _STORE_BYTES, "include_dashboard": False}
    elif address != "auto":
        _knock(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **own)
    # Ray reports a failed start in many classes; the user needs the one line.
    except (ConnectionError, OSError, RuntimeError, ValueError, AssertionError, TimeoutError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise FoxEdgeError(f"no Ray cluster answers at '{address}' ({reason})") from None


def _knock(address: str) -> None:
    """Raise FoxEdgeError, soon, when nobody there speaks gRPC: Ray itself would wait for minutes."""
    found = _ADDRESS.fullmatch(address)
    if found is None:
        raise FoxEdgeError(f"'{address}' is no Ray cluster's address; say auto, local, or HOST:PORT")
    try:
        with socket.create_connection((found["host"].strip("[]"), int(found["port"])), _ANSWER_S) as door:
            if os.environ.get("RAY_USE_TLS", "0") == "0":
                door.sendall(_HELLO)
                if door.recv(_FRAME_BYTES)[_TYPE_AT : _TYPE_AT + 1] != _SETTINGS:
                    raise OSError("what listens there is no Ray cluster")
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FoxEdgeError(f"no Ray cluster answers at '{address}' ({reason})") from None
