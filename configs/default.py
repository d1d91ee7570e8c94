"""Defaults that every recipe starts from, and the checks that a config must pass.

Field names are the official release's wherever the meaning is the same. Three differ on purpose:
`training.truncation` replaces the flag `st`; `training.likelihood_weighting` says which weighting
the objective has, however its time is drawn; `model.dtype` is ours.
"""

import math
from collections.abc import Iterator

from ml_collections import ConfigDict


class UserError(Exception):
    """Something that the user can mend; main.py prints it as one line, without a traceback."""


def get_default_config() -> ConfigDict:
    """The defaults: VP, DDPM++, CIFAR-10's size, the likelihood weighting with soft truncation."""
    config = ConfigDict()
    config.seed = 42

    config.data = data = ConfigDict()
    data.dataset = "CIFAR10"  # digits, fashion_mnist, CIFAR10 or folder
    data.path = ""  # folder of images or of IDX files; empty: where the data set usually is
    data.tfds_dir = ""  # where TFDS keeps its data; empty: TFDS's own default
    data.image_size = 32
    data.num_channels = 3
    data.centered = True  # images in [-1, 1] rather than [0, 1]
    data.random_flip = True
    data.dequantization = "uniform"  # none or uniform

    config.model = model = ConfigDict()
    model.name = "ncsnpp"
    model.dtype = "float32"  # compute dtype: float32 or bfloat16; parameters are always float32
    model.nf = 128
    model.ch_mult = (1, 2, 2, 2)
    model.num_res_blocks = 4
    model.attn_resolutions = (16,)
    model.dropout = 0.1
    model.skip_rescale = True
    model.init_scale = 0.0
    model.ema_rate = 0.9999
    model.beta_min = 0.1
    model.beta_max = 20.0
    model.num_scales = 1000  # steps of the PC sampler

    config.optim = optim = ConfigDict()
    optim.optimizer = "Adam"
    optim.lr = 2e-4
    optim.beta1 = 0.9
    optim.eps = 1e-8
    optim.weight_decay = 0.0
    optim.warmup = 5000
    optim.grad_clip = 1.0  # global norm; negative: no clipping
    optim.num_micro_batch = 1

    config.training = training = ConfigDict()
    training.sde = "vpsde"
    training.batch_size = 128  # over all devices
    training.n_iters = 1_300_001
    training.truncation = "soft"  # fixed, soft or equivalent_weight
    training.k = 1.0  # exponent of the prior on the truncation
    training.truncation_time = 1e-5
    training.likelihood_weighting = True  # λ = g²; else λ = σ²
    training.importance_sampling = True  # t ~ g²/σ²; else uniform
    training.reduce_mean = True  # loss per dimension rather than per image
    training.log_freq = 100
    training.eval_freq = 1000  # loss on the test split
    training.snapshot_freq = 100_000  # checkpoints that are kept for good
    training.snapshot_freq_for_preemption = 10_000  # checkpoints to resume from; two are kept
    training.snapshot_sampling = True  # a grid of samples at every snapshot

    config.sampling = sampling = ConfigDict()
    sampling.method = "pc"  # pc or ode
    sampling.predictor = "euler_maruyama"  # euler_maruyama or reverse_diffusion
    sampling.corrector = "none"  # none or langevin
    sampling.n_steps_each = 1
    sampling.snr = 0.16
    sampling.noise_removal = True
    sampling.truncation_time = 1e-5
    sampling.rtol = 1e-5
    sampling.atol = 1e-5
    sampling.batch_size = 64  # images in a grid, and of --mode sample
    sampling.n_images = 64  # --mode sample

    config.eval = evaluation = ConfigDict()
    evaluation.batch_size = 200
    evaluation.enable_sampling = True
    evaluation.enable_bpd = True
    evaluation.num_samples = 50_000
    evaluation.num_test_data = 10_000
    evaluation.nelbo_draws = 4  # times drawn for each image
    evaluation.rtol = 1e-5
    evaluation.atol = 1e-5
    evaluation.cache_dir = ""  # for the classifier; empty: the user's cache folder
    return config.lock()  # a recipe's misspelt field is an error


_CHOICES = {
    "data.dataset": ("digits", "fashion_mnist", "CIFAR10", "folder"),
    "data.dequantization": ("none", "uniform"),
    "model.name": ("ncsnpp",),
    "model.dtype": ("float32", "bfloat16"),
    "optim.optimizer": ("Adam",),
    "training.sde": ("vpsde",),
    "training.truncation": ("fixed", "soft", "equivalent_weight"),
    "sampling.method": ("pc", "ode"),
    "sampling.predictor": ("euler_maruyama", "reverse_diffusion"),
    "sampling.corrector": ("none", "langevin"),
}

_POSITIVE = [
    "data.image_size",
    "data.num_channels",
    "model.nf",
    "model.num_res_blocks",
    "model.ema_rate",
    "model.beta_max",
    "model.num_scales",
    "optim.lr",
    "optim.eps",
    "optim.num_micro_batch",
    "training.batch_size",
    "training.n_iters",
    "training.truncation_time",
    "training.log_freq",
    "training.eval_freq",
    "training.snapshot_freq",
    "training.snapshot_freq_for_preemption",
    "sampling.n_steps_each",
    "sampling.snr",
    "sampling.truncation_time",
    "sampling.rtol",
    "sampling.atol",
    "sampling.batch_size",
    "sampling.n_images",
    "eval.batch_size",
    "eval.num_samples",
    "eval.num_test_data",
    "eval.nelbo_draws",
    "eval.rtol",
    "eval.atol",
]

_NOT_NEGATIVE = "model.dropout model.init_scale model.beta_min optim.weight_decay optim.warmup"


def _problems(config: ConfigDict, num_devices: int) -> Iterator[str]:
    get = lambda name: config[name.split(".")[0]][name.split(".")[1]]  # noqa: E731
    for name in ("model.ch_mult", "model.attn_resolutions"):
        if not all(isinstance(n, int) and n > 0 for n in get(name)):
            yield f"{name} is {tuple(get(name))}; it must be a list of positive whole numbers"
    for name, choices in _CHOICES.items():
        if get(name) not in choices:
            yield f"{name} is {get(name)!r}; it must be one of {', '.join(choices)}"
    for name in _POSITIVE:
        if not (get(name) > 0 and math.isfinite(get(name))):
            yield f"{name} is {get(name)}; it must be a positive number"
    for name in _NOT_NEGATIVE.split():
        if not (get(name) >= 0 and math.isfinite(get(name))):
            yield f"{name} is {get(name)}; it must not be negative"
    if not (config.training.k >= 0):
        yield f"training.k is {config.training.k}; it must be at least 0 (inf: fixed truncation)"
    for name in ("training.truncation_time", "sampling.truncation_time", "model.dropout"):
        if get(name) >= 1:
            yield f"{name} is {get(name)}; it must be below 1"
    for name in ("model.ema_rate", "optim.beta1"):
        if not 0 <= get(name) < 1:
            yield f"{name} is {get(name)}; it must be in [0, 1)"
    if config.model.beta_max <= config.model.beta_min:
        yield "model.beta_max must be larger than model.beta_min"
    if config.data.num_channels not in (1, 3):
        yield f"data.num_channels is {config.data.num_channels}; it must be 1 (grey) or 3 (RGB)"
    if 0 < config.eval.num_samples < 4:
        yield f"eval.num_samples is {config.eval.num_samples}; precision and recall need 4 or more"
    if config.data.dataset == "folder" and not config.data.path:
        yield "data.dataset=folder needs data.path, the folder of images"
    if config.model.nf % 4:
        yield f"model.nf is {config.model.nf}; it must be a multiple of 4"
    if not config.model.ch_mult:
        yield "model.ch_mult is empty; it must name a factor for each resolution"
    factor = 2 ** (len(config.model.ch_mult) - 1)
    if config.data.image_size % factor:
        yield (
            f"data.image_size is {config.data.image_size}; {len(config.model.ch_mult)} levels in "
            f"model.ch_mult halve it that many times less one, so it must be a multiple of {factor}"
        )
    batch, micro = config.training.batch_size, config.optim.num_micro_batch
    if micro >= 1 and batch % (num_devices * micro):
        yield (
            f"training.batch_size is {batch}; it must be a multiple of the number of devices "
            f"({num_devices}) times optim.num_micro_batch ({micro})"
        )
    if not 0 <= config.seed < 2**32 - 8:
        yield f"seed is {config.seed}; it must be between 0 and {2**32 - 9}"
    steps, chain = config.model.num_scales, config.sampling.predictor == "reverse_diffusion"
    chain = chain or config.sampling.corrector == "langevin"
    if steps < 2:
        yield f"model.num_scales is {steps}; the PC sampler takes at least 2 steps"
    if config.sampling.method == "pc" and chain and config.model.beta_max >= steps - 1:
        yield (
            f"model.num_scales is {steps}; reverse_diffusion and langevin need more steps than "
            f"model.beta_max ({config.model.beta_max:g}) + 1"
        )


def validate(config: ConfigDict, num_devices: int) -> None:
    """Refuse a config that cannot work.

    Raises:
      UserError: one line that names the first wrong field.
    """
    for problem in _problems(config, num_devices):
        raise UserError(f"config: {problem}")
