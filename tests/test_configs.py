"""Every recipe: against the official values, built at full width, one step at a reduced one."""

import dataclasses
import functools
import importlib
import json
import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clu.parameter_overview import count_parameters

import build
import sde_lib
import train_step
from build import REGISTRIES
from configs import saved
from configs.data import data_spec
from configs.default import get_default_config
from configs.validate import validate
from models import utils as mutils
from tests.helpers import GOLDEN, random_params, step_fn_of

ROOT = pathlib.Path(__file__).parent.parent
RECIPES = sorted(
    f"{path.parent.name}/{path.stem}"
    for path in (ROOT / "configs").glob("*/*.py")
    if path.stem != "__init__"
)
OFFICIAL = {path.stem: path for path in sorted((GOLDEN / "official_configs").glob("*.json"))}
FOLDERS = {
    "vpsde": "vp",
    "vesde": "ve",
    "reciprocal_vesde": "rve",
    "rve-sde": "rve",  # a name that the released code does not know
}


def get_recipe(name):
    config = importlib.import_module(f"configs.{name.replace('/', '.')}").get_config()
    if config.data.dataset == "folder":
        config.data.path = "images"
    return config


def read_official(name):
    """The fields of an official recipe, flat."""
    fields = json.loads(OFFICIAL[name].read_text())
    flat = {}
    for section, values in fields.items():
        if isinstance(values, dict):
            flat |= {f"{section}.{field}": value for field, value in values.items()}
        else:
            flat[section] = values
    return flat


def our_name(name):
    """Our recipe of an official file: the SDE's folder, and its name in lower case."""
    if name == "vp__CIFAR10__ddpmpp_nll_st":
        return "vp/cifar10_st"
    stem = "_".join(name.split("__")[1:]).lower().replace("-", "_")
    return f"{FOLDERS[read_official(name)['training.sde']]}/{stem}"


# Fields that ours does not have, and the values under which that makes no difference.
WITHOUT = {
    "model.attention": ([True], "attn_resolutions says where"),
    "model.attention_type": (["ddpm"], "there is one"),
    "model.auxiliary_resblock": ([True], "the blocks that resample are always there"),
    "model.conditional": ([True], "ncsnpp and ddpm always are, NCSNv2 never is"),
    "model.conv_size": ([3], "there is one"),
    "model.nonlinearity": (["swish"], "each network has its own"),
    "model.normalization": (["GroupNorm"], "each network has its own"),
    "model.sigma_begin": ([90], "nothing reads it"),
    "optim.amsgrad": ([False], "unused"),
    "training.continuous": ([True], "all are"),
    "training.ddpm_score": ([True], "VP networks predict noise"),
    "training.model_mode": (["reciprocal"], "the code that reads it is dead"),
    "training.num_train_data": ([50000, 162770, 1281149], "the data know"),
    "training.whatever_sampling": ([False], "nothing reads it"),
    "uncsn.threshold": (["initial", "middle"], "nothing that was released reads it"),
    "data.uniform_dequantization": ([False], "an older name of data.dequantization"),
    "sampling.sample_more": ([True], "as many as asked for"),
    "eval.bpd_dataset": (["test"], "always"),
    "eval.enable_loss": ([True, False], "training logs it"),
    "eval.lambda_": ([0.0], "the ODE's likelihood"),
    "eval.probability_flow": ([True], "the ODE's likelihood"),
    "eval.nelbo_iter": ([0], "eval.nelbo_draws"),
    "eval.nll_iter": ([0], "eval.num_draws"),
    "eval.residual": ([True], "with and without are both reported"),
}

IMPORTANCE = (
    "the release's importance sampling is that of the likelihood weighting, whatever the flag says"
)
RVE_TIME = (
    "the release always draws RVE's 1/t uniformly, which is importance sampling of the likelihood "
    "weighting"
)
MIXED = "the first half of a mixed batch is the importance-sampled likelihood weighting"


def differs(name, official):
    """The fields that differ on purpose: our value, and why."""
    rve = FOLDERS[official["training.sde"]] == "rve"
    fields = {
        "eval.begin_ckpt": (0, "the newest checkpoint, unless a sweep is asked for"),
        "eval.end_ckpt": (0, "the newest checkpoint, unless a sweep is asked for"),
        "eval.enable_bpd": (True, "an evaluation reports all scores"),
        "eval.enable_sampling": (True, "an evaluation reports all scores"),
        "training.likelihood_weighting": (True, IMPORTANCE),
    }
    if official["data.image_size"] >= 256:
        del fields["eval.enable_bpd"]
        fields["eval.batch_size"] = (16, "what the release samples in; 512 need 117 GiB")
    if official.get("data.tfrecords_path"):
        fields["data.tfrecords_path"] = ("", "a name in the user's folder, who names the file")
    if rve:
        fields["training.sde"] = ("reciprocal_vesde", "rve-sde was never released")
        fields["training.likelihood_weighting"] = (True, RVE_TIME)
        fields["training.importance_sampling"] = (True, RVE_TIME)
        # Of the VE SDE, where σ(1e-3) is near its end: RVE's σ is 332 of 378 there.
        fields["sampling.truncation_time"] = (1e-5, "RVE's σ is still near its largest at 1e-3")
    elif official.get("training.mixed"):
        fields["training.likelihood_weighting"] = (True, MIXED)
        fields["training.importance_sampling"] = (True, MIXED)
    elif not official["training.importance_sampling"]:
        del fields["training.likelihood_weighting"]
    return fields


def test_every_official_recipe_is_here():
    assert len(OFFICIAL) == 33
    assert {our_name(name) for name in OFFICIAL} <= set(RECIPES)


@pytest.mark.parametrize("name", OFFICIAL)
def test_recipe_has_the_official_values(name):
    config, official = get_recipe(our_name(name)), read_official(name)
    allowed, training = differs(name, official), config.training
    soft = official.pop("training.st", False)
    assert training.truncation == ("soft" if soft else "fixed")
    k = official.pop("training.k", None)
    assert not soft or k is None or training.k == k
    wide = official.pop("model.lsgm", False)
    dim = official.pop("model.embedding_dim", 0)
    assert config.model.embedding_dim == (dim if wide else 0)
    for field in ("training.eta", "uncsn.eta"):
        assert official.pop(field, config.model.sigma_min) == config.model.sigma_min
    for field, value in official.items():
        if field in WITHOUT:
            assert value in WITHOUT[field][0], field
            continue
        section, _, key = field.rpartition(".")
        ours = config[section][key] if section else config[key]
        ours = list(ours) if isinstance(ours, tuple) else ours
        expected = allowed[field][0] if field in allowed else value
        assert ours == expected, f"{field} is {ours}, officially {value}"


def test_no_field_is_excused_in_vain():
    # Each excuse is needed by a recipe, and no field that ours has is left uncompared.
    fields = {name: read_official(name) for name in OFFICIAL}
    assert set(WITHOUT) <= {field for official in fields.values() for field in official}
    default = get_default_config()
    for field in WITHOUT:
        section, _, key = field.rpartition(".")
        assert section not in default or key not in default[section], field
    excused = {
        field
        for name, official in fields.items()
        for field, (ours, _) in differs(name, official).items()
        if official.get(field, ours) != ours
    }
    assert excused == {
        "data.tfrecords_path",
        "eval.begin_ckpt",
        "eval.end_ckpt",
        "eval.batch_size",
        "eval.enable_bpd",
        "eval.enable_sampling",
        "training.sde",
        "training.likelihood_weighting",
        "training.importance_sampling",
        "sampling.truncation_time",
    }


PARAMETERS = {
    "vp/cifar10_st": 61_804_419,
    "vp/celeba_uddpmpp_fid_st": 61_804_419,
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_valid(name):
    validate(get_recipe(name), 1, REGISTRIES)


@functools.cache
def full_size(model, size, channels):
    """The number of parameters of a network, built once for all recipes that have it."""
    image = jnp.zeros((1, size, size, channels))
    variables = jax.eval_shape(model.init, jax.random.key(0), image, jnp.ones(1))
    return count_parameters(variables["params"])


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_network_can_be_built_at_full_width(name):
    config = get_recipe(name)
    data = config.data
    if name not in PARAMETERS:
        config.model.num_res_blocks = 1  # more of them are more of the same to trace
    count = full_size(mutils.create_model(config), data.image_size, data.num_channels)
    assert count == PARAMETERS.get(name, count)
    small = config.data.dataset in ("digits", "fashion_mnist", "folder", "array")
    assert count > (3e4 if small else 2e6)


def reduced(config, levels=2):
    """The recipe with few channels, levels and pixels, and one or two images; else as it is."""
    model, data = config.model, config.data
    model.update(nf=4, num_res_blocks=1)
    config.training.batch_size = 2 if config.training.mixed else 1
    config.optim.warmup = 0
    if data.dataset == "array":
        data.num_levels = 256
    model.ch_mult = tuple(model.ch_mult)[:levels]
    if levels == 2:
        model.ch_mult = (1, 2)[: len(model.ch_mult)]
        model.attn_resolutions = (4,) if model.attn_resolutions else ()
    # Two pixels are left at the lowest level: attention on one would do nothing.
    data.image_size = max(8, 2 ** len(model.ch_mult))
    return config


@functools.cache
def jitted_network(model):
    """Compiled once for all recipes with the same network, as Flax compares modules."""
    return jax.jit(
        lambda variables, x, labels, keys: model.apply(
            variables, x, labels, train=True, dropout_keys=keys
        )
    )


@dataclasses.dataclass
class JittedNetwork:
    """A network whose step can run operation by operation, which spares compiling 40 steps."""

    model: object

    def apply(self, variables, x, time_cond, train, dropout_keys):
        assert train
        return jitted_network(self.model)(variables, x, time_cond, dropout_keys)

    def __getattr__(self, name):
        return getattr(self.model, name)


def random_images(config):
    """Two images of a data set's size and levels."""
    shape = (2, config.data.image_size, config.data.image_size, config.data.num_channels)
    levels = data_spec(config).num_levels
    return np.random.default_rng(0).integers(0, levels, shape, dtype=np.uint8)


class StandIn(nn.Module):
    """A network of two parameters."""

    @nn.compact
    def __call__(self, x, labels, train=False, dropout_keys=None):
        scale = self.param("scale", nn.initializers.ones, ())
        slope = self.param("slope", nn.initializers.zeros, ())
        return scale * x + slope * labels[:, None, None, None]


def training_step(config, model):
    """(step_fn on one device, packed state, images, index) of a recipe."""
    images = random_images(config)[: config.training.batch_size]
    optimizer = build.get_optimizer(config)
    if isinstance(model, StandIn):
        params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), jnp.ones(1))["params"]
    else:
        params = random_params(config)
    state = train_step.TrainState(jnp.zeros((), jnp.int32), params, params, optimizer.init(params))
    step_fn = step_fn_of(
        config, sde_lib.get_sde(config), model, optimizer, data_spec(config).num_levels
    )
    # One device under the step's axis name; nothing but the first argument is mapped.
    mapped = jax.vmap(
        lambda _, *args: step_fn(*args),
        in_axes=(0, None, None, None),
        out_axes=None,
        axis_name="batch",
    )
    arguments = train_step.pack_state(state), images[None], jnp.arange(len(images))
    return functools.partial(mapped, jnp.zeros(1)), params, arguments


def objectives():
    """(name, config) of the first recipe with each objective and optimiser, at a small size."""
    found = {}
    for name in RECIPES:
        config = reduced(get_recipe(name))
        config.data.image_size = 8
        objective = build.get_objective(
            config, sde_lib.get_sde(config), data_spec(config).num_levels
        )
        what = objective, config.optim, config.data.num_channels, config.model.scale_by_sigma
        found.setdefault(repr(what), (name, config))
    return found.values()


@pytest.mark.slow
@pytest.mark.parametrize("name, config", objectives())
def test_recipes_objective_takes_a_training_step(name, config):
    # With a stand-in for the network; each network is trained below.
    step, params, arguments = training_step(config, StandIn())
    state, metrics = step(*arguments)
    assert np.isfinite(metrics["loss"]) and metrics["loss"] > 0
    after = train_step.unpack_state(state).params
    assert after["scale"] != params["scale"]


# One recipe for each network that the recipes have, at a reduced size.
NETWORKS = (
    "vp/cifar10_st",
    "vp/cifar10_vdm_st",
    "vp/cifar10_ddpmpp_fid_st_deepest",
    "vp/digits_st",
    "vp/digits_labels_st",
    "vp/fashion_mnist_28",
    "vp/fashion_mnist_28_gpu",
    "rve/digits_st",
    "rve/cifar10_uncsnpp_st",
    "rve/ffhq_1024_uncsn",
    "ve/cifar10_edm",
)


def test_every_network_of_a_recipe_is_trained():
    networks = {name: mutils.create_model(reduced(get_recipe(name))) for name in RECIPES}
    assert {networks[name] for name in NETWORKS} == set(networks.values())
    assert len(set(networks.values())) == len(NETWORKS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "levels"),
    [
        *((name, 2) for name in NETWORKS),
        pytest.param("rve/ffhq_1024_uncsn", 8, marks=pytest.mark.release),
    ],
)
def test_recipe_takes_a_training_step(name, levels):
    config = reduced(get_recipe(name), levels)
    step, params, arguments = training_step(config, JittedNetwork(mutils.create_model(config)))
    after, metrics = step(*arguments)
    assert np.isfinite(metrics["loss"]) and metrics["loss"] > 0
    assert config.training.truncation_time * (1 - 1e-6) <= metrics["tau"] <= 1
    after = train_step.unpack_state(after)
    change = jax.tree.map(lambda new, old: jnp.abs(new - old).max(), after.params, params)
    for path, value in jax.tree_util.tree_leaves_with_path(change):
        fixed = "GaussianFourierProjection" in str(path[0])
        assert (value == 0) if fixed else (0 < value < 1.1 * config.optim.lr), path


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_one_hop_from_a_file_of_defaults(name):
    def base(name):
        found = re.search(
            r"^from configs\.(\w+) import (\w+)",
            (ROOT / "configs" / f"{name}.py").read_text(),
            re.M,
        )
        return None if found[1] == "default" else f"{found[1]}/{found[2]}"

    assert base(name) is None or base(base(name)) is None


def test_the_old_name_of_a_field_is_still_read(tmp_path, caplog):
    config = get_default_config()
    config.data.update(tfrecords_path="")
    assert config.data.path == "" and "tfrecords_path" not in config.data
    config.data.tfrecords_path = "ffhq-r08.tfrecords"
    assert config.data.path == "ffhq-r08.tfrecords" == config.data.tfrecords_path
    assert caplog.messages == ["config.data.tfrecords_path is called path now"]


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ({"path": "", "tfrecords_path": "celeba_r08.tfrecords"}, "celeba_r08.tfrecords"),
        ({"path": "faces", "tfrecords_path": "celeba_r08.tfrecords"}, "faces"),
        ({"tfds_dir": "tfds", "tfrecords_path": "celeba_r08.tfrecords"}, ""),
    ],
)
def test_a_run_recorded_with_an_old_name_has_the_same_data(given, path, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"data": given}))
    assert saved.get_config(tmp_path).data.path == path
