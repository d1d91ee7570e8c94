"""Memory of training, sampling and bits/dim of the published recipes, by XLA's own analysis.

python -m benchmarks.memory                                # all recipes, for this machine's device
python -m benchmarks.memory --target h100                  # for an H100, without a GPU
python -m benchmarks.memory configs/rve/church_uncsn.py    # some

Each program is compiled at its full size, and not run. Recipes whose programs have the same shapes
share a row. A cell has XLA's GiB, and in brackets the estimate that a run logs at its start before
it compiles anything (`runtime.memory`).

For `--target h100` XLA compiles for a GPU that is not there; that wants the CUDA compiler:
pip install "jax[cuda13]==<the version of jax>". Convolutions are not tuned then, so that their work
space is not known.
"""

import contextlib
import json
import os
import pathlib
import runpy
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import numpy as np
from clu.parameter_overview import count_parameters
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

import build
from benchmarks.measure import Table, get_parser
from metrics import bits_per_dim, memory_advice
from models import norm_kernels
from runtime import memory

ROOT = pathlib.Path(__file__).parents[1]
# XLA's description of an H100 with 80 GB.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84942979072
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@contextlib.contextmanager
def target_device(name: str) -> Iterator[Any]:
    """The device to compile for; the code within takes the paths of that device."""
    if not name:
        yield jax.devices()[0]
        return
    try:
        topology = topologies.get_topology_desc(
            "h100", "cuda", target_config=H100, topology="1x1x1"
        )
    except Exception as error:  # of the plug-in, which may be missing or of another version
        raise SystemExit(f"XLA can't compile for an H100 here: {error}; see --help") from error
    with (
        mock.patch("jax.default_backend", return_value="gpu"),
        mock.patch.object(norm_kernels, "work", return_value=True),
    ):
        yield topology.devices[0]


def compiled_bytes(device: Any, program: Callable[..., Any], shapes: Any, donate: bool) -> int:
    """The memory, in bytes, of a program compiled for a device, with its arguments and results."""
    mesh = Mesh(np.array([device]), ("batch",))
    everywhere = PartitionSpec()
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, everywhere)),
        shapes,
    )
    on_device = jax.shard_map(
        program, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False
    )
    compiled = jax.jit(on_device, donate_argnums=0 if donate else ()).lower(*placed).compile()
    used = compiled.memory_analysis()
    assert used, "this backend has no memory analysis"
    results = used.output_size_in_bytes - used.alias_size_in_bytes
    return used.argument_size_in_bytes + used.temp_size_in_bytes + results


def programs(config: ConfigDict) -> Iterator[tuple[str, Any, Any, bool]]:
    """(column, function, shapes, whether its state is donated) of what a recipe runs."""
    for dtype, remat in (("float32", False), ("bfloat16", False), ("bfloat16", True)):
        changed = config.copy_and_resolve_references()
        changed.model.update(dtype=dtype, remat=remat)
        name = f"train, {dtype}" + (", remat" if remat else "")
        yield name, *memory_advice.train_program(build.set_up(changed)), True
    batch = config.eval.sampling_batch_size or config.eval.batch_size
    yield "sample", *memory_advice.sample_program(build.set_up(config), batch), False
    if config.eval.enable_bpd:
        setup = build.set_up(config)
        yield "bits/dim", *bits_per_dim.bits_program(setup, config.eval.batch_size), False


COLUMNS = (
    "train, float32",
    "train, bfloat16",
    "train, bfloat16, remat",
    "sample",
    "bits/dim",
)


def shape_of_work(config: ConfigDict) -> str:
    """What the memory depends on; recipes that have this in common share a row."""
    evaluation, sampling = config.eval, config.sampling
    of_sampler = sampling.method, sampling.predictor, sampling.corrector
    batches = config.training.batch_size, evaluation.batch_size, evaluation.sampling_batch_size
    fields = {
        name: value
        for name, value in config.model.to_dict().items()
        if not name.startswith(("sigma_", "beta_")) and name not in ("ema_rate", "num_scales")
    }
    size = config.data.image_size, evaluation.enable_bpd, evaluation.nll_steps > 0
    return json.dumps([fields, of_sampler, batches, size])


def cells_of(config: ConfigDict, device: Any, columns: Sequence[str]) -> Iterator[str]:
    """A recipe's cells: parameters, state, batches, and the columns that are asked for."""
    state = build.set_up(config).state_shape
    yield f"{count_parameters(state.params) / 1e6:.1f}"
    yield f"{sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / 2**30:.2f}"
    scored = [config.eval.batch_size] if config.eval.enable_bpd else []
    sampled = config.eval.sampling_batch_size or config.eval.batch_size
    yield " / ".join(map(str, (config.training.batch_size, sampled, *scored)))
    cells = dict.fromkeys(columns, "")
    for column, program, shapes, donate in programs(config):
        if column in columns:
            estimate = memory.needed_bytes(program, *shapes, donate=int(donate))
            size = compiled_bytes(device, program, shapes, donate)
            cells[column] = f"{size / 2**30:.3g} ({estimate / 2**30:.3g})"
    yield from cells.values()


def main() -> None:
    """Print the table, each row as soon as it is known."""
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    parser = get_parser(__doc__)
    parser.add_argument("recipes", nargs="*", type=pathlib.Path)
    parser.add_argument("--target", choices=["h100"], help="compile for this device")
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=COLUMNS)
    flags = parser.parse_args()
    found = sorted((ROOT / "configs").glob("*/*_*.py"))
    published = [path for path in found if not path.stem.startswith(("digits", "folder", "_"))]
    groups: dict[str, dict[str, ConfigDict]] = {}
    for path in flags.recipes or published:
        config = runpy.run_path(str(path))["get_config"]()
        groups.setdefault(shape_of_work(config), {})[f"{path.parent.name}/{path.stem}"] = config
    table = Table("recipes", "parameters, M", "state, GiB", "batches", *flags.columns)
    with target_device(flags.target) as device:
        for group in groups.values():
            config, *_ = group.values()
            table.add(", ".join(group), *cells_of(config, device, flags.columns))
    table.show()


if __name__ == "__main__":
    main()
