"""Building the network of a config, and its score function."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from ml_collections import ConfigDict

from configs.shapes import image_shape
from models import ncsnv2
from models.ncsnpp import NCSNpp
from sde_lib import SDE, expand

Model = nn.Module


@struct.dataclass
class Conditioned:
    """Parameters with the labels of the images that a score is wanted of, in place of parameters.

    Attributes:
      params: the network's parameters.
      classes: (N,) int32; `model.num_classes` stands for no label.
      guidance: w of classifier-free guidance (arXiv 2207.12598), the noise's
        ε̂(x, c) + w (ε̂(x, c) - ε̂(x)).
    """

    params: Any
    classes: Any
    guidance: float = struct.field(pytree_node=False, default=0.0)


def create_model(config: ConfigDict) -> Model:
    """The Flax module of a config: `.apply({"params": p}, x, labels, train=False)`, x is NHWC.

    Its labels are σ(t) for NCSNv2, and for VE and RVE with the Fourier embedding; otherwise they
    are a time scaled to 0 … 999. `get_score_fn` computes them.
    """
    model = config.model
    velocity = model.parametrization == "velocity"
    # The input c_in x of the velocity parametrisation is not in the range of the data.
    dtype, centered = jnp.dtype(model.dtype), config.data.centered or velocity
    if model.name in ncsnv2.NAMES:
        return ncsnv2.NCSNv2(model.name, model.nf, centered, dtype)
    options: dict[str, Any] = {}
    if model.name == "ddpm":  # arXiv 2006.11239, as an option of the U-Net
        options = {"skip_rescale": False, "resblock_type": "ddpm"}
    else:
        options = {
            "skip_rescale": model.skip_rescale,
            "resblock_type": model.resblock_type,
            "fir_kernel": tuple(model.fir_kernel) if model.fir else (),
            "progressive": model.progressive,
            "progressive_input": model.progressive_input,
            "progressive_combine": model.progressive_combine,
            "embedding_type": model.embedding_type,
            "embedding_dim": model.embedding_dim,
            "fourier_scale": model.fourier_scale,
            "fourier_feature": model.fourier_feature,
            "scale_by_sigma": model.scale_by_sigma and model.embedding_type == "fourier",
        }
    return NCSNpp(
        nf=model.nf,
        ch_mult=tuple(model.ch_mult),
        num_res_blocks=model.num_res_blocks,
        attn_resolutions=tuple(model.attn_resolutions),
        dropout=model.dropout,
        init_scale=model.init_scale,
        resamp_with_conv=model.resamp_with_conv,
        centered=centered,
        dtype=dtype,
        remat=model.remat,
        num_classes=model.num_classes,
        **options,
    )


def _init(config: ConfigDict, model: Model) -> Callable[[Array], Any]:
    """The function from a key to initial parameters; it can be traced."""
    x = jnp.zeros((1, *image_shape(config)))
    return lambda key: model.init(key, x, jnp.ones(1))["params"]


def init_params(config: ConfigDict, model: Model, key: Array) -> Any:
    """Initial parameters, float32."""
    # It runs once: on a CPU, XLA's optimisation of it would take four times as long as the rest.
    once = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(_init(config, model), compiler_options=once)(key)


def params_shape(config: ConfigDict, model: Model) -> Any:
    """The shapes of `init_params`; nothing is computed."""
    return jax.eval_shape(lambda: _init(config, model)(jax.random.key(0)))


def _get_labels_fn(config: ConfigDict, sde: SDE) -> Callable[[Array], Array]:
    """A function from t to the network's labels."""
    if not sde.exploding:
        if config.training.unbounded_parametrization:
            constant = config.training.stabilizing_constant
            return lambda t: 999 * sde.unbounded_time(t, constant)
        return lambda t: 999 * t
    if config.model.name in ncsnv2.NAMES or config.model.embedding_type == "fourier":
        return sde.std
    # The index in 1,000 noise levels, from the largest down, equally spaced in log σ and so in γ.
    top, bottom = sde.gamma(sde.T), sde.gamma(config.training.truncation_time)
    return lambda t: 999 * (top - sde.gamma(t)) / (top - bottom)


def preconditioning(sde: SDE, t: Array, sigma_data: float) -> tuple[Array, Array, Array]:
    """Coefficients (c_in, a, b) of the velocity parametrisation's score a x + b F(c_in x, t).

    EDM's preconditioning (arXiv 2206.00364, §5) for x_t = α x_0 + σ z and data of standard
    deviation σ_d: the denoised image is D(x, t) = c_skip x + c_out F(c_in x, t) with

        c_in = 1/√(α² σ_d² + σ²),  c_skip = α σ_d² c_in²,  c_out = σ σ_d c_in.

    The score is (α D - x)/σ², which the coefficients give without a difference of nearly equal
    numbers: a = -c_in² and b = α σ_d c_in/σ. F = 0 is exact for data N(0, σ_d² I). On VP with
    σ_d = 1, -F is the velocity of arXiv 2202.00512: D = α x + σ F; on VE this is EDM's network.
    """
    alpha, std = sde.mean_coeff(t), sde.std(t)
    c_in = jax.lax.rsqrt((alpha * sigma_data) ** 2 + std**2)
    return c_in, -(c_in**2), alpha * sigma_data * c_in / std


def get_score_fn(
    config: ConfigDict, sde: SDE, model: Model, params: Any, train: bool = False
) -> Callable[..., Array]:
    """The score function s_θ(x, t) of a network.

    With `model.parametrization` noise it is -network(x, labels)/σ(t) for VP and sub-VP. For VE and
    RVE (`sde.exploding`) it is network(x, labels), divided by σ(t), here or in the network, if
    `model.scale_by_sigma` is set. With velocity it is that of `preconditioning`, for all SDEs. The
    time labels are the same for both.

    A network with `model.num_classes` that gets parameters alone is told no label; `Conditioned`
    has labels. With guidance, both scores are computed as one batch of twice the size.

    Returns:
      score_fn(x, t) with x (N, H, W, C) and t (N,) → (N, H, W, C) float32. With train=True it is
      score_fn(x, t, dropout_key), with one key for all images or keys (N,).
    """
    labels_fn = _get_labels_fn(config, sde)
    predicts_noise = not sde.exploding
    network_divides_by_sigma = (
        config.model.name in ncsnv2.NAMES or config.model.embedding_type == "fourier"
    )
    divides = predicts_noise or (config.model.scale_by_sigma and not network_divides_by_sigma)
    classes: dict[str, Array] = {}
    if isinstance(params, Conditioned):
        if params.guidance:
            return _guided(config, sde, model, params)
        params, classes = params.params, {"labels": params.classes}

    def score_fn(x: Array, t: Array, dropout_key: Array | None = None) -> Array:
        if dropout_key is not None and dropout_key.ndim == 0:
            dropout_key = jax.random.split(dropout_key, x.shape[0])

        def network(x: Array) -> Array:
            variables = {"params": params}
            options: dict[str, Any] = {"train": train, "dropout_keys": dropout_key, **classes}
            out = model.apply(variables, x, labels_fn(t), **options)
            return jnp.asarray(out, jnp.float32)

        if config.model.parametrization == "velocity":
            c_in, a, b = (expand(c, x) for c in preconditioning(sde, t, config.model.sigma_data))
            return a * x + b * network(c_in * x)
        out = network(x)
        if divides:
            out = out / expand(sde.std(t), x)
        return -out if predicts_noise else out

    return score_fn


def _guided(
    config: ConfigDict, sde: SDE, model: Model, given: Conditioned
) -> Callable[[Array, Array], Array]:
    """The score function of classifier-free guidance, which is linear in the noise's."""
    none = jnp.full_like(given.classes, config.model.num_classes)
    both = Conditioned(given.params, jnp.concatenate([given.classes, none]))
    score_of_both = get_score_fn(config, sde, model, both)

    def score_fn(x: Array, t: Array) -> Array:
        with_label, without = jnp.split(
            score_of_both(jnp.concatenate([x, x]), jnp.concatenate([t, t])), 2
        )
        return with_label + given.guidance * (with_label - without)

    return score_fn
