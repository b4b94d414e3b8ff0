"""Runs several processes as one training would, for tests: forked from a script that has imported everything once."""

import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

TESTS = Path(__file__).parent


def run_script(text: str, *arguments: object, timeout: float = 600.0) -> subprocess.CompletedProcess[str]:
    """Run a script that can import this package and the tests."""
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent / 'src'}:{TESTS.parent}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", text, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def forget_peak() -> None:
    """Make this process's peak of memory what it has now."""
    Path("/proc/self/clear_refs").write_text("5")  # man 5 proc


def peak_megabytes() -> int:
    """Most memory that this process has had; the peak of ``getrusage`` is its parent's where that has had more."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) >> 10


def launch(target: Callable[[int, int], object], world_size: int, log: Path) -> list[int]:
    """Call ``target(rank, world_size)`` in as many forked processes; their exit statuses, negative for signals.

    The processes are set up as torchrun does it. What they print goes into ``log``. The caller must not have run a
    backward pass before: autograd does not outlive a fork.
    """
    port = str(free_port())
    children = []
    for rank in range(world_size):
        child = os.fork()
        if child == 0:
            _run(target, rank, world_size, port, log.with_name(f"{log.name}.{rank}"))
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _run(target: Callable[[int, int], object], rank: int, world_size: int, port: str, log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    names = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    values = (rank, rank, 0, world_size, world_size, "127.0.0.1", port)
    os.environ.update({name: str(value) for name, value in zip(names, values, strict=True)})
    os.environ["TORCHELASTIC_RUN_ID"] = "tests"  # Lightning takes the variables above for granted then
    status = 1
    try:
        target(rank, world_size)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        traceback.print_exc()
        status = getattr(error, "exit_status", 1)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
