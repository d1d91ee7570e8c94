"""Networks of diffusers: folders of UNet2DModel, read and written without that package.

Its NCSN++ (the hub's google/ncsnpp-*) and its DDPM without attention in the decoder but for the
last block of a level, which is what this project's networks are, have the same parts as ours. They
are read from config.json and a file of safetensors, or of `torch.save`.
"""

import json
import logging
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from configs.default import get_default_config
from configs.errors import UserError
from configs.saved import read_object
from configs.ve import cifar10_ncsnpp_st
from official.import_checkpoint import check_fields, check_shapes
from official.pth_reader import read_pth
from runtime.workdir import first_line

log = logging.getLogger("soft_truncation")

_WEIGHTS = "diffusion_pytorch_model.safetensors"
# Limits of sizes, of a level's blocks and of the file, so that a hostile folder is refused soon.
_MOST, _MOST_BLOCKS, _MOST_BYTES = 4096, 64, 2**31

# The fields of UNet2DModel with its defaults, and those that every network here has otherwise.
_DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", *["AttnDownBlock2D"] * 3],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": [*["AttnUpBlock2D"] * 3, "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
_COMMON = {"attention_head_dim": None, "norm_eps": 1e-6}


class _Kind(NamedTuple):
    """A kind of network: what it is here, and the values that its fields have there."""

    blocks: tuple[str, str]  # the names of its blocks on the way down and up
    model: dict[str, Any]
    fields: dict[str, Any]


_KINDS = {
    "ncsnpp": _Kind(
        ("SkipDownBlock2D", "SkipUpBlock2D"),
        {
            "resblock_type": "biggan",
            "skip_rescale": True,
            "fir": True,
            "fir_kernel": (1, 3, 3, 1),
            "progressive": "output_skip",
            "progressive_input": "input_skip",
            "progressive_combine": "sum",
            "embedding_type": "fourier",
            "scale_by_sigma": True,
        },
        {"time_embedding_type": "fourier", "mid_block_scale_factor": math.sqrt(2)},
    ),
    "ddpm": _Kind(
        ("DownBlock2D", "UpBlock2D"),
        {
            "fir": False,
            "progressive": "none",
            "progressive_input": "none",
            "embedding_type": "positional",
            "resamp_with_conv": True,
        },
        {"freq_shift": 1, "flip_sin_to_cos": False, "downsample_padding": 0},
    ),
}
_SAME = {"fourier_feature": False, "embedding_dim": 0, "patch_size": 1, "num_classes": 0}


def _size(value: Any, most: int = _MOST) -> int:
    if type(value) is not int or not 1 <= value <= most:
        raise UserError(f"a size is {value!r:.60}; it must be a whole number from 1 to {most}")
    return value


def _sizes(values: Any) -> list[int]:
    if type(values) is not list or not 1 <= len(values) <= 16:
        raise UserError(f"block_out_channels is {values!r:.60}; it must be a list of sizes")
    return [_size(value) for value in values]


def _number(given: Mapping[str, Any], name: str, most: float = 1e6) -> float:
    value = given[name]
    if type(value) not in (int, float) or not 0 <= value <= most:
        raise UserError(f"{name} is {value!r:.60}; it must be a number from 0 to {most:g}")
    return float(value)


def _folder(path: pathlib.Path) -> pathlib.Path:
    """The folder of the network in that of a pipeline, or the folder itself."""
    return path / "unet" if (path / "unet").is_dir() else path


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read ({first_line(error)})") from error


def _attends(given: dict[str, Any], name: str, kind: _Kind) -> list[bool]:
    """Whether each level has attention, from the largest level down."""
    down, up = given["down_block_types"], given["up_block_types"]
    plain = dict.fromkeys(kind.blocks, False) | {f"Attn{block}": True for block in kind.blocks}
    levels = len(_sizes(given["block_out_channels"]))
    for types, field in ((down, "down_block_types"), (up, "up_block_types")):
        known = type(types) is list and len(types) == levels
        if not known or any(type(block) is not str or block not in plain for block in types):
            raise UserError(f"{field} is {types!r:.80}; each level's must be of the kind of {name}")
    found = [plain[block] for block in down]
    if found != [plain[block] for block in reversed(up)]:
        raise UserError("down_block_types and up_block_types have attention at other levels")
    return found


def _check(given: dict[str, Any], kind: _Kind, attends: list[bool]) -> None:
    """Raise a UserError for a field that no network here can have."""
    channels = _sizes(given["block_out_channels"])
    wide = min(channels) >= 128
    fixed = _DEFAULTS | _COMMON | kind.fields
    free = "sample_size in_channels out_channels center_input_sample down_block_types dropout "
    free += "up_block_types block_out_channels layers_per_block num_train_timesteps"
    if kind is _KINDS["ncsnpp"]:
        free += " freq_shift flip_sin_to_cos downsample_padding"  # which it does not read
        if _size(given["in_channels"]) != 3:
            raise UserError("its blocks are for images of 3 channels")
    for name, value in given.items():
        allowed = [fixed[name]]
        if name == "norm_num_groups":  # ours are min(C/4, 32)
            allowed = [32] * wide + [None] * (kind is _KINDS["ncsnpp"])
        elif name == "time_embedding_dim":
            allowed += [4 * channels[0]]
        elif name == "act_fn":
            allowed += ["swish"]
        close = name == "mid_block_scale_factor" and type(value) in (int, float)
        same = math.isclose(value, fixed[name], abs_tol=1e-6) if close else value in allowed
        if name not in free.split() and not same:
            raise UserError(f"{name} is {value!r:.60}; networks here have {allowed}")
    if any(attends) and min(c for c, at in zip(channels, attends, strict=True) if at) < 128:
        raise UserError("attention of less than 128 channels is normalised otherwise here")
    if given["out_channels"] != given["in_channels"]:
        raise UserError("out_channels is not in_channels")
    if any(c % channels[0] for c in channels):
        raise UserError("block_out_channels are not multiples of the first")
    if given["center_input_sample"] not in (True, False):
        raise UserError("center_input_sample is neither true nor false")


def get_config(path: str) -> ConfigDict:
    """The recipe that a network of diffusers goes on with; the data set is not in its folder.

    Raises:
      UserError: the folder can't be read, or its network can't be imported.
    """
    folder = _folder(pathlib.Path(path))
    given = {k: v for k, v in _read(folder / "config.json").items() if not k.startswith("_")}
    try:
        unknown = sorted(given.keys() - _DEFAULTS.keys())
        if unknown:
            raise UserError(f"{unknown[0]!r:.60} is no field of UNet2DModel")
        given = _DEFAULTS | given
        name = "ncsnpp" if "Skip" in str(given["down_block_types"]) else "ddpm"
        attends = _attends(given, name, _KINDS[name])
        _check(given, _KINDS[name], attends)
        return _config_of(given, name, attends, pathlib.Path(path) / "scheduler")
    except UserError as error:
        raise UserError(f"{folder} can't be imported: {error}") from error


def _config_of(
    given: dict[str, Any], name: str, attends: list[bool], scheduler: pathlib.Path
) -> ConfigDict:
    size, channels = _size(given["sample_size"]), _sizes(given["block_out_channels"])
    config = cifar10_ncsnpp_st.get_config() if name == "ncsnpp" else get_default_config()
    config.data.update(image_size=size, num_channels=_size(given["in_channels"]))
    config.data.centered = not given["center_input_sample"]
    config.model.update(
        name=name,
        parametrization="noise",
        nf=channels[0],
        ch_mult=tuple(c // channels[0] for c in channels),
        num_res_blocks=_size(given["layers_per_block"], _MOST_BLOCKS),
        attn_resolutions=tuple(size >> i for i, at in enumerate(attends) if at),
        dropout=_number(given, "dropout", 1),
        **_KINDS[name].model,
    )
    file = scheduler / "scheduler_config.json"
    facts = _read(file) if file.is_file() else {}
    if name == "ncsnpp":
        facts = {"sigma_min": 0.01, "sigma_max": 1348.0} | facts  # the scheduler's defaults
        low, high = (_number(facts, end) for end in ("sigma_min", "sigma_max"))
        config.model.update(sigma_min=low, sigma_max=high)
        config.sampling.snr = _number({"snr": 0.15} | facts, "snr", 10)
    else:
        facts = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"} | facts
        if facts["beta_schedule"] != "linear":
            raise UserError(f"beta_schedule is {facts['beta_schedule']!r:.60}, not linear")
        low, high = (1000 * _number(facts, end, 1) for end in ("beta_start", "beta_end"))
        config.model.update(beta_min=low, beta_max=high)
    return config


class _Array(NamedTuple):
    """A parameter: its path here, its name there, and the axes of theirs in our order."""

    ours: tuple[str, ...]
    theirs: str
    axes: tuple[int, ...]
    squeeze: bool = False  # theirs is a convolution of one pixel, ours a matrix


def _layer(
    ours: tuple[str, ...], theirs: str, axes: tuple[int, ...], name: str = "kernel", **how: Any
) -> list[_Array]:
    weight = _Array((*ours, name), f"{theirs}.weight", axes, **how)
    return [weight, _Array((*ours, "bias"), f"{theirs}.bias", (0,))]


def _conv(ours: tuple[str, ...], theirs: str) -> list[_Array]:
    return _layer(ours, theirs, (2, 3, 1, 0))


def _dense(ours: tuple[str, ...], theirs: str, squeeze: bool = False) -> list[_Array]:
    return _layer(ours, theirs, (1, 0), squeeze=squeeze)


def _norm(ours: tuple[str, ...], theirs: str) -> list[_Array]:
    return _layer(ours, theirs, (0,), "scale")


class _Table:
    """The parameters of a network in the order in which ours are numbered."""

    def __init__(self, shortcut: Callable[[str, str], bool], biggan: bool) -> None:
        """`shortcut` says of a residual block, by both names, whether it has one."""
        self.arrays: list[_Array] = []
        self._shortcut, self._biggan = shortcut, biggan
        self._counts: dict[str, int] = {}

    def next(self, kind: str) -> str:
        """Our name of the next module of this kind."""
        number = self._counts.get(kind, 0)
        self._counts[kind] = number + 1
        return f"{kind}_{number}"

    def block(self, theirs: str) -> None:
        ours = self.next("ResBlock")
        for i in (0, 1):
            self.arrays += _norm((ours, f"GroupNorm_{i}"), f"{theirs}.norm{i + 1}")
            self.arrays += _conv((ours, f"Conv_{i}"), f"{theirs}.conv{i + 1}")
        self.arrays += _dense((ours, "Dense_0"), f"{theirs}.time_emb_proj")
        if self._shortcut(ours, theirs):
            name = f"{theirs}.conv_shortcut"
            if self._biggan:
                self.arrays += _conv((ours, "Conv_2"), name)
            else:
                self.arrays += _dense((ours, "Dense_1"), name, squeeze=True)

    def attention(self, theirs: str) -> None:
        ours = self.next("AttnBlock")
        self.arrays += _norm((ours, "GroupNorm_0"), f"{theirs}.group_norm")
        for i, name in enumerate(("to_q", "to_k", "to_v", "to_out.0")):
            self.arrays += _dense((ours, f"Dense_{i}"), f"{theirs}.{name}")

    def output(self, norm: str, conv: str) -> None:
        self.arrays += _norm((self.next("GroupNorm"),), norm)
        self.arrays += _conv((self.next("Conv"),), conv)


def _arrays(model: Mapping[str, Any], size: int, shortcut: Callable[[str, str], bool]) -> _Table:
    """All parameters of a network.

    Args:
      model: the config's `model`.
      size: the size of its images.
      shortcut: as of `_Table`.
    """
    pyramids, blocks = model["name"] == "ncsnpp", model["num_res_blocks"]
    table, last = _Table(shortcut, pyramids), len(model["ch_mult"]) - 1
    attends = [size >> level in model["attn_resolutions"] for level in range(last + 1)]
    if pyramids:
        table.arrays.append(_Array(("GaussianFourierProjection_0", "W"), "time_proj.weight", (0,)))
    for i in (1, 2):
        table.arrays += _dense((table.next("Dense"),), f"time_embedding.linear_{i}")
    table.arrays += _conv((table.next("Conv"),), "conv_in")
    for level in range(last + 1):
        place = f"down_blocks.{level}"
        for i in range(blocks):
            table.block(f"{place}.resnets.{i}")
            if attends[level]:
                table.attention(f"{place}.attentions.{i}")
        if level != last and pyramids:
            table.block(f"{place}.resnet_down")
            table.arrays += _conv((table.next("Combine"), "Conv_0"), f"{place}.skip_conv")
        elif level != last:
            ours = table.next("ResampleConv")
            table.arrays += _conv((ours, "Conv_0"), f"{place}.downsamplers.0.conv")
    table.block("mid_block.resnets.0")
    table.attention("mid_block.attentions.0")
    table.block("mid_block.resnets.1")
    for level in range(last, -1, -1):
        place = f"up_blocks.{last - level}"
        for i in range(blocks + 1):
            table.block(f"{place}.resnets.{i}")
        if attends[level]:
            table.attention(f"{place}.attentions.{0 if pyramids else blocks}")
        if level and pyramids:
            table.output(f"{place}.skip_norm", f"{place}.skip_conv")
            table.block(f"{place}.resnet_up")
        elif level:
            ours = table.next("ResampleConv")
            table.arrays += _conv((ours, "Conv_0"), f"{place}.upsamplers.0.conv")
    table.output("conv_norm_out", "conv_out")
    return table


def _idle_attentions(model: Mapping[str, Any], size: int) -> Iterator[tuple[str, int]]:
    """Names and channels of attention in DDPM's blocks there which ours do not have."""
    last = len(model["ch_mult"]) - 1
    for level, mult in enumerate(model["ch_mult"]) if model["name"] == "ddpm" else ():
        if size >> level in model["attn_resolutions"]:
            for i in range(model["num_res_blocks"]):
                yield f"up_blocks.{last - level}.attentions.{i}", model["nf"] * mult


_OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v."}
_OLD_NAMES |= {".proj_attn.": ".to_out.0."}


def _tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a network there, float32, by their names of today."""
    from safetensors import SafetensorError, safe_open

    path = folder / _WEIGHTS
    if not path.is_file():
        path = path.with_suffix(".bin")
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES >> 30} GiB")
        if path.suffix == ".bin":
            tensors = dict(read_pth(path))
        else:
            with safe_open(path, framework="numpy") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for old, new in _OLD_NAMES.items():
            tensors = {name.replace(old, new): value for name, value in tensors.items()}
        if "time_proj.W" in tensors:  # older files have it beside or instead of `weight`
            tensors.setdefault("time_proj.weight", tensors.pop("time_proj.W"))
        return {name: np.asarray(value, np.float32) for name, value in tensors.items()}
    except (SafetensorError, OSError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} can't be read ({first_line(error)})") from error


def load_params(path: str | pathlib.Path, given: Mapping[str, Any], shape: Any) -> Any:
    """The weights of a network of diffusers under our names, NumPy arrays of float32.

    Args:
      path: its folder, or that of its pipeline.
      given: the config.
      shape: the shapes of the network's parameters (`models.utils.params_shape`).

    Raises:
      UserError: the folder can't be read, or its network is not the config's; the message names a
        field or a tensor.
    """
    config, folder = get_config(str(path)), _folder(pathlib.Path(path))
    names = [f"model.{name}" for name in (*_KINDS[config.model.name].model, "name", "nf")]
    check_fields(path, config, given, [*names, "model.parametrization", "data.centered"])
    tensors, model = _tensors(folder), config.model.to_dict()
    size = config.data.image_size
    for name, _ in _idle_attentions(model, size):
        for part in ("group_norm", "to_q", "to_k", "to_v", "to_out.0"):
            whole = [f"{name}.{part}.{kind}" for kind in ("weight", "bias")]
            if missing := [tensor for tensor in whole if tensor not in tensors]:
                raise UserError(f"{folder} can't be imported: it has no {missing[0]}")
            parts = [tensors.pop(tensor) for tensor in whole]
            if part == "to_out.0" and any(np.any(values) for values in parts):
                raise UserError(
                    f"{folder} can't be imported: {name} is attention that no network here has "
                    "after this block"
                )
    table = _arrays(model, size, lambda _, there: f"{there}.conv_shortcut.weight" in tensors)
    params: dict[tuple[str, ...], np.ndarray] = {}
    for ours, theirs, axes, squeeze in table.arrays:
        if theirs not in tensors:
            raise UserError(f"{folder} can't be imported: it has no {theirs}")
        value = tensors.pop(theirs)
        value = value[..., 0, 0] if squeeze and value.ndim == 4 else value
        if value.ndim != len(axes):
            raise UserError(f"{folder} can't be imported: {theirs} has the shape {value.shape}")
        params[ours] = value.transpose(axes)
    if tensors:
        raise UserError(f"{folder} can't be imported: no network here has {min(tensors)!r:.80}")
    tree = traverse_util.unflatten_dict(params)
    check_shapes(path, [tree], shape)
    return tree


def _expressible(fields: Mapping[str, Any], shape: tuple[int, int, int]) -> _Kind:
    """The kind of a network; UserError if diffusers has no blocks for it."""
    model, name = fields["model"], fields["model"]["name"]

    def refuse(reason: str) -> None:
        raise UserError(f"diffusers has no such network: {reason}")

    if name not in _KINDS:
        refuse(f"model.name is {name}; it has ncsnpp and ddpm")
    wanted = _KINDS[name].model | _SAME | {"parametrization": "noise"}
    for field, value in wanted.items():
        own = tuple(model[field]) if isinstance(value, tuple) else model[field]
        if own != value:
            refuse(f"model.{field} is {own!r}, and it has {value!r} alone")
    sde = "vesde" if name == "ncsnpp" else "vpsde"
    if fields["training"]["sde"] != sde or fields["training"]["unbounded_parametrization"]:
        refuse(f"its pipeline is for {sde}")
    if name == "ncsnpp" and shape[2] != 3:
        refuse("its blocks are for images of 3 channels")
    if shape[0] != shape[1]:
        refuse("its images are squares")
    channels = [model["nf"] * mult for mult in model["ch_mult"]]
    sizes = [shape[0] >> level for level in range(len(channels))]
    wide = [c for c, size in zip(channels, sizes, strict=True) if size in model["attn_resolutions"]]
    if min(wide if name == "ncsnpp" else channels, default=128) < 128:
        refuse("layers of less than 128 channels have other groups there")
    if channels[0] != model["nf"]:
        refuse("model.ch_mult does not begin with 1")
    return _KINDS[name]


def write(folder: pathlib.Path, fields: Mapping[str, Any], params: Any) -> None:
    """Write a network as a pipeline of diffusers: ScoreSdeVePipeline, or DDPMPipeline.

    Args:
      folder: where its files are written.
      fields: the run's config.
      params: the weights.

    Raises:
      UserError: diffusers has no such network.
    """
    from safetensors.numpy import save

    model, data, name = fields["model"], fields["data"], fields["model"]["name"]
    size, channels = data["image_size"], data["num_channels"]
    kind = _expressible(fields, (size, data["image_width"] or size, channels))
    if data["centered"] != (name == "ddpm"):
        log.warning(
            "the network is exact, but its pipeline is for images in %s: use its unet",
            "[-1, 1]" if name == "ddpm" else "[0, 1]",
        )
    flat = traverse_util.flatten_dict(params)

    def shortcut(ours: str, _: str) -> bool:
        return any((ours, layer, "kernel") in flat for layer in ("Conv_2", "Dense_1"))

    tensors = {}
    for ours, theirs, axes, squeeze in _arrays(model, size, shortcut).arrays:
        value = np.asarray(flat[ours], np.float32).transpose(np.argsort(axes))
        tensors[theirs] = np.ascontiguousarray(value[..., None, None] if squeeze else value)
    for place, width in _idle_attentions(model, size):
        for part in ("group_norm", "to_q", "to_k", "to_v", "to_out.0"):
            norm = part == "group_norm"
            weight = np.ones(width) if norm else np.zeros((width, width))
            tensors[f"{place}.{part}.weight"] = weight.astype(np.float32)
            tensors[f"{place}.{part}.bias"] = np.zeros(width, np.float32)
    attends = [size >> i in model["attn_resolutions"] for i in range(len(model["ch_mult"]))]
    down, up = ([f"{'Attn' * at}{block}" for at in attends] for block in kind.blocks)
    unet = _DEFAULTS | _COMMON | kind.fields | {"_class_name": "UNet2DModel"}
    unet |= {"sample_size": size, "in_channels": channels, "out_channels": channels}
    unet |= {"center_input_sample": not data["centered"], "dropout": model["dropout"]}
    unet |= {"down_block_types": down, "up_block_types": up[::-1]}
    unet |= {"block_out_channels": [model["nf"] * mult for mult in model["ch_mult"]]}
    unet |= {"layers_per_block": model["num_res_blocks"]}
    unet["norm_num_groups"] = None if name == "ncsnpp" else 32
    files = {"unet/config.json": unet, **_pipeline(fields)}
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(content, indent=1) + "\n")
    (folder / "unet" / _WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))


def _pipeline(fields: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """model_index.json and the scheduler's file."""
    model = fields["model"]
    if model["name"] == "ncsnpp":
        pipeline, scheduler = "ScoreSdeVePipeline", "ScoreSdeVeScheduler"
        facts = {"sigma_min": model["sigma_min"], "sigma_max": model["sigma_max"]}
        facts |= {"num_train_timesteps": model["num_scales"], "snr": fields["sampling"]["snr"]}
        facts |= {"sampling_eps": fields["sampling"]["truncation_time"], "correct_steps": 1}
    else:
        pipeline, scheduler = "DDPMPipeline", "DDPMScheduler"
        facts = {"beta_start": model["beta_min"] / 1000, "beta_end": model["beta_max"] / 1000}
        facts |= {"beta_schedule": "linear", "num_train_timesteps": 1000, "clip_sample": True}
        facts |= {"prediction_type": "epsilon", "variance_type": "fixed_small"}
    index = {"_class_name": pipeline, "unet": ["diffusers", "UNet2DModel"]}
    return {
        "model_index.json": index | {"scheduler": ["diffusers", scheduler]},
        "scheduler/scheduler_config.json": {"_class_name": scheduler, **facts},
    }
