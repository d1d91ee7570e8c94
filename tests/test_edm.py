"""EDM's networks against the official outputs, and its training against its formulas."""

import json
import os
import pickle
import random
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import build
import run_lib
import soft_truncation
from configs import saved
from configs.errors import UserError
from configs.ve import cifar10_edm
from modes import transfer
from official import edm
from official.edm_pickle import read
from sampling import noise_ratio_grid
from sde_lib import get_sde
from tests import jobs
from tests.edm_reference import Reference
from tests.helpers import GOLDEN, nhwc
from tests.stress.fuzz import damage

FILES = {path.stem: path for path in sorted((GOLDEN / "edm").glob("*.pkl"))}
COND = FILES["edm_ddpmpp_cond"]


def config_of(name):
    config = edm.get_config(str(FILES[name]))
    config.eval.update(nll_steps=32, nelbo_draws=1)
    return config


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """name → the model, imported once."""
    models = {}

    def get(name):
        if name not in models:
            folder, config = tmp_path_factory.mktemp(name), config_of(name)
            transfer.import_official(build.open_run(config, folder), folder, FILES[name])
            models[name] = soft_truncation.load(folder)
        return models[name]

    return get


def golden(name):
    """(x, σ, labels, official denoised images), NHWC."""
    given = np.load(GOLDEN / "edm" / f"{name}.npz")
    return nhwc(given["x"]), given["sigma"], given.get("labels"), nhwc(given["denoised"])


def assert_near(ours, theirs, tolerance=1e-4):
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n == "edm_ddpmpp" else n for n in FILES],
)
def test_an_imported_network_denoises_as_the_official_one(imported, name):
    model, (x, sigma, labels, denoised) = imported(name), golden(name)
    told = None if labels is None else labels.argmax(axis=1)
    assert_near(np.asarray(model.denoise(x, sigma=sigma, labels=told)), denoised)
    assert_near(Reference(read(FILES[name])).denoise(x, sigma, labels), denoised, 1e-6)
    about = json.loads((GOLDEN / "edm" / f"{name}.json").read_text())
    if about["precond"] != "EDMPrecond":
        ends = about["sigma_min"], about["sigma_max"]
        np.testing.assert_allclose(model.sigma_range, ends, rtol=0.03)  # the file's is rounded
    if labels is not None:
        unlabelled = nhwc(np.load(GOLDEN / "edm" / f"{name}.npz")["denoised_unlabelled"])
        assert_near(np.asarray(model.denoise(x, sigma=sigma)), unlabelled)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_an_imported_network_has_bits_per_dim(imported, name):
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    bits = imported(name).bits_per_dim(images, draws=1, batch_size=4)
    for score in ("nll", "nelbo", "nelbo_lossless", "nll_truncated_normal"):
        assert np.isfinite(bits[score]).all() and (bits[score] > 0).all(), score


@pytest.mark.slow
def test_the_command_imports_a_network_that_trains_on(tmp_path):
    images, run = tmp_path / "images.npy", tmp_path / "run"
    np.save(images, np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8))
    options = ["data.dataset=array", f"data.path={images}", "data.num_levels=256"]
    options += ["training.batch_size=4", "training.n_iters=2", "training.snapshot_sampling=False"]
    command = [*jobs.MAIN, "--mode=import", f"--checkpoint={FILES['edm_ddpmpp']}"]
    command += [f"--workdir={run}", *(f"--config.{option}" for option in options)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before = read(FILES["edm_ddpmpp"]).tensors["dec.8x8_aux_conv.bias"]
    state = run_lib.train(saved.get_config(run), run)
    after = np.asarray(state.params["Conv_1"]["bias"])
    assert jobs.steps_of(run) == [0, 2] and 0 < np.abs(after - before).max() < 1e-3
    again = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert again.returncode == 2 and "has checkpoints already" in jobs.last_line(again.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["edm_ddpmpp_cond", "edm_ncsnpp"])
def test_the_gradient_is_that_of_edms_loss(name):
    config, network = edm.get_config(str(FILES[name])), read(FILES[name])
    setup, labels = build.set_up(config), np.array([1, 3, 0, 4])  # 4: none
    told = np.eye(5)[labels][:, :4] if name.endswith("cond") else None
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    draws = setup.objective.draw(jax.random.key(0), images, jnp.arange(4), train=False)

    def loss(params):
        classes = None if told is None else jnp.asarray(labels)
        score_fn = setup.make_score_fn(params, classes)
        return jnp.mean(setup.objective.losses(lambda x, t, _: score_fn(x, t), draws))

    params = edm.convert(network.tensors)
    value, gradient = jax.value_and_grad(loss)(jax.tree.map(jnp.asarray, params))
    x0, noise = (np.asarray(part, float) for part in (draws.x0, draws.z))
    given = x0, noise, np.asarray(setup.sde.std(draws.t), float), told
    np.testing.assert_allclose(value, Reference(network).loss(*given), rtol=1e-4)
    rng, tensors = np.random.default_rng(1), network.tensors
    for _ in range(10):
        step = {
            k: rng.standard_normal(v.shape) * (k != "map_noise.freqs")
            for k, v in tensors.items()
            if "resample_filter" not in k
        }

        higher, lower = (
            Reference(
                network._replace(tensors={k: v + h * step.get(k, 0) for k, v in tensors.items()})
            )
            for h in (1e-5, -1e-5)
        )
        slope = (higher.loss(*given) - lower.loss(*given)) / 2e-5
        ours = jax.tree.map(lambda g, s: np.sum(np.float64(g) * s), gradient, edm.convert(step))
        np.testing.assert_allclose(sum(jax.tree.leaves(ours)), slope, rtol=2e-3)


def test_the_noise_of_training_has_edms_distribution():
    config = cifar10_edm.get_config()
    objective = build.get_objective(config, get_sde(config), axis_name=None)
    u = (np.arange(4000) + 0.5) / 4000
    t, whole = objective.times(jnp.asarray(u), jnp.asarray(objective.truncation_time))
    sigma = np.asarray(objective.sde.std(t), float)
    assert abs(np.log(sigma).mean() + 1.2) < 2e-3 and abs(np.log(sigma).std() - 1.2) < 5e-3
    # λ(σ) σ⁴ twice, since the loss of a score has one half.
    np.testing.assert_allclose(whole, 2 * (sigma**2 + 0.25) * sigma**2 / 0.25, rtol=1e-3)
    # A truncation takes its part of the same integral.
    tau = objective.sde.inverse_gamma(2 * jnp.log(0.3))
    late, part = objective.times(jnp.asarray(u), tau)
    value = np.asarray(part) / np.asarray(objective.sde.std(late)) ** 4
    expected = np.where(sigma >= 0.3, whole / sigma**4, 0)
    assert late.min() >= tau and abs(value.mean() / expected.mean() - 1) < 5e-3


@pytest.mark.parametrize("sde", ["vpsde", "vesde"])
def test_the_objective_weighs_the_error_of_the_denoised_image(sde):
    config, seen = cifar10_edm.get_config(), []
    config.training.update(sde=sde, truncation_time=1e-4, reduce_mean=True)
    objective = build.get_objective(config, get_sde(config), axis_name=None)
    sde = objective.sde

    def score_fn(x, t, dropout_keys):
        seen.append((x, t))
        return jnp.zeros_like(x)  # so that the denoised image is x/α

    images = np.zeros((500, 2, 2, 1), np.uint8)
    found, tau = objective(score_fn, jax.random.key(0), images, jnp.arange(500), train=False)
    ((x, t),) = seen
    ratio = np.asarray(sde.std(t) / sde.mean_coeff(t), np.float64)
    statistic = scipy.stats.kstest(np.log(ratio), scipy.stats.norm(-1.2, 1.2).cdf)
    assert statistic.pvalue > 1e-3 and tau == np.float32(1e-4)
    error = np.mean((x / sde.mean_coeff(t)[:, None, None, None] + 1) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(found, (ratio**2 + 0.25) / (0.25 * ratio**2) * error, rtol=2e-3)


def test_heuns_steps_are_those_of_edms_sampler():
    config = cifar10_edm.get_config()
    sde = get_sde(config)
    times = noise_ratio_grid(sde, config.sampling.truncation_time, config.sampling.num_steps)
    ends = 80 ** (1 / 7), 0.002 ** (1 / 7)
    edms = (ends[0] + np.arange(18) / 17 * (ends[1] - ends[0])) ** 7
    np.testing.assert_allclose(sde.std(times), edms, rtol=2e-4)


def test_the_recipe_fits_its_checkpoints():
    recipe, config = cifar10_edm.get_config(), edm.get_config(str(COND))
    differ = {
        name
        for section in ("data", "model", "optim", "training", "sampling", "eval")
        for name, value in config[section].items()
        if recipe[section][name] != value
    }
    body = {"nf", "ch_mult", "num_res_blocks", "attn_resolutions", "dropout"}
    assert differ == body | {"num_classes", "image_size", "label_dropout"}


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b"EDMPrecond", b"ADMPrecond", "its preconditioning is ADMPrecond"),
        (b"SongUNet", b"AdamUNet", "its network is AdamUNet; only DDPM"),
        (b"_load_from_bytes", b"_read_from_bytes", "_read_from_bytes, which no network"),
        (b"\x8c\x03ema", b"\x8c\x03net", "no network under 'ema'"),
        (b"positional", b"projective", "other parts than EDM's"),
        (b"\x8c\x09label_dim", b"\x8c\x09label_dam", "KeyError: 'label_dim'"),
    ],
)
def test_another_network_is_refused(tmp_path, old, new, reason):
    raw = COND.read_bytes()
    assert old in raw
    (tmp_path / "x.pkl").write_bytes(raw.replace(old, new))
    with pytest.raises(UserError, match=reason) as caught:
        edm.get_config(str(tmp_path / "x.pkl"))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model.nf": 16}, r"AttnBlock_0.*Dense_0.*\(16,\) there and \(32,\)"),
        ({"model.name": "ncsnpp"}, "model.name is 'edm' there and 'ncsnpp' in the config"),
        ({"model.sigma_data": 1.0}, "model.sigma_data is 0.5 there and 1.0 in the config"),
        ({"training.sde": "vpsde"}, "training.sde is 'vesde' there and 'vpsde' in the config"),
    ],
)
def test_a_config_of_another_network_is_refused(changes, reason):
    config = edm.get_config(str(COND))
    config.update_from_flattened_dict(changes)
    setup = build.set_up(config)
    with pytest.raises(UserError, match=reason):
        edm.load_params(COND, setup.fields, setup.state_shape.params)


# Files of strangers


def text(value):
    """A pickled string."""
    return b"\x8c" + bytes([len(value)]) + value.encode()


def call(module, name, arguments):
    """A pickled call of what a module has."""
    return text(module) + text(name) + b"\x93" + arguments + b"R"


def network(ema):
    return b"\x80\x04}" + text("ema") + ema + b"s."


MODULE = "torch_utils.persistence", "_reconstruct_persistent_obj"
LOAD = "torch.storage", "_load_from_bytes"
DEEP = b")" + b"\x85" * 100_000
HEAD = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
# A storage's bytes say that it has 2^40 values.
LONG = (
    b"".join(pickle.dumps(part, 2) for part in HEAD)
    + b"\x80\x02("
    + (
        text("storage")
        + b"ctorch\nFloatStorage\n"
        + text("0")
        + text("cpu")
        + b"\x8a\x06\0\0\0\0\0\1NtQ."
    )
)


def module(kind, state):
    return call(*MODULE, b"}(" + text("class_name") + text(kind) + text("state") + state + b"u\x85")


def inside(modules):
    return b"}" + text("_modules") + modules + b"s"


# A dictionary of modules that has itself, fifty times.
CYCLE = (
    text("torch.nn.modules.container")
    + text("ModuleDict")
    + b"\x93)\x81\x94"
    + (inside(b"}(" + b"".join(text(f"m{i}") + b"h\x00" for i in range(50)) + b"u") + b"b")
)


def block(raw):
    return b"B" + struct.pack("<I", len(raw)) + raw + b"\x85"


def hostile_files(marker):
    """The contents of files that would run, import, allocate or loop."""
    body = module("SongUNet", inside(b"}" + text("enc") + CYCLE + b"s"))
    evil = [
        call("posix", "system", text(f"touch {marker}") + b"\x85"),
        call("os", "system", text(f"touch {marker}") + b"\x85"),
        call("builtins", "exec", text(f"open({str(marker)!r}, 'w')") + b"\x85"),
        call("evil_module", "run", b")"),
        call("torch_utils.persistence", "evil", b")"),
        call("torch.storage", "_load_from_bytes.__globals__", b")"),
        text("evil_module") + text("name") + b"\x93",
        b"cevil_module\nrun\n)R",
        b"(ievil_module\nrun\n",
        b"\x82\x01",
        b"\x80\x05\x96" + b"\xff" * 8,
        call(*LOAD, b"B\xff\xff\xff\x7f" + b"x" * 99 + b"\x85"),
        call(*LOAD, b"C\x02ab\x85"),
        call(*LOAD, block(LONG)),
        call(*LOAD, block(bytes(2**25 + 1))),
        call(*MODULE, DEEP),
        call(*MODULE, b"}\x85"),
        call(*MODULE, DEEP + b"\x85"),
        module("", DEEP),
        module("EDMPrecond", inside(b"}" + text("model") + body + b"s")),
        DEEP,
        *(opcode * 2**26 for opcode in (b"}", b"]", b")", b"(")),
        b"}\x94" * 2**25,
    ]
    return [network(ema) for ema in evil]


READ = """
import pathlib, resource, sys
from configs.errors import UserError
from official import edm
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 2**30, taken + 2**30))
sys.path.insert(0, sys.argv[1])
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.pkl"), key=lambda p: int(p.stem)):
    known = set(sys.modules)
    try:
        edm.get_config(str(path)), edm.read_params(path)
        print(path.stem, "read")
    except UserError as error:
        lines = str(error).splitlines()
        print(path.stem, "refused" if len(lines) == 1 else "wrong", lines[0][:200])
    if set(sys.modules) - known:
        print(path.stem, "imported", set(sys.modules) - known)
"""


@pytest.mark.slow
def test_hostile_and_damaged_files_are_refused_in_one_line(tmp_path):
    folder, marker, raw = tmp_path / "files", tmp_path / "ran", COND.read_bytes()
    folder.mkdir()
    (folder / "evil_module.py").write_text(f"open({str(marker)!r}, 'w')\nrun = print\n")
    files = [b"", *hostile_files(marker)]  # the first becomes larger than any that is read
    # Each name that the file has is exchanged for others; then it is cut in many places.
    for name in (
        "_rebuild_tensor_v2",
        "torch._utils",
        "OrderedDict",
        "torch.storage",
        "collections",
    ):
        files += [raw.replace(text(name), text(other)) for other in ("evil_module", "os", "run")]
    draw = random.Random(0)
    files += [raw[: draw.randrange(len(raw))] for _ in range(60)]
    must = len(files)
    while len(files) < 240:
        files.append(damage(draw, raw))
    for i, content in enumerate(files):
        (folder / f"{i}.pkl").write_bytes(content)
    os.truncate(folder / "0.pkl", 2**29)
    done = subprocess.run(
        [sys.executable, "-c", READ, str(folder)], cwd=jobs.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split(" ", 2) for line in done.stdout.splitlines()]
    assert len(rows) == len(files) and all(kind in ("read", "refused") for _, kind, *_ in rows)
    assert [kind for _, kind, *_ in rows[:must]] == ["refused"] * must
    assert sum(kind == "refused" for _, kind, *_ in rows) >= 200
    assert not marker.exists()
