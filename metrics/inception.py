"""The feature extractor of FID: Inception-v3 with its published weights."""

import hashlib
import http.client
import logging
import pathlib
import urllib.request
from typing import Any

import jax
import numpy as np

from configs.errors import UserError
from data import pixels
from metrics.features import Extractor, apply_batched
from models import inception
from official.pth_reader import read_pth
from runtime import hosts
from runtime.devices import batch_and_replicated_shardings, to_devices, to_host
from runtime.files import replacing

log = logging.getLogger("soft_truncation")

INCEPTION_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


def _download(path: pathlib.Path) -> bool:
    """Download Inception's published weights; if that fails, log the reason and return False."""
    log.info("downloading Inception's weights for FID into %s", path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(INCEPTION_URL, timeout=30) as source:
            data = source.read()
        if hashlib.sha256(data).hexdigest() != INCEPTION_SHA256:
            raise ValueError("what came is not the published file")
        with replacing(path) as file:
            file.write(data)
    except (OSError, ValueError, http.client.HTTPException) as error:
        log.warning(
            "no FID: Inception's weights can't be downloaded (%s); get %s on another machine, and "
            "put it at %s or name it in eval.inception_path",
            error,
            INCEPTION_URL,
            path,
        )
        return False
    return True


def _read_inception(file: pathlib.Path, given: bool) -> tuple[Any, str] | None:
    """(parameters, SHA-256) of a file, downloaded unless `given`; None if that fails."""
    if not given and not file.exists() and not _download(file):
        return None
    weights = hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else ""
    if not given and weights != INCEPTION_SHA256:
        raise UserError(f"{file} is not the published file; delete it to download it again")
    state = read_pth(file)
    if not isinstance(state, dict):
        raise UserError(f"{file} does not hold the weights of FID's Inception, or of any network")
    try:
        params = inception.convert_state(state)
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{file} does not hold the weights of FID's Inception: {reason}") from error
    if weights != INCEPTION_SHA256:
        log.warning("%s is not the published file: its scores are not comparable with FID", file)
    return params, weights


def get_inception(path: str, cache_dir: pathlib.Path, num_levels: int) -> Extractor | None:
    """The Inception-v3 of FID.

    Args:
      path: a .pth file of its weights; empty: the published ones, downloaded once to `cache_dir`.
      cache_dir: the user's cache folder.
      num_levels: the number of levels of the images that it will be applied to.

    Returns:
      The extractor; None if the weights can't be downloaded, with a log line that says what to do.

    Raises:
      UserError: `path` can't be read, or does not hold Inception's weights.
    """
    file = pathlib.Path(path) if path else cache_dir / INCEPTION_URL.rsplit("/", 1)[1]
    params_and_hash = hosts.on_main(lambda: _read_inception(file, bool(path)))
    if not params_and_hash:
        return None
    params, weights = params_and_hash
    return inception_extractor(params, weights, num_levels)


def inception_extractor(params: Any, weights: str, num_levels: int) -> Extractor:
    """An extractor that runs `inception.InceptionV3` with these parameters on all devices."""
    rows, everywhere = batch_and_replicated_shardings()
    params = to_devices(params, everywhere)
    model = inception.InceptionV3()
    apply = jax.jit(
        lambda params, images: model.apply({"params": params}, inception.prepare(images)),
        out_shardings=rows,
    )

    def network(levels: np.ndarray) -> dict[str, np.ndarray]:
        images = to_devices(pixels.levels_to_uint8(levels, num_levels), rows)
        values = apply(params, images)
        return {"features": to_host(values["pool_3"]), "logits": to_host(values["logits_unbiased"])}

    size = (16 if jax.default_backend() == "cpu" else 128) * jax.device_count()

    def fn(levels: Any) -> Any:
        return apply_batched(network, levels, size)

    return Extractor("inception", weights, fn, max(size, 128))
