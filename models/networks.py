"""The networks that `model.name` can name."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from models.edm import EDM
from models.ncsnpp import NCSNpp
from models.ncsnv2 import STAGES, NCSNv2


@dataclasses.dataclass(frozen=True)
class Network:
    """A network and what the rest of the program must know of it.

    The parameters of the functions are named after fields of `config.model`, `config.data` and
    `config.training`, and get their values.

    Attributes:
      create: a Flax module's class, or a function that makes a module, which is called as
        `NCSNpp` is, and may say that it `sees_sigma` or have a `c_noise`
        (`models.score.ScoreModel`). Its `centered` is whether x is in the range [-1, 1]. With
        `num_classes` it can be told labels, with `remat` it can compute again instead of keeping.
      fixed: arguments of `create` that no config changes.
      without: fields of `config.model` that must have these values, as the network has no others.
      size_factor: the function that gives the number by which heights and widths are divided.
      problems: the function that says why a config can't have this network, each in one line. It
        can also take the `height` and `width` of images, and whether the SDE is `exploding`.
      in_release: whether the official release has checkpoints of it.
    """

    create: Callable[..., Any]
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    without: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    size_factor: Callable[..., int] = lambda: 1
    problems: Callable[..., Iterable[str]] = lambda: ()
    in_release: bool = False

    def takes(self, field: str) -> bool:
        """Whether a config's `field` is an argument of the network."""
        return field in inspect.signature(self.create).parameters and field not in self.fixed


def _problems_of_unet(
    nf: int,
    ch_mult: Sequence[int],
    embedding_type: str,
    embedding_dim: int,
    fir: bool,
    fir_kernel: Sequence[float],
    unbounded_parametrization: bool,
) -> Iterator[str]:
    if nf % 4:
        yield f"model.nf is {nf}; it must be a multiple of 4"
    if embedding_dim % 2 or embedding_dim == 2:
        yield f"model.embedding_dim is {embedding_dim}; it must be even, and 4 or more"
    if embedding_type == "fourier":
        if unbounded_parametrization:
            yield "training.unbounded_parametrization needs model.embedding_type=positional"
        if embedding_dim not in (0, nf):
            yield "model.embedding_dim is of the positional embedding; the Fourier one has nf"
    taps = tuple(fir_kernel)
    numbers = all(isinstance(tap, int | float) and math.isfinite(tap) for tap in taps)
    if fir and (not numbers or not taps or len(taps) % 2 or sum(taps) <= 0):
        yield f"model.fir_kernel is {taps}; it must be an even number of taps with a positive sum"
    if not ch_mult:
        yield "model.ch_mult is empty; it must name a factor for each resolution"


def _problems_of_ncsnv2(
    name: str, parametrization: str, exploding: bool, height: int, width: int
) -> Iterator[str]:
    if parametrization == "velocity":
        yield f"model.name={name} has no velocity: model.parametrization must be noise"
    if not exploding:
        yield f"model.name={name} needs training.sde vesde or reciprocal_vesde"
    if height != width:
        yield f"model.name={name} is for squares; the data are {height}×{width}"


def _unet(create: Callable[..., Any] = NCSNpp, **about: Any) -> Network:
    return Network(
        create,
        size_factor=lambda ch_mult, patch_size: patch_size * 2 ** (len(ch_mult) - 1),
        problems=_problems_of_unet,
        in_release=create is NCSNpp,
        **about,
    )


def _ncsnv2(stages: tuple[tuple[int, int], ...]) -> Network:
    fixed = {"stages": stages}
    return Network(NCSNv2, fixed, size_factor=lambda: 8, problems=_problems_of_ncsnv2)


# A config file can register more (docs/extending.md).
NETWORKS: dict[str, Network] = {
    "ncsnpp": _unet(),
    "ddpm": _unet(  # arXiv 2006.11239
        fixed={"skip_rescale": False, "resblock_type": "ddpm"},
        without={
            "fir": False,
            "progressive": "none",
            "progressive_input": "none",
            "embedding_type": "positional",
            "embedding_dim": 0,
            "fourier_feature": False,
            "patch_size": 1,
        },
    ),
    "edm": _unet(EDM, without={"embedding_dim": 0}),
    **{name: _ncsnv2(stages) for name, stages in STAGES.items()},
}

# Networks of this project; a config file registers its own later.
BUILT_IN = frozenset(NETWORKS)
