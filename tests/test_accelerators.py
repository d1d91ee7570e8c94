"""What only accelerators, large states and several processes do, on CPU devices."""

import json
import os
import signal
import subprocess
import sys
import time
import types
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import build
import evaluation
import run_lib
import train_step
from benchmarks.memory import compiled_bytes
from configs import fields, parts, saved
from configs.errors import UserError
from configs.rve import celebahq_256_uncsn, church_uncsn, ffhq_1024_uncsn
from configs.saved import as_recorded
from metrics import in_training, memory_advice, training_log
from models import layers, ncsnpp, norm_kernels
from readers import tfds
from runtime import hosts, memory, workdir
from runtime.metrics_log import read_metrics
from tests.helpers import random_params, tiny_config
from tests.jobs import ROOT, TINY, assert_identical, start_several, state_of, wait_until

# main.py with several steps a call and the data on the device, as on an accelerator.
AS_ON_AN_ACCELERATOR = """
import sys
import train_step
train_step._on_accelerator = lambda: True
import main
from absl import app
app.run(main.main, flags_parser=main._parse)
"""


def start(*args, processes=2, devices=4):
    """main.py in several processes over loopback."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "devices": devices}
    return start_several(processes, *args, program=("-c", AS_ON_AN_ACCELERATOR), **options)


def finish(processes):
    """The outputs of processes that must end well."""
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return outputs


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 5000])
def test_a_large_state_is_shared_in_parts(monkeypatch, size):
    state = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    value = [{"state": state, "name": np.array("x")}, None, ["a", 0.5, True]]
    sent = []

    def broadcast(x):
        if hosts.is_main():
            sent.append(np.asarray(x))
            return x
        return sent.pop(0)

    monkeypatch.setattr(hosts.jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts.multihost_utils, "broadcast_one_to_all", broadcast)
    monkeypatch.setattr(hosts, "_PART", 1000)
    of_main = hosts.share(value)
    assert max(len(part) for part in sent) <= 1000
    monkeypatch.setattr(hosts, "is_main", lambda: False)
    for received in (of_main, hosts.share(None)):
        np.testing.assert_equal(received, value)
        assert received[0]["state"].dtype == np.uint8


def test_a_tree_is_shared_without_pickle(monkeypatch):
    monkeypatch.setattr(hosts.jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts.multihost_utils, "broadcast_one_to_all", lambda x: x)
    setup = build.set_up(tiny_config())
    state = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), setup.state_shape)
    received = hosts.share(state, like=setup.state_shape)
    assert jax.tree.structure(received) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, received, state)
    dtypes = [[x.dtype for x in jax.tree.leaves(tree)] for tree in (received, state)]
    assert dtypes[0] == dtypes[1]
    assert hosts.share(None, like=setup.state_shape) is None
    with pytest.raises(TypeError, match="a Path can't be shared"):
        hosts.share(type("Path", (), {})())


def test_a_process_with_another_config_or_other_data_is_named_by_all(monkeypatch):
    of_main, others = {"seed": 1, "data": "a"}, {"seed": 1, "data": "b"}
    found = []
    monkeypatch.setattr(hosts.jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts, "share", lambda _: of_main)
    gather = hosts.multihost_utils
    monkeypatch.setattr(gather, "process_allgather", lambda x: found.append(x) or np.array(found))
    hosts.check_equal(of_main)
    with pytest.raises(UserError, match="data of process 1 is not that of process 0, 'a'; start"):
        hosts.check_equal(others)


def test_paths_may_differ_between_processes_and_nothing_else(monkeypatch):
    told, config = [], tiny_config()
    monkeypatch.setattr(hosts, "check_equal", told.append)
    for field, value in {"data.path": "/b", "training.n_iters": 7, "seed": 3}.items():
        workdir.check_processes(as_recorded(config), {"data": "a"})
        config.update_from_flattened_dict({field: value})
        workdir.check_processes(as_recorded(config), {"data": "a"})
        same = told[-1] == told[-2]
        assert same == (field == "data.path")


@pytest.mark.parametrize("recipe", [church_uncsn, celebahq_256_uncsn, ffhq_1024_uncsn])
def test_large_images_are_evaluated_in_the_batches_of_the_release(recipe):
    config = recipe.get_config()
    assert config.eval.batch_size == 16 and not config.eval.enable_bpd
    assert fields.call(parts.Evaluation, config, "eval").samples_a_batch == 16
    config.eval.sampling_batch_size = 5
    assert fields.call(parts.Evaluation, config, "eval").samples_a_batch == 5


@pytest.mark.usefixtures("small_network_here")
def test_no_samples_are_drawn_if_nothing_can_score_them(tmp_path, monkeypatch, caplog):
    config = tiny_config(n_iters=2, snapshot_freq=2, snapshot_freq_for_preemption=2)
    config.eval.num_samples = 96
    run_lib.train(config, tmp_path / "run")
    monkeypatch.setattr(evaluation, "get_scorers", lambda *_: [])  # no labels, no Inception
    monkeypatch.setattr(evaluation, "sample_batches", lambda *_: pytest.fail("samples are drawn"))
    monkeypatch.setattr(evaluation, "evaluate_bits", lambda *_: {"weighed": True})
    monkeypatch.setattr(evaluation, "evaluate_baselines", lambda *_: {})
    report = evaluation.evaluate(config, tmp_path / "run")
    assert report["weighed"] and "num_samples" not in report
    assert "nothing can score samples" in caplog.text and "--mode sample" in caplog.text
    config.eval.enable_bpd = False
    with pytest.raises(UserError, match="nothing would be scored"):
        evaluation.evaluate(config, tmp_path / "run")


def test_tensorflow_is_told_to_leave_the_gpus_alone(monkeypatch):
    told, settings = [], types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "tensorflow", types.SimpleNamespace(config=settings))
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", types.SimpleNamespace())
    settings.set_visible_devices = lambda *given: told.append(given)
    tfds._import(prepares=True)
    assert told == [([], "GPU")]

    def started(*_):
        raise RuntimeError("Visible devices cannot be modified after being initialized")

    settings.set_visible_devices = started
    tfds._import(prepares=True)
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # as where it is not installed
    with pytest.raises(UserError, match=r"to prepare a data set.*pip install tensorflow$"):
        tfds._import(prepares=True)
    tfds._import()  # what is prepared is read without it


def test_training_imports_no_more_than_it_needs(tmp_path):
    lines = (
        "import sys, run_lib",
        "from tests.helpers import small_networks, tiny_config",
        f"with small_networks(): run_lib.train(tiny_config(n_iters=1), {str(tmp_path)!r})",
        "assert not {'tensorflow', 'sklearn.metrics', 'diffrax'} & set(sys.modules)",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, check=True)
    assert list((tmp_path / "tensorboard").glob("events*"))
    assert (tmp_path / "log.txt").exists()


def test_bfloat16_keeps_the_noise_of_small_times():
    """The first convolution sees x(t) in float32; bfloat16 would lose a third of the noise."""
    config = tiny_config()
    config.model.dtype = "bfloat16"
    setup, params, seen = build.set_up(config), random_params(config), {}
    params["Conv_0"]["bias"][:] = 0

    def watch(next_fn, args, kwargs, context):
        if isinstance(context.module, layers.Conv) and not seen:
            seen["x"], seen["result"] = args[0], next_fn(*args, **kwargs)
            return seen["result"]
        return next_fn(*args, **kwargs)

    rng = np.random.default_rng(0)
    levels = rng.integers(0, 256, (64, 8, 8, 1)) / 127.5 - 1
    z = rng.standard_normal(levels.shape)
    kernel = np.asarray(params["Conv_0"]["kernel"], np.float64)

    def convolve(x):
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
        return np.einsum("nhwcij,ijcf->nhwf", windows, kernel)

    for t in (1e-5, 3e-5, 1e-4):
        mean, std = float(setup.sde.mean_coeff(t)), float(setup.sde.std(t))
        x_t = (mean * levels + std * z).astype(np.float32)
        seen.clear()
        with ncsnpp.nn.intercept_methods(watch):
            setup.model.apply({"params": params}, x_t, jnp.full(64, 999 * t))
        # What the convolution gives of the noise, against the exact convolution of the noise.
        noise = (np.asarray(seen["result"], np.float64) - convolve(mean * levels)) / std
        lost = np.mean((noise - convolve(z)) ** 2) / np.mean(convolve(z) ** 2)
        assert lost < 1e-3, (t, lost)


@pytest.mark.usefixtures("small_network_here")
def test_the_logged_rate_does_not_leave_out_queued_steps(tmp_path, monkeypatch):
    """A device that takes 2 s a step, a host that queues at once, and a test loss of 1 s."""
    now, free_at = [0.0], [0.0]

    def wait(*_):
        now[0] = max(now[0], free_at[0])

    def train_call(packed, count):
        free_at[0] = max(free_at[0], now[0]) + 2.0 * count
        values = {"loss": np.ones(count), "skipped": np.zeros(count, int)}
        values |= {"tau": np.ones(count), "grad_norm": np.ones(count)}
        return packed, values

    def test_loss(_):
        wait()
        now[0] += 1
        return 1.0

    read = train_step.LossSums.read
    monkeypatch.setattr(train_step.LossSums, "read", lambda sums: (wait(), read(sums))[1])
    monkeypatch.setattr(training_log, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(run_lib.jax, "block_until_ready", wait)
    monkeypatch.setattr(run_lib, "get_train_call", lambda *_, **__: train_call)
    monkeypatch.setattr(run_lib, "get_test_loss", lambda *_: test_loss)
    config = tiny_config(n_iters=40, log_freq=10, eval_freq=5)
    config.training.update(snapshot_freq=1000, snapshot_freq_for_preemption=1000)
    run_lib.train(config, tmp_path)
    rates = [
        row["images_per_second"]
        for row in read_metrics(tmp_path / "metrics.jsonl")
        if "images_per_second" in row
    ]
    np.testing.assert_allclose(rates, config.training.batch_size / 2)


@pytest.mark.usefixtures("small_network_here")
def test_the_test_loss_is_computed_by_all_devices(monkeypatch):
    config = tiny_config()
    setup, data = build.set_up(config), run_lib.load_data(config)
    state, seen = setup.init_state(), []
    place = in_training.to_devices

    def to_devices(tree, sharding):
        placed = place(tree, sharding)
        seen.extend(x.addressable_shards[0].data.shape for x in jax.tree.leaves(placed))
        return placed

    monkeypatch.setattr(in_training, "to_devices", to_devices)
    value = in_training.get_test_loss(setup, data.test)(state.ema_params)
    size, devices = config.training.batch_size, jax.device_count()
    assert devices > 1 and (size // devices, 8, 8, 1) in seen and (size, 8, 8, 1) not in seen
    # The same number on one device.
    monkeypatch.setattr(in_training, "to_devices", lambda tree, _: tree)
    np.testing.assert_allclose(
        in_training.get_test_loss(setup, data.test)(state.ema_params), value, rtol=1e-5
    )


def train_call_of(config, step_fn):
    """The calls of a run with a given step."""
    train = run_lib.load_data(config).train
    return train_step.make_train_call(step_fn, train, config.training.batch_size, 0, 0)


def test_few_calls_are_queued(monkeypatch):
    queued, waited = [], []

    def wait(value):
        waited.append(queued.index(id(value)))
        return value

    def pmap(fn, **_):
        def call(packed, *_):
            values = {"loss": np.zeros((4, 1))}
            queued.append(id(values["loss"]))
            kept.append(values)
            return packed, values

        return call

    kept = []
    monkeypatch.setattr(train_step.jax, "pmap", pmap)
    monkeypatch.setattr(train_step.jax, "block_until_ready", wait)
    monkeypatch.setattr(train_step, "first_copy", lambda tree: tree)
    train_call = train_call_of(tiny_config(), None)
    for _ in range(9):
        train_call(None, 1)
        assert len(queued) - len(waited) <= 2
    assert waited == list(range(7))  # the oldest first


@pytest.mark.usefixtures("small_network_here")
def test_the_unpacked_state_is_freed_before_the_next_call(tmp_path, monkeypatch):
    unpacked, alive = [], []
    unpack, get_train_call = run_lib.unpack_state, run_lib.get_train_call

    def unpack_state(packed):
        state = unpack(packed)
        unpacked.append(weakref.ref(jax.tree.leaves(state.params)[0]))
        return state

    def watched(*args, **kwargs):
        train_call = get_train_call(*args, **kwargs)

        def call(packed, count):
            alive.append(sum(ref() is not None for ref in unpacked))
            return train_call(packed, count)

        return call

    monkeypatch.setattr(run_lib, "unpack_state", unpack_state)
    monkeypatch.setattr(run_lib, "get_train_call", watched)
    config = tiny_config(n_iters=6, eval_freq=1, snapshot_freq=1000)
    config.training.snapshot_freq_for_preemption = 1000
    run_lib.train(config, tmp_path)
    assert len(unpacked) >= 6 and alive == [0] * 6


@pytest.mark.parametrize(
    ("shape", "kernel"),
    [
        ((128, 32, 32, 128), True),  # CIFAR-10 on one GPU
        ((16, 32, 32, 128), True),  # … on eight
        ((64, 256, 256, 128), True),  # 256² on one: 128 programs
        ((8, 256, 256, 128), False),  # … on eight: 16 programs for 132 multiprocessors
        ((8, 16, 16, 256), True),
    ],
)
def test_the_kernel_is_left_to_xla_where_few_programs_have_much_to_do(shape, kernel):
    assert norm_kernels.pays(jax.ShapeDtypeStruct(shape, jnp.bfloat16)) == kernel


STEPS = int(os.environ.get("REHEARSED_STEPS", "200"))
SAMPLES = 5 * STEPS // 2
SMALLEST = (*TINY, "--config.model.nf=4", "--config.model.num_res_blocks=1")
REHEARSED = (
    *SMALLEST,
    "--config.training.batch_size=16",
    f"--config.training.n_iters={STEPS}",
    f"--config.training.log_freq={STEPS // 20}",
    f"--config.training.eval_freq={STEPS // 4}",
    f"--config.training.snapshot_freq={STEPS // 2}",
    f"--config.training.snapshot_freq_for_preemption={STEPS // 20}",
    "--config.sampling.method=dpm_solver",
    "--config.sampling.num_steps=4",
    f"--config.eval.num_samples={SAMPLES}",
    "--config.eval.batch_size=64",
    f"--config.eval.sampling_batch_size={SAMPLES // 10}",
    "--config.eval.num_test_data=64",
    "--config.eval.nll_steps=32",
    "--config.eval.nelbo_draws=1",
    "--config.eval.enable_fid=False",
)


@pytest.mark.release
@pytest.mark.slow
def test_sigterm_stops_two_processes_with_several_steps_a_call(tmp_path):
    processes = start(
        *SMALLEST,
        f"--workdir={tmp_path}/run",
        "--config.training.n_iters=100000",
        "--config.training.log_freq=10",
        "--config.training.snapshot_freq_for_preemption=20",
        devices=2,
    )
    wait_until((tmp_path / "run" / "checkpoints" / "40").exists, *processes, every=0.02)
    processes[1].send_signal(signal.SIGTERM)
    outputs = finish(processes)
    assert "stopped at step" in outputs[0]
    step = int(outputs[0].split("stopped at step ")[1].split()[0])
    assert step % 10 == 0 and (tmp_path / "run" / "checkpoints" / str(step)).is_dir()


@pytest.mark.release
@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_with_one_line(tmp_path, victim):
    processes = start(
        *SMALLEST,
        f"--workdir={tmp_path}/run",
        "--config.training.n_iters=100000",
        "--config.training.log_freq=10",
        "--config.training.snapshot_freq_for_preemption=20",
        devices=1,
    )
    wait_until((tmp_path / "run" / "checkpoints" / "40").exists, *processes, every=0.02)
    processes[victim].kill()
    began = time.monotonic()
    output = processes[1 - victim].communicate(timeout=60)[0]
    assert time.monotonic() - began < 30 and processes[1 - victim].returncode > 0
    assert output.count("error: ") == 1 and "Traceback" not in output and "***" not in output
    assert output.splitlines()[-1].startswith(f"error: process {victim} was lost")


@pytest.mark.slow
@pytest.mark.release  # three minutes; with REHEARSED_STEPS=2000 ten
def test_a_run_on_eight_devices_of_two_processes_survives_what_happens_to_it(tmp_path):
    """Training and evaluation, each cut off and gone on, against undisturbed ones."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"

    def run(workdir, mode):
        more = [f"--mode={mode}", f"--workdir={workdir}"]
        return start(*REHEARSED, *more, f"--config.eval.cache_dir={workdir}/cache")

    finish(run(whole, "train"))
    processes = run(cut, "train")
    wait_until((cut / "checkpoints" / str(STEPS // 5)).exists, *processes, every=0.02)
    processes[1].send_signal(signal.SIGTERM)
    assert "stopped at step" in finish(processes)[0]
    processes = run(cut, "train")
    wait_until((cut / "checkpoints" / str(STEPS * 3 // 5)).exists, *processes, every=0.02)
    for process in processes:
        process.kill()
        process.communicate()
    output = finish(run(cut, "train"))[0]
    assert "resumed at step" in output and f"done: {STEPS} steps" in output
    config = saved.get_config(whole)
    assert_identical(state_of(config, whole), state_of(config, cut))

    finish(run(whole, "eval"))
    processes = run(cut, "eval")
    parts = cut / "eval" / "parts"
    while len(list(parts.rglob("samples_*"))) < 4:
        assert [process.poll() for process in processes] == [None, None]
        time.sleep(0.02)
    for process in processes:
        process.kill()
        process.communicate()
    finish(run(cut, "eval"))
    reports = [json.loads((run / "eval" / "report.json").read_text()) for run in (whole, cut)]
    assert reports[0] == reports[1]
    assert reports[0]["num_samples"] == SAMPLES and reports[0]["fd_classifier"] > 0
    assert reports[0]["nll"] < reports[0]["nll_untrained_network"]


def conv(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def test_the_estimate_of_memory_counts_what_is_alive():
    kib = 2**10
    x = jax.ShapeDtypeStruct((1, 16, 16, 4), jnp.float32)  # 4 KiB
    kernel = jax.ShapeDtypeStruct((1, 1, 4, 4), jnp.float32)  # 64 bytes

    def four(x, kernel):
        for _ in range(4):
            x = jax.nn.silu(conv(x, kernel))
        return x

    # The argument, a convolution's argument and its result; SiLU is no array of its own.
    assert 12 * kib <= memory.needed_bytes(four, x, kernel) <= 13 * kib
    # For the gradient all four convolutions' results and arguments stay.
    grads = jax.grad(lambda kernel, x: jnp.sum(four(x, kernel)))
    assert 32 * kib <= memory.needed_bytes(grads, kernel, x) <= 50 * kib
    assert memory.needed_bytes(lambda x: x + 1, x, donate=1) == 4 * kib
    assert memory.needed_bytes(lambda x: x + 1, x) == 8 * kib

    def loop(x, kernel):
        return jax.lax.scan(lambda x, _: (four(x, kernel), None), x, length=100)[0]

    # What one round needs, and that once, not a hundred times.
    assert 12 * kib <= memory.needed_bytes(loop, x, kernel) <= 21 * kib


@pytest.mark.slow
def test_the_estimate_of_memory_is_near_what_xla_says():
    config = tiny_config()
    config.model.update(nf=16, ch_mult=(1, 2))
    config.training.batch_size = 512 * jax.device_count()
    program, shapes = memory_advice.train_program(build.set_up(config))
    estimate = memory.needed_bytes(program, *shapes, donate=1)
    size = compiled_bytes(jax.devices()[0], program, shapes, donate=True)
    assert 0.6 < estimate / size < 1.6


BFLOAT16 = {"model.dtype": "bfloat16"}
REMAT = {**BFLOAT16, "model.remat": True}


def test_a_recipe_that_does_not_fit_says_what_to_set(monkeypatch, caplog):
    config, given = tiny_config(), []
    config.model.nf = 32
    config.training.batch_size = 1024 * jax.device_count()
    with monkeypatch.context() as patch:
        patch.setattr(memory, "advise", lambda *asked: given.append(asked))
        memory_advice.advise_on_training(build.set_up(config))
    ((what, needed, remedies),) = given
    known = {}

    def needed_once(changes):
        name = json.dumps(changes)
        known[name] = known.get(name) or needed(changes)
        return known[name]

    for changes, line in (
        ({}, "training needs about"),
        (BFLOAT16, "set --config.model.dtype=bfloat16 (about"),
        (REMAT, "and --config.model.remat=True (about"),
        ({**REMAT, "optim.num_micro_batch": 4}, "and --config.optim.num_micro_batch=4 (about"),
        (None, "too little, whatever is set"),
    ):
        enough = 2**20 if changes is None else needed_once(changes) / memory._MARGIN + 1
        monkeypatch.setattr(memory, "limit_bytes", lambda enough=enough: enough)
        caplog.clear()
        with caplog.at_level("INFO", "soft_truncation"):
            memory.advise(what, needed_once, remedies)
        assert len(caplog.records) == 1 and line in caplog.text
        assert (caplog.records[0].levelname == "INFO") == (changes == {})


@pytest.mark.usefixtures("small_network_here")
def test_a_batch_that_does_not_fit_says_which_does(monkeypatch, caplog):
    config = tiny_config()
    config.sampling.update(method="dpm_solver", num_steps=3)
    program, shapes = memory_advice.sample_program(build.set_up(config), 512)
    needed = memory_advice._OF_ODE * memory.needed_bytes(program, *shapes)
    monkeypatch.setattr(memory, "limit_bytes", lambda: needed / memory._MARGIN + 1)
    memory_advice.advise_on_sampling(build.set_up(config), "eval.sampling_batch_size", 2048)
    assert "set --config.eval.sampling_batch_size=512 (about" in caplog.text
