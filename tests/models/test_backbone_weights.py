import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from lightning_convnext_det.data.synthetic import write_synthetic_coco
from lightning_convnext_det.errors import WeightsError
from lightning_convnext_det.models import backbone_weights
from lightning_convnext_det.models.backbone_weights import fetching


@pytest.fixture(autouse=True)
def _empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=16) as server:
        yield server


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[BaseHTTPRequestHandler]]:
    """A hub that answers every request with ``status`` and counts them."""

    class Hub(BaseHTTPRequestHandler):
        status = 200
        requests = 0

        def do_HEAD(self) -> None:
            Hub.requests += 1
            self.send_response(Hub.status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield Hub
        server.shutdown()
        thread.join()


def fetch(name: str = "convnext_tiny") -> bool:
    with fetching(name):
        return True


def test_fetching__asks_a_hub_that_answers_once(hub: type) -> None:
    assert fetch()
    assert hub.requests == 1


def test_fetching__an_overloaded_hub_is_not_asked_again(hub: type) -> None:
    hub.status = 503
    with pytest.raises(WeightsError, match=r"LCD-W001.*'convnext_tiny'.*\(status 503\).*switch pretrained weights off"):
        fetch()
    assert hub.requests == 1


@pytest.mark.parametrize("name", ["convnext_tiny", "legacy_senet154"], ids=["hub", "address"])
def test_fetching__a_lookup_without_an_answer_is_not_waited_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # a resolver whose packets are lost waits 5 seconds, twice, for each name server
    ends = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: ends.wait(60) or [])
    monkeypatch.setattr(backbone_weights, "_PATIENCE", 0.2)
    try:
        with pytest.raises(WeightsError, match=rf"LCD-W001.*'{name}'.*no answer within 0.2 seconds"):
            fetch(name)
    finally:
        ends.set()


def test_fetching__a_failure_on_the_way_is_one_line(hub: type) -> None:
    with pytest.raises(WeightsError, match=r"LCD-W001.*'convnext_tiny'.*No space left"), fetching("convnext_tiny"):
        raise OSError(28, "No space left on device")


def children_seconds() -> float:
    """Seconds of the processor that child processes have used so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.heavy
def test_fit__waits_for_a_silent_network_once_and_idle(silent: socket.socket, tmp_path: Path) -> None:
    write_synthetic_coco(tmp_path / "data", 2, 2)
    command = [sys.executable, "-m", "lightning_convnext_det", "fit", "--data.root", str(tmp_path / "data")]
    environment = {
        "PYTHONPATH": str(Path(backbone_weights.__file__).parents[2]),
        "HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}",
        "HF_HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }

    def fit(offline: str) -> tuple[subprocess.CompletedProcess[str], float]:
        before = children_seconds()
        result = subprocess.run(
            [*command, "--model.backbone=convnext_tiny", "--model.pretrained_backbone=true"],
            env={**environment, "HF_HUB_OFFLINE": offline},
            capture_output=True,
            text=True,
            check=False,
        )
        return result, children_seconds() - before

    _, without_asking = fit(offline="1")
    result, asking = fit(offline="0")
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert (result.returncode, len(lines)) == (5, 1), result.stderr
    assert "[LCD-W001] the weights of 'convnext_tiny'" in lines[0]
    assert "run once where there is a network, give a local file as backbone weights, or switch" in lines[0]
    # all that the network adds is the wait: others may use this machine as well, so no clock is asked
    assert asking < 1.5 * without_asking
    assert backbone_weights._PATIENCE <= 5
    silent.setblocking(False)
    silent.accept()[0].close()
    with pytest.raises(BlockingIOError):  # it was asked once
        silent.accept()
