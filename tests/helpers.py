"""What several tests share: golden data, small configs, a Gaussian whose score is known."""

import ast
import contextlib
import json
import os
import pathlib
import re
import zlib
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import build
import train_step
from configs import fields
from configs.default import get_default_config
from configs.shapes import image_shape
from configs.vp import digits_st
from models import layers
from models import utils as mutils
from models.score import ScoreModel
from modes import sample as sample_mode

GOLDEN = pathlib.Path(__file__).parent / "golden"


GOLDEN_MODELS = (
    "vp_ddpmpp",
    "vp_ddpmpp_wide",
    "vp_uddpmpp",
    "ve_ncsnpp",
    "ve_ncsnpp_skip",
    "rve_uncsnpp",
)


def environment_of(devices):
    """The environment of a process with so many CPU devices, and this one's other flags."""
    given = os.environ.get("XLA_FLAGS", "")
    count = f"--xla_force_host_platform_device_count={devices}"
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", count, given)
    return dict(os.environ, XLA_FLAGS=flags, JAX_PLATFORMS="cpu")


@contextlib.contextmanager
def float64(on=True):
    """Whether JAX has float64 in the context; `jax.enable_x64` is newer than the oldest JAX."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", on)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def nhwc(array):
    return np.asarray(array).transpose(0, 2, 3, 1)


def golden_config(name):
    """Our config with the official fields of a golden model, where ours has them."""
    config = get_default_config()
    for section, values in json.loads((GOLDEN / f"{name}.json").read_text()).items():
        if isinstance(values, dict):
            for field, value in values.items():
                if field in config.get(section, {}):
                    config[section][field] = value
    return config


def tiny_config(**training):
    """Digits with a network that compiles in seconds."""
    config = digits_st.get_config()
    config.model.update(nf=8, ch_mult=(1,), attn_resolutions=())
    config.optim.warmup = 3
    config.training.update(
        batch_size=8,
        n_iters=12,
        log_freq=1,
        eval_freq=100,
        snapshot_freq=6,
        snapshot_freq_for_preemption=3,
        snapshot_sampling=False,
    )
    config.training.update(training)
    return config


def sample_run(config, workdir):
    """`--mode sample`: the path of the grid."""
    return sample_mode.sample(build.open_run(config, workdir), workdir)


class SmallNetwork(nn.Module):
    """A network that is traced and compiled in a tenth of the time of the smallest U-Net."""

    nf: int
    num_classes: int

    @nn.compact
    def __call__(self, x, time_cond, train=False, dropout_keys=None, labels=None):
        embedded = layers.Dense(self.nf)(layers.timestep_embedding(time_cond, self.nf))
        if self.num_classes:
            none = jnp.full(len(x), self.num_classes)
            embed = nn.Embed(self.num_classes + 1, self.nf)
            embedded += embed(none if labels is None else labels)
        h = nn.silu(layers.Conv(self.nf)(x) + embedded[:, None, None, :])
        return layers.Conv(x.shape[-1])(h)


def create_small(config):
    """In place of `mutils.create_model`."""
    return SmallNetwork(config.model.nf, config.model.num_classes)


@contextlib.contextmanager
def small_networks():
    """Every network that is made is a small one."""
    with mock.patch.object(mutils, "create_model", create_small):
        yield


def optimised(function):
    """The compiled function, optimised: for what runs for long, as conftest.py turns it off."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 1})


def param_shapes(config):
    return mutils.params_shape(mutils.create_model(config), image_shape(config))


def score_model(config, sde, model):
    """A config's `ScoreModel`."""
    return fields.call(ScoreModel, config, "model", "training", sde=sde, network=model)


def random_params(config):
    """Parameters of usual sizes, without compiling the initialisation."""
    rng = np.random.default_rng(0)

    def draw(path, shape):
        noise = rng.standard_normal(shape.shape).astype(np.float32)
        if len(shape.shape) > 1:
            return noise / np.sqrt(np.prod(shape.shape[:-1]))
        return 1 + 0.1 * noise if "scale" in str(path[-1]) else 0.1 * noise

    return jax.tree_util.tree_map_with_path(draw, param_shapes(config))


def inception_state():
    """The weights of the golden Inception, as golden/README.md says to make them, by their key."""
    golden, state = np.load(GOLDEN / "inception.npz"), {}
    for key, shape in zip(golden["keys"].tolist(), golden["shapes"], strict=True):
        shape = ast.literal_eval(str(shape))
        noise = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape)
        noise = np.asarray(noise, np.float32)
        if key.endswith("running_var"):
            state[key] = 1 + 0.1 * np.abs(noise)
        elif key.endswith("bn.weight"):
            state[key] = 1 + 0.1 * noise
        elif key.endswith(("bias", "running_mean")):
            state[key] = 0.1 * noise
        else:
            state[key] = noise * np.float32(np.sqrt(2 / np.prod(shape[1:])))
    return {key: np.asarray(value) for key, value in state.items()}


class Mixture:
    """Two Gaussians of one covariance, v·I, with means ±m·(1, …, 1)/√D, and its diffused score."""

    def __init__(self, shape, variance, mean):
        self.shape, self.dims = shape, int(np.prod(shape))
        self.variance, self.mean = variance, mean

    def sample(self, count, seed=1):
        rng = np.random.default_rng(seed)
        side = rng.choice([-1, 1], (count, 1)) * self.mean / np.sqrt(self.dims)
        x = side + np.sqrt(self.variance) * rng.standard_normal((count, self.dims))
        return jnp.asarray(x.reshape(count, *self.shape), jnp.float32)

    def nats(self, x):
        """Exact -log p of each row."""
        x = np.asarray(x, float).reshape(len(x), -1)
        along = x.sum(axis=1) * self.mean / np.sqrt(self.dims) / self.variance
        squares = (np.sum(x**2, axis=1) + self.mean**2) / (2 * self.variance)
        log_norm = 0.5 * self.dims * np.log(2 * np.pi * self.variance) + np.log(2)
        return squares + log_norm - np.logaddexp(along, -along)

    def entropy(self):
        """Expected -log p in nats: that of the mixture along its axis, and of a normal across."""
        y, step = np.linspace(-12, 12, 200_001, retstep=True)

        def density(side):
            return np.exp(-((y - side * self.mean) ** 2) / (2 * self.variance))

        p = (density(1) + density(-1)) / (2 * np.sqrt(2 * np.pi * self.variance))
        along = -np.sum(p * np.log(np.maximum(p, 1e-300))) * step
        return along + 0.5 * (self.dims - 1) * np.log(2 * np.pi * np.e * self.variance)

    def score_fn(self, sde):
        """∇ log p_t in closed form."""

        def score(x, t):
            alpha, std = sde.mean_coeff(t)[:, None], sde.std(t)[:, None]
            flat, var = x.reshape(len(x), -1), alpha**2 * self.variance + std**2
            mean = alpha * self.mean / np.sqrt(self.dims)
            side = jnp.tanh(jnp.sum(flat, axis=1, keepdims=True) * mean / var)
            return ((mean * side - flat) / var).reshape(x.shape)

        return score


class Gaussian:
    """N(mean, U diag(variances) Uᵀ) on images of `shape`, and the score of its diffusion."""

    def __init__(self, shape, variances, mean, seed=0):
        self.shape, self.dims = shape, int(np.prod(shape))
        rng = np.random.default_rng(seed)
        self.basis = np.linalg.qr(rng.standard_normal((self.dims, self.dims)))[0]
        self.variances = np.broadcast_to(np.asarray(variances, float), self.dims)
        self.mean = np.broadcast_to(np.asarray(mean, float), self.dims)

    @property
    def cov(self):
        return (self.basis * self.variances) @ self.basis.T

    def sample(self, count, seed=1):
        z = np.random.default_rng(seed).standard_normal((count, self.dims))
        x = self.mean + (z * np.sqrt(self.variances)) @ self.basis.T
        return jnp.asarray(x.reshape(count, *self.shape), jnp.float32)

    def nats(self, x):
        """Exact -log p of each row."""
        white = (np.asarray(x, float).reshape(len(x), -1) - self.mean) @ self.basis
        log_det = np.log(2 * np.pi * self.variances).sum()
        return 0.5 * (np.sum(white**2 / self.variances, axis=1) + log_det)

    def score_fn(self, sde):
        """∇ log p_t in closed form."""
        basis = jnp.asarray(self.basis, jnp.float32)

        def score(x, t):
            alpha, std = sde.mean_coeff(t)[:, None], sde.std(t)[:, None]
            flat = x.reshape(len(x), -1) - alpha * jnp.asarray(self.mean, jnp.float32)
            white = flat @ basis / (alpha**2 * jnp.asarray(self.variances) + std**2)
            return -(white @ basis.T).reshape(x.shape)

        return score


def loss_fn_of(config, sde, model, num_levels, train):
    """A config's objective for a network: (params, key, images, index) → (losses (N,), τ)."""
    objective = build.get_objective(config, sde, num_levels, axis_name=None)

    def loss_fn(params, key, images, index):
        score_fn = mutils.get_score_fn(config, sde, model, params, train=train)
        return objective(score_fn, key, images, index, train=train)

    return loss_fn


def times_of_step(config, sde, step):
    """τ and the times that a step trains at."""
    images = np.zeros((config.training.batch_size, 2, 2, 1), np.uint8)
    objective = build.get_objective(config, sde)
    return train_step.times_of_step(objective, config.seed, step, images)


def step_fn_of(config, sde, model, optimizer, num_levels):
    """A config's training steps for a network."""
    recipe = train_step.Recipe(
        build.get_objective(config, sde, num_levels),
        score_model(config, sde, model).for_training,
        optimizer,
        seed=config.seed,
        ema_rate=config.model.ema_rate,
        num_micro_batch=config.optim.num_micro_batch,
    )
    return train_step.get_step_fn(recipe)
