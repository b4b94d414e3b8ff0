"""Pretrained weights of timm networks: downloaded by timm, or read from local files."""

import argparse
import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast
from zipfile import BadZipFile

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import PretrainedCfg
from torch import Tensor, nn

from lightning_convnext_det.checkpoints.torch_files import load_plain
from lightning_convnext_det.errors import WeightsError, first_line

_logger = logging.getLogger(__name__)

_PATIENCE = 5.0  # seconds that the hub has to answer

# prefixes that training scripts and this package's own modules put before the names of a network
_PREFIXES = ("module.", "_orig_mod.", "model.", "detector.", "classifier.net.", "backbone.", "body.", "net.")


@contextmanager
def fetching(name: str) -> Iterator[None]:
    """Context around timm's download of the pretrained weights of ``name``, with one clear error instead of retries.

    Raises:
        WeightsError: at once if timm has no such weights; within seconds if the hub does not answer, where timm would
            retry for minutes; and if the download fails.
    """
    from huggingface_hub.errors import HfHubHTTPError

    # the hub's client is requests, httpx or a successor; not all of them raise OSErrors
    client_error = cast(type[Exception], HfHubHTTPError.__bases__[0])
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        tags = ", ".join(timm.list_pretrained(name.split(".")[0] + ".*")[:5]) or "none"
        raise WeightsError(f"[LCD-W002] timm has no pretrained weights for '{name}'; it has: {tags}")
    if reason := _missing_network(config):
        raise _unfetchable(name, reason)
    try:
        yield
    except (OSError, client_error) as error:
        raise _unfetchable(name, first_line(error)) from error


def _unfetchable(name: str, reason: str) -> WeightsError:
    from huggingface_hub import constants

    return WeightsError(
        f"[LCD-W001] the weights of '{name}' are not in the cache ({constants.HF_HUB_CACHE}) and cannot be fetched "
        f"({reason}): run once where there is a network, give a local file as backbone weights, or switch pretrained "
        "weights off"
    )


def _missing_network(config: PretrainedCfg) -> str | None:
    """Reason why weights cannot be downloaded; None if they are in the cache or the host answers."""
    from huggingface_hub import constants, try_to_load_from_cache

    if config.hf_hub_id:
        files = ["model.safetensors", "pytorch_model.bin", config.hf_hub_filename]
        address = constants.ENDPOINT
        is_cached = any(isinstance(try_to_load_from_cache(config.hf_hub_id, f), str) for f in files if f)
    else:  # a few old networks, which torch.hub fetches
        address = config.url
        is_cached = Path(torch.hub.get_dir(), "checkpoints", address.rpartition("/")[2]).is_file()
    if is_cached:
        return None
    return "offline mode is on" if constants.HF_HUB_OFFLINE else _silence(address)


def _silence(url: str) -> str | None:
    """Reason why a URL cannot be used; None if it answers."""
    from huggingface_hub import get_session

    reasons: list[str | None] = []

    def ask() -> None:
        try:
            status = get_session().head(url, timeout=_PATIENCE).status_code
            # what timm would ask again and again
            reasons.append(f"status {status}" if status == 429 or status >= 500 else None)
        except Exception as error:  # the hub's client may be requests or httpx, which share no base class
            reasons.append(first_line(error))

    # the client's timeout bounds neither the lookup of names nor the number of addresses that it tries
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    return reasons[0] if reasons else f"no answer within {_PATIENCE:g} seconds"


# licences of timm's weights that let anyone use them for anything, also commercially
_FREE = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0")


def has_pretrained(name: str) -> bool:
    """Whether timm has pretrained weights of a network, by its name with or without their tag."""
    config = timm.get_pretrained_cfg(name)
    return config is not None and config.has_weights


def find_licence(name: str) -> str | None:
    """The licence of timm's pretrained weights of a network; None where timm names none.

    >>> find_licence("convnext_tiny"), find_licence("convnextv2_atto")
    ('apache-2.0', 'cc-by-nc-4.0')
    """
    config = timm.get_pretrained_cfg(name)
    return None if config is None or config.license in (None, "unknown") else str(config.license)


def is_commercial(licence: str | None) -> bool:
    """Whether a licence is known to allow commercial use without conditions on it."""
    return licence in _FREE


def missing_weights(name: str) -> str | None:
    """Reason why the pretrained weights of a network cannot be had; None if they are in the cache or can be fetched."""
    config = timm.get_pretrained_cfg(name)
    return "timm has none" if config is None or not config.has_weights else _missing_network(config)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a ``.safetensors``, ``.pth``, ``.pt`` or ``.ckpt`` file without running code.

    A state dict may lie under ``state_dict``, ``model``, ``module``, ``model_ema`` or ``state_dict_ema``.

    Raises:
        WeightsError: if the file is missing, damaged, or holds anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"[LCD-W003] {path}: no such file; give a local .safetensors or .pth file")
    try:
        # timm's training script puts its options beside the tensors, in a Namespace, which is as plain as a dict
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = load_file(path) if path.suffix == ".safetensors" else load_plain(path)
    except (SafetensorError, BadZipFile, RuntimeError, EOFError, OSError, KeyError, ValueError, TypeError) as error:
        raise WeightsError(f"[LCD-W003] {path} cannot be read as weights: {first_line(error)}") from None
    except Exception as error:  # pickle.UnpicklingError and whatever a crafted pickle makes the reader raise
        raise WeightsError(f"[LCD-W003] {path} holds more than tensors and is refused: {first_line(error)}") from None
    for key in ("state_dict_ema", "model_ema", "state_dict", "model", "module"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not tensors:
        raise WeightsError(f"[LCD-W003] {path} holds no tensors")
    return tensors


def load_backbone_weights(net: nn.Module, path: str | Path, name: str) -> None:
    """Load a backbone from a file of that network, its classifier or a detector on it.

    The file may be a checkpoint of this package, a timm checkpoint, a plain state dict or safetensors. Names are
    compared with dots and underscores alike, because timm flattens ``stages.0`` to ``stages_0``. Heads in the file are
    ignored; every tensor of the network must be there with its shape, and the file must not have more blocks than the
    network.

    Raises:
        WeightsError: if the file cannot be read; or names the first tensor that is missing, unexpected or of another
            shape.
    """
    given = _by_flat_name(read_state_dict(path))
    _fill(net, given, list(net.state_dict()), path, name)


def load_classifier_weights(net: nn.Module, path: str | Path, name: str) -> None:
    """Load a classifier from a file, see `load_backbone_weights`; its last layer only if it has as many classes.

    Raises:
        WeightsError: if the file cannot be read or does not fit; the first misfit is named.
    """
    given, own = _by_flat_name(read_state_dict(path)), net.state_dict()
    last = [key for key in own if key.startswith(last_layer(net))]
    fits = all((found := given.get(flat_name(key))) is not None and found.shape == own[key].shape for key in last)
    _fill(net, given, [key for key in own if fits or key not in last], path, name)
    if not fits:
        _logger.info("%s: the last layer has other classes and starts from random weights", path)


def last_layer(net: nn.Module) -> tuple[str, ...]:
    """Prefixes of the parameters of a timm classifier's last layer."""
    config: dict[str, str | tuple[str, ...]] = vars(net)["pretrained_cfg"]
    heads = config.get("classifier") or ()
    return tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))


def _fill(net: nn.Module, given: dict[str, Tensor], wanted: list[str], path: str | Path, name: str) -> None:
    own = net.state_dict()
    for key in wanted:
        found, tensor = given.get(flat_name(key)), own[key]
        if found is None and key.endswith("num_batches_tracked"):  # frozen BatchNorms do not count
            continue
        if found is None:
            raise WeightsError(f"[LCD-W004] {path} does not fit '{name}': it has no '{key}'")
        if found.shape != tensor.shape:
            shapes = f"{list(found.shape)}, expected {list(tensor.shape)}"
            raise WeightsError(f"[LCD-W004] {path} does not fit '{name}': '{key}' is {shapes}")
        own[key] = found
    if more := _superfluous(own, given, name):
        raise WeightsError(f"[LCD-W004] {path} does not fit '{name}': '{more}' has no place in it")
    net.load_state_dict(own)
    _logger.info("%s: %d tensors of '%s' matched, %d left over", path, len(wanted), name, len(given) - len(wanted))


def _superfluous(own: Mapping[str, Tensor], given: Mapping[str, Tensor], name: str) -> str | None:
    """Find a tensor of the file that belongs to a part of the network but not to its architecture, as of a deeper one.

    Heads of a detector belong to no part of the network.
    """
    with torch.device("meta"):
        whole = timm.create_model(name.split(".")[0])
    known = {flat_name(key) for key, _ in (*whole.named_parameters(), *whole.named_buffers())}
    parts = tuple({f"{_without_wrappers(key).split('.')[0]}_" for key in own})
    return next((key for key in given if key.startswith(parts) and key not in known), None)


def _by_flat_name(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {flat_name(key): value for key, value in tensors.items()}


def flat_name(key: str) -> str:
    """Name of a parameter without prefixes of wrappers, dots as underscores: the same in all layouts of timm."""
    return _without_wrappers(key).replace(".", "_")


def _without_wrappers(key: str) -> str:
    while found := next((prefix for prefix in _PREFIXES if key.startswith(prefix)), ""):
        key = key.removeprefix(found)
    return key
