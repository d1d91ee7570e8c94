"""Networks of EDM (arXiv 2206.00364) as runs: their config, and their weights under our names."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from configs.errors import UserError
from configs.ve import cifar10_edm
from official.edm_pickle import Network, read
from official.import_checkpoint import check_fields, check_shapes

_PYRAMIDS = {
    "encoder_type": {"standard": "none", "skip": "input_skip", "residual": "residual"},
    "decoder_type": {"standard": "none", "skip": "output_skip"},
}
_EMBEDDINGS = {"positional": 1, "fourier": 2}  # the width of each, as a multiple of the channels
_MOST = 4096  # of a number of channels, blocks, labels, …, so that building the network ends


def _whole(value: Any, least: int = 1) -> int:
    if type(value) is not int or not least <= value <= _MOST:
        raise UserError(f"a size of its network is none from {least} to {_MOST}")
    return value


def _sizes(values: Any) -> tuple[int, ...]:
    if type(values) not in (list, tuple) or len(values) > 16:
        raise UserError("its network has no list of sizes where one belongs")
    return tuple(_whole(value) for value in values)


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < 1e6:
        raise UserError("a number of its network is none from 0 to a million")
    return float(value)


def _body(network: Network) -> dict[str, Any]:
    """The fields of `config.model` of the network itself."""
    if network.body != "SongUNet":
        raise UserError(f"its network is {network.body[:40]}; only DDPM++ and NCSN++ are imported")
    given = network.arguments
    taps = _sizes(given.get("resample_filter", [1, 1]))
    embedding = given.get("embedding_type", "positional")
    pyramids = {name: given.get(name, "standard") for name in _PYRAMIDS}
    known = all(type(p) is str and p in _PYRAMIDS[name] for name, p in pyramids.items())
    width = given.get("channel_mult_noise", 1), given.get("channel_mult_emb", 4)
    if not known or width not in ((n, 4) for e, n in _EMBEDDINGS.items() if e == embedding):
        raise UserError("its network has other parts than EDM's DDPM++ and NCSN++")
    blocks = _whole(given.get("num_blocks", 4))
    if blocks > 64:
        raise UserError(f"its network has {blocks} blocks at a level")
    fir = taps != (1, 1) or pyramids["encoder_type"] == "residual"
    return {
        "nf": _whole(given.get("model_channels", 128)),
        "ch_mult": _sizes(given.get("channel_mult", [1, 2, 2, 2])),
        "num_res_blocks": blocks,
        "attn_resolutions": _sizes(given.get("attn_resolutions", [16])),
        "dropout": _number(given.get("dropout", 0.1)),
        "embedding_type": embedding,
        **({"fir": True, "fir_kernel": taps} if fir else {}),
        "progressive_input": _PYRAMIDS["encoder_type"][pyramids["encoder_type"]],
        "progressive": _PYRAMIDS["decoder_type"][pyramids["decoder_type"]],
        "num_classes": _whole(network.state["label_dim"], 0),
    }


def _precondition_edm(config: ConfigDict, state: dict[Any, Any]) -> None:
    config.model.sigma_data = _number(state["sigma_data"])


def _score_matching(config: ConfigDict, sde: str) -> None:
    """The training of EDM's VP and VE networks: λ = σ², and uniform t."""
    config.training.update(
        sde=sde,
        objective="score_matching",
        likelihood_weighting=False,
        importance_sampling=False,
    )
    config.model.parametrization = "noise"


def _precondition_vp(config: ConfigDict, state: dict[Any, Any]) -> None:
    _score_matching(config, "vpsde")
    if _number(state["M"]) != 1000:
        raise UserError(f"its network's time goes to {_number(state['M']):g} instead of 1000")
    low, eps = _number(state["beta_min"]), _number(state["epsilon_t"])
    config.model.update(beta_min=low, beta_max=low + _number(state["beta_d"]))
    config.training.truncation_time = config.sampling.truncation_time = eps


def _precondition_ve(config: ConfigDict, state: dict[Any, Any]) -> None:
    _score_matching(config, "vesde")
    low, high = (_number(state[name]) for name in ("sigma_min", "sigma_max"))
    config.model.update(sigma_min=low, sigma_max=high, scale_by_sigma=True)


_PRECONDITIONINGS: dict[str, Callable[[ConfigDict, dict[Any, Any]], None]] = {
    "EDMPrecond": _precondition_edm,
    "VPPrecond": _precondition_vp,
    "VEPrecond": _precondition_ve,
}


def get_config(path: str) -> ConfigDict:
    """The recipe that a network of EDM goes on with; the data set is not in its file.

    Raises:
      UserError: the file can't be read, or its network can't be imported.
    """
    network, config = read(path), cifar10_edm.get_config()
    try:
        precondition = _PRECONDITIONINGS.get(network.kind)
        if precondition is None:
            known = ", ".join(_PRECONDITIONINGS)
            raise UserError(f"its preconditioning is {network.kind[:40]}, which is none of {known}")
        config.model.update(_body(network))
        precondition(config, network.state)
        config.data.image_size = _whole(network.state["img_resolution"])
        config.data.num_channels = _whole(network.state["img_channels"])
        config.training.label_dropout = _number(network.arguments.get("label_dropout", 0))
    except (UserError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = error if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{path} can't be imported: {reason}") from error
    return config


def _transposed(weight: np.ndarray) -> np.ndarray:
    """A kernel of PyTorch's, (O, I, …), as ours, (…, I, O)."""
    return weight.transpose(*range(2, weight.ndim), 1, 0)


def _layer(tensors: dict[str, np.ndarray], name: str = "", norm: bool = False) -> dict[str, Any]:
    weight, bias = tensors[f"{name}weight"], tensors[f"{name}bias"]
    return {"scale" if norm else "kernel": weight if norm else _transposed(weight), "bias": bias}


def _block(tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    names = {"Conv_0": "conv0.", "Dense_0": "affine.", "Conv_1": "conv1.", "Conv_2": "skip."}
    norms = {f"GroupNorm_{i}": _layer(tensors, f"norm{i}.", norm=True) for i in range(2)}
    layers = {k: _layer(tensors, v) for k, v in names.items() if f"{v}weight" in tensors}
    return {**norms, **layers}


def _attention(tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """Query, key and value are one convolution in EDM, whose channels they have in turn."""
    weight, bias = tensors["qkv.weight"], tensors["qkv.bias"]
    layers = {
        f"Dense_{i}": {"kernel": weight[i::3, :, 0, 0].T, "bias": bias[i::3]} for i in range(3)
    }
    last = _layer({**tensors, "proj.weight": tensors["proj.weight"][:, :, 0, 0]}, "proj.")
    return {"GroupNorm_0": _layer(tensors, "norm2.", norm=True), **layers, "Dense_3": last}


def _module_params(
    place: str, name: str, tensors: dict[str, np.ndarray]
) -> list[tuple[str, dict[str, Any]]]:
    """Our modules of one of EDM's: (the name of the class, or the whole name; parameters)."""
    if place == "map_noise":
        return [("GaussianFourierProjection", {"W": tensors["freqs"]})] if tensors else []
    if place == "map_label":
        return [("labels", _layer(tensors))]
    if place == "map_augment" or set(tensors) <= {"resample_filter"}:
        return []  # it has no part in what the network gives without augmentation
    if place.startswith("map_layer"):
        return [("Dense", _layer(tensors))]
    if "conv0.weight" in tensors:
        attention = [("AttnBlock", _attention(tensors))] if "qkv.weight" in tensors else []
        return [("ResBlock", _block(tensors)), *attention]
    if name.endswith("_aux_skip"):
        return [("Combine", {"Conv_0": _layer(tensors)})]
    kinds = {"_aux_residual": "FIRConv", "_aux_norm": "GroupNorm"}
    kind = next((kind for end, kind in kinds.items() if name.endswith(end)), "Conv")
    return [(kind, _layer(tensors, norm=kind == "GroupNorm"))]


def convert(tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """The parameters of our network from the tensors of EDM's, by their path.

    In both networks the modules of a kind are numbered in the order of the forward pass.

    Raises:
      KeyError: a tensor is missing.
    """
    modules: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for path, value in tensors.items():
        place, *names = path.split(".")
        module = names.pop(0) if place in ("enc", "dec") else ""
        modules.setdefault((place, module), {})[".".join(names)] = value
    params: dict[str, Any] = {}
    counts: dict[str, int] = {}
    for (place, name), own in modules.items():
        for kind, values in _module_params(place, name, own):
            number = counts.get(kind, 0)
            counts[kind] = number + 1
            params[kind if kind == "labels" else f"{kind}_{number}"] = values
    return params


def read_params(path: str | pathlib.Path) -> Any:
    """Read the weights of a network of EDM under our names, NumPy arrays of float32.

    Raises:
      UserError: the file can't be read, or is of another network.
    """
    tensors = {name: np.asarray(v, np.float32) for name, v in read(path).tensors.items()}
    try:
        return convert(tensors)
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"{path} can't be imported: its tensors lack {error}") from error


# What weights alone do not show.
_OF_NETWORK = (
    "training.sde",
    "model.name",
    "model.parametrization",
    "model.sigma_data",
    "model.scale_by_sigma",
    "model.beta_min",
    "model.beta_max",
    "model.embedding_type",
    "model.fir",
    "model.fir_kernel",
)


def load_params(path: str | pathlib.Path, given: Mapping[str, Any], shape: Any) -> Any:
    """`read_params` for the network of a config.

    Args:
      path: of the file.
      given: the config.
      shape: the shapes of the network's parameters (`models.utils.params_shape`).

    Raises:
      UserError: the file can't be read, or its network is not the config's; the message names a
        field or a tensor.
    """
    check_fields(path, get_config(str(path)), given, _OF_NETWORK)
    params = read_params(path)
    check_shapes(path, [params], shape)
    return params
