"""Scripts and ranks in processes of their own, for tests: forked from one that has imported everything once."""

import atexit
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from subprocess import PIPE, CompletedProcess
from types import ModuleType
from typing import Any

TESTS = Path(__file__).parent
_ENVIRONMENT = {"PYTHONPATH": f"{TESTS.parent / 'src'}:{TESTS.parent}", "OMP_NUM_THREADS": "1"}
_IMPORTED = ("lightning_convnext_det.cli.trainer",)  # and with it torch, Lightning, timm and nearly all of the package


def run_script(text: str, *arguments: object, timeout: float = 600.0, **variables: str) -> CompletedProcess[str]:
    """Run a script in a process of its own, which can import this package and the tests.

    It is forked from a process that has imported torch, Lightning and the package and has done nothing else, so that
    only the first script waits for these imports.

    Args:
        text: the script.
        arguments: its ``sys.argv[1:]``.
        timeout: seconds after which it is killed.
        variables: of its environment, beside this process's own.
    """
    server = _start_server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        printed = [Path(folder, name) for name in ("stdout", "stderr")]
        request = {
            "text": text,
            "arguments": [str(argument) for argument in arguments],
            "timeout": timeout,
            "environment": {**os.environ, **_ENVIRONMENT, **variables},
            "folder": os.getcwd(),
            "printed": [str(path) for path in printed],
        }
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        return CompletedProcess(["python", "-c", text], status, *(path.read_text() for path in printed))


@cache
def _start_server() -> subprocess.Popen[str]:
    script = "from tests.processes import serve; serve()"
    server = subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, **_ENVIRONMENT}, stdin=PIPE, stdout=PIPE, text=True
    )
    atexit.register(_stop, server, os.getpid())
    return server


def _stop(server: subprocess.Popen[str], owner: int) -> None:
    if os.getpid() == owner:  # not in what it has forked
        server.terminate()
        server.communicate()


def serve() -> None:
    """Fork a process for each script that a line of stdin asks for; answer with its exit status."""
    for name in _IMPORTED:
        importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            answers.close()
            _become_script(request)
            return  # the interpreter ends, as after a script
        signal.signal(signal.SIGALRM, lambda *_, child=child: os.kill(child, signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, request["timeout"])
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(f"{status}\n")
        answers.flush()


def _become_script(request: dict[str, Any]) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    files = [os.devnull, *request["printed"]]
    for descriptor, path in enumerate(files):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND if descriptor else os.O_RDONLY)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv = ["-c", *request["arguments"]]
    sys.modules["__main__"] = ModuleType("__main__")  # where pickle looks for what the script defines
    exec(compile(request["text"], "<script>", "exec"), sys.modules["__main__"].__dict__)


_ON_TWO_RANKS = """
import sys
from importlib import import_module
from pathlib import Path
from tests.processes import launch

module, function, log, *arguments = sys.argv[1:]
call = getattr(import_module(module), function)
sys.exit(any(launch(lambda rank, world_size: call(*arguments), 2, Path(log))))
"""


def run_on_two_ranks(function: Callable[..., object], log: Path, *arguments: object) -> str:
    """Call a function of a test module with texts on two ranks, as torchrun does it; return what they print."""
    run = run_script(_ON_TWO_RANKS, function.__module__, function.__name__, log, *arguments)
    printed = "".join(log.with_name(f"{log.name}.{rank}").read_text() for rank in (0, 1))
    assert run.returncode == 0, run.stderr + printed
    return printed


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
