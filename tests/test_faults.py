"""What clusters, disks and people do to a run, done to it really."""

import dataclasses
import errno
import fcntl
import functools
import json
import logging
import os
import pwd
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file
from tensorboardX.proto.event_pb2 import Event

import build
import datasets
import losses
import run_lib
import train_step
from configs.errors import UserError
from data.batches import facts_of_data
from metrics import training_log
from metrics.report import earlier_scores
from readers import cache, tfrecords
from readers.source import ArraySource
from runtime import (
    checkpointing,
    checksums,
    environment,
    exported,
    files,
    interrupts,
    locking,
    provenance,
)
from runtime.metrics_log import Metrics, read_metrics
from runtime.progress import Progress
from runtime.workdir import record_data
from tests import jobs
from tests.helpers import environment_of, tiny_config
from tests.jobs import (
    DIGITS,
    TINY,
    assert_identical,
    losses_of,
    state_of,
    steps_of,
    wait_until,
)
from tests.stress import bit_flips, formats


@pytest.fixture
def log(caplog):
    """The program's log, with what is only informed of."""
    caplog.set_level(logging.INFO, "soft_truncation")
    return caplog


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir with checkpoints at steps 3, 6 and 9."""
    folder = tmp_path_factory.mktemp("trained")
    run_lib.train(tiny_config(n_iters=9, snapshot_freq=3), folder / "run")
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def damage(folder, how):
    if how == "truncated":
        largest(folder).write_bytes(largest(folder).read_bytes()[:100])
    elif how == "missing file":
        largest(folder).unlink()
    elif how == "no metadata":
        for path in folder.rglob("_METADATA"):
            path.unlink()
    else:
        shutil.rmtree(folder / "default")
    if how == "other values":  # which can be read
        shutil.copytree(folder.parent / "6" / "default", folder / "default")


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", ["truncated", "missing file", "no metadata", "no state", "other values"]
)
def test_a_damaged_checkpoint_is_passed_over(trained, run, how, log):
    damage(run / "checkpoints" / "9", how)
    config = tiny_config(n_iters=9, snapshot_freq=3)
    # Evaluation and training say so; training goes on from the one before.
    with pytest.raises(UserError, match=r"checkpoints/9 can't be read"):
        state_of(config, run)
    state = run_lib.train(config, run)
    assert "trying the one before" in log.text and "resumed at step 6" in log.text
    assert_identical(state, state_of(config, trained))
    assert steps_of(run) == [3, 6, 9]
    assert len(list((run / "damaged_checkpoints").iterdir())) == 1
    assert losses_of(run) == losses_of(trained)


@pytest.mark.slow
def test_if_no_checkpoint_can_be_read_nothing_is_changed(run):
    for step in (3, 6, 9):
        damage(run / "checkpoints" / str(step), "truncated")
    before = sorted(path for path in run.rglob("*") if path.name != ".lock")
    with pytest.raises(UserError, match="none of the 3 checkpoints"):
        run_lib.train(tiny_config(n_iters=12, snapshot_freq=3), run)
    assert sorted(path for path in run.rglob("*") if path.name != ".lock") == before


HOLD = """
import pathlib, sys, time
from runtime import locking
path = pathlib.Path(sys.argv[1])
with locking.{lock}:
    print(1, flush=True)
    time.sleep(99)
"""


def hold(lock, path):
    """Start a process that holds a lock of `runtime.locking` until it is killed."""
    command = [sys.executable, "-c", HOLD.format(lock=lock), path]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    process.stdout.readline()
    return process


@pytest.mark.slow
def test_a_second_process_is_refused_and_a_dead_one_is_not_in_the_way(run):
    process = hold("locked(path)", run)
    config = tiny_config(n_iters=9, snapshot_freq=3)
    who = f"process {process.pid} on {socket.gethostname()} is at work in"
    with pytest.raises(UserError, match=who):
        run_lib.train(config, run)
    jobs.kill(process)
    assert int(run_lib.train(config, run).step) == 9


def test_the_second_at_a_folder_is_told_who_is_the_first(tmp_path):
    me = f"process {os.getpid()} on {socket.gethostname()} is at work in"
    with locking.locked(tmp_path), pytest.raises(UserError, match=me), locking.locked(tmp_path):
        pass
    with locking.locked(tmp_path):
        pass


@pytest.mark.parametrize("there", [True, False])
def test_a_lock_that_is_a_link_is_refused_and_what_it_names_is_left_alone(tmp_path, there):
    target = tmp_path / "precious"
    if there:
        target.write_text("kept")
    for name, lock in ((".lock", locking.locked), ("x.lock", locking.waiting_lock)):
        (tmp_path / "run").mkdir(exist_ok=True)
        path = tmp_path / "run" / name
        path.symlink_to(target)
        args = (path.parent,) if lock is locking.locked else (path, "another works")
        with pytest.raises(UserError, match="is a link, which no lock is"), lock(*args):
            pass
    assert target.exists() == there and (not there or target.read_text() == "kept")


def test_a_lock_with_another_name_or_no_file_is_held_and_not_written(tmp_path):
    (tmp_path / "precious").write_text("kept")
    os.link(tmp_path / "precious", tmp_path / ".lock")
    with locking.locked(tmp_path):
        assert (tmp_path / "precious").read_text() == "kept"
    (tmp_path / ".lock").unlink()
    os.mkfifo(tmp_path / ".lock")
    with locking.locked(tmp_path), pytest.raises(UserError, match="another process is at work"):
        locking.locked(tmp_path).__enter__()


def test_one_waits_for_a_lock_until_the_process_that_has_it_is_killed(tmp_path, log):
    path = tmp_path / "x.lock"
    process = hold("waiting_lock(path, '')", path)
    threading.Timer(0.5, process.kill).start()
    with locking.waiting_lock(path, "another process works"):
        assert "another process works; waiting for it" in log.text
    process.wait()


def test_partial_files_of_equal_process_numbers_do_not_mix(tmp_path, monkeypatch):
    """As of two containers, in which both are process 1."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    path = tmp_path / "x"
    with files.replacing(path) as first:
        first.write(b"first")
        with files.replacing(path) as second:
            second.write(b"second, and longer")
        assert path.read_bytes() == b"second, and longer"
    assert path.read_bytes() == b"first" and list(tmp_path.iterdir()) == [path]


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locking.locked(tmp_path):
        assert "has no locks: start no second run there" in caplog.text


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_file_is_replaced_as_a_whole_or_not_at_all(call, tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    files.write_text(path, "before")

    def fails(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, call, fails)
    with pytest.raises(OSError, match="Input/output"):
        files.write_text(path, "after")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    files.write_text(path, "after")
    assert path.read_text() == "after"


def test_a_save_that_fails_leaves_no_thread_that_waits(tmp_path, monkeypatch):
    make = os.mkdir

    def mkdir(path, *args, **kwargs):
        if "checkpoint-tmp" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        make(path, *args, **kwargs)

    with checkpointing.checkpoints(tmp_path, 6) as manager:
        saver, before = checkpointing.Saver(manager, max_failures=2), set(threading.enumerate())
        monkeypatch.setattr(os, "mkdir", mkdir)
        saver.save(1, {"x": np.ones(3)})
        assert not saver.settle()
        monkeypatch.undo()
        until = time.monotonic() + 5
        while set(threading.enumerate()) - before:
            assert time.monotonic() < until
            time.sleep(0.05)
        saver.save(2, {"x": np.ones(3)})
        assert saver.settle()
    assert steps_of(tmp_path) == [2]


@pytest.mark.usefixtures("small_network_here")
def test_what_is_not_finite_first_is_told(tmp_path):
    config = tiny_config()
    setup, data = build.set_up(config), datasets.load_data(config)
    state = setup.init_state()
    training = training_log.TrainingLog(setup, data.train, None, tmp_path)

    def fault(state, loss):
        packed = train_step.replicate(train_step.pack_state(state), 1)
        return training._fault(3, {"loss": np.float32(loss)}, packed)

    assert fault(state, np.nan) == "loss"
    assert fault(state, 1.0) == "gradient"
    spoiled = jax.tree.map(lambda x: x * np.inf, state.params)
    assert fault(dataclasses.replace(state, params=spoiled), np.nan) == "parameters"

    images = np.full((20, 8, 8, 1), np.nan, np.float32)
    source = ArraySource(images, np.zeros(20, np.int32))
    training._train = dataclasses.replace(data.train, source=source)
    assert fault(state, np.nan) == "data"


@pytest.mark.usefixtures("small_network_here")
def test_training_is_told_by_time_and_written_by_steps(tmp_path, monkeypatch, log):
    now = 0.0
    monkeypatch.setattr(training_log.time, "monotonic", lambda: now)
    config = tiny_config(n_iters=40_000)
    config.training.log_freq = 100
    setup, data = build.set_up(config), datasets.load_data(config)
    training, rows = training_log.TrainingLog(setup, data.train, None, tmp_path), []
    training._files = types.SimpleNamespace(
        metrics=types.SimpleNamespace(write=lambda step, row: rows.append((step, row)))
    )
    values = {
        name: jax.numpy.full((1,), value, np.float32)
        for name, value in {"loss": 1, "tau": 0.5, "grad_norm": 2, "skipped": 0}.items()
    }
    for step in range(1, 201):
        now += 30 if step <= 2 else 3  # both compile
        training.after_call(step, 1, values, None)
    assert [step for step, _ in rows] == [100, 200]
    rate = config.training.batch_size / 3
    assert rows[1][1]["images_per_second"] == pytest.approx(rate)
    lines = [m for m in log.messages if m.startswith("step ")]
    assert lines[0].startswith("step 1/40000 | compiled in 30 s | loss 1")
    assert lines[1].startswith(f"step 6/40000 | {rate:.0f} images/s | loss 1 | 33:")
    # 660 s are told in 10 s at first, and in 33 s in the end.
    assert 20 < len(lines) < 50
    (advice,) = [m for m in log.messages if "folder_small" in m]
    assert advice.startswith("about 1 days on this machine's CPU")


def test_a_loss_on_test_images_that_has_risen_for_long_is_told_once(tmp_path, log):
    setup = build.set_up(tiny_config(n_iters=40_000))
    period = setup.loop.snapshot_freq
    training = training_log.TrainingLog(setup, None, None, tmp_path)
    metrics = Metrics(tmp_path, 0)
    training._files = types.SimpleNamespace(metrics=metrics)
    for i, loss in enumerate([3.0, 1.0, 1.01, 1.1, 1.1, 1.1, 0.999, 1.1, 1.1, 1.1, 1.1]):
        training.after_test((i + 1) * period, loss)
    assert "risen" not in log.text
    for i in (12, 13):
        training.after_test(i * period, 1.1)
    (line,) = [m for m in log.messages if "risen" in m]
    assert line.startswith(f"the loss on test images has risen from 0.999 at step {7 * period}")
    assert line.endswith("--config.eval.begin_ckpt=7 --config.eval.end_ckpt=7")
    metrics.close()


def test_frequencies_of_0_follow_the_number_of_images(tmp_path, log):
    assert build._frequencies(1350, 64) == {
        "eval_freq": 200,
        "snapshot_freq_for_preemption": 500,
        "snapshot_freq": 1100,
    }
    assert tuple(build._frequencies(10**6, 64).values()) == (1000, 2000, 10_000)
    config = tiny_config(eval_freq=0, snapshot_freq=7, snapshot_freq_for_preemption=0)
    found = build.with_data_facts(config, tmp_path / "none").training
    chosen = found.eval_freq, found.snapshot_freq, found.snapshot_freq_for_preemption
    assert chosen == (1000, 7, 2000)
    datasets.load_data(config)
    assert log.text.count("1,500 training") == 1  # the same data, loaded once
    found.n_iters, found.snapshot_sampling = 1, False
    whole = tiny_config()
    whole.training.update(found)
    run_lib.train(whole, tmp_path / "run")
    assert "1,500 training" in log.text and "epochs in all" in log.text
    (line,) = [m for m in log.messages if m.startswith("compiling the training step: about ")]
    assert line.endswith(" s on this machine")
    config.training.batch_size *= 50
    assert build.with_data_facts(config, tmp_path / "run").training.eval_freq == 1000


def poisoned(monkeypatch, steps):
    """The loss of the steps after so many is not a number."""
    seed, loss_fn = tiny_config().seed, losses.DrawnObjective.__call__
    keys = jax.vmap(lambda n: jax.random.key_data(losses.step_key(seed, n)))(steps)

    def poisoned_fn(objective, score_fn, key, images, index, train):
        values, tau = loss_fn(objective, score_fn, key, images, index, train)
        hit = (jax.random.key_data(key) == keys).all(axis=-1).any()
        return values * jax.numpy.where(hit, jax.numpy.nan, 1), tau

    monkeypatch.setattr(losses.DrawnObjective, "__call__", poisoned_fn)


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_skipped_and_counted(trained, tmp_path, monkeypatch, log):
    config = tiny_config(n_iters=9, snapshot_freq=3)
    poisoned(monkeypatch, np.array([4, 5, 8]))
    state = run_lib.train(config, tmp_path / "run")
    assert int(state.step) == 9
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    # Adam has made six steps, and three are missing in the log.
    counts = {int(leaf) for leaf in jax.tree.leaves(state.opt_state) if np.ndim(leaf) == 0}
    assert counts == {6}
    assert set(losses_of(tmp_path / "run")) == {1, 2, 3, 4, 7, 8}
    assert log.text.count("1 steps skipped") == 3
    # The checkpoint of step 6, the second of the two, was not saved: its last loss was not finite.
    # That of the end is, whatever the last step was: a skipped one leaves all as it is.
    assert steps_of(tmp_path / "run") == [3, 9]
    # Before it, the run is the undisturbed one.
    same = losses_of(trained)
    assert all(losses_of(tmp_path / "run")[step] == same[step] for step in (1, 2, 3, 4))


@pytest.mark.parametrize("mixed", [False, True])
def test_the_times_of_a_step_are_those_it_trains_at(mixed):
    config, seen = tiny_config(mixed=mixed), []
    setup = build.set_up(config)

    def score_fn(x, t, dropout_keys):
        seen.append(t)
        return x

    key, images = losses.step_key(config.seed, 5), np.zeros((8, 8, 8, 1), np.uint8)
    _, tau = setup.objective(score_fn, key, images, np.arange(8), train=False)
    expected_tau, expected = train_step.times_of_step(setup.objective, config.seed, 5, images)
    np.testing.assert_array_equal(tau, expected_tau)
    np.testing.assert_array_equal(seen[0], expected)


def limited(limit):
    """For a child: files can't grow beyond so many bytes, as on a disk that is full."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


@pytest.fixture
def start():
    """Starts runs without a compile cache; none of them outlives the test."""
    env, started = environment_of(1), []
    env.pop("JAX_COMPILATION_CACHE_DIR")  # its files would be cut as well

    def start(*args, **options):
        started.append(jobs.start(DIGITS, *TINY, *args, env=env, **options))
        return started[-1]

    yield start
    jobs.kill(*started)


@pytest.mark.slow
def test_a_full_disk_is_waited_for_and_at_last_stops_the_run(start, tmp_path):
    steps = [
        "--config.training.n_iters=100000",
        "--config.training.snapshot_freq_for_preemption=20",
    ]
    steps += [f"--workdir={tmp_path}/run", "--config.training.max_failed_saves=1000"]
    process = start(*steps, preexec_fn=limited(20_000))
    for line in process.stderr:
        if "can't be saved" in line:
            break
    assert "training goes on" in line
    assert steps_of(tmp_path / "run") == []
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    jobs.wait_until(lambda: steps_of(tmp_path / "run"), process, every=0.05)
    # There is room again. A SIGTERM saves and ends well, whatever it was doing.
    process.send_signal(signal.SIGTERM)
    last = process.communicate()[1].splitlines()
    assert process.returncode == 0
    assert "stopped at step" in last[-1] and "saved" in last[-2]
    assert "Traceback" not in "".join(last)
    assert steps_of(tmp_path / "run")[-1] == int(last[-1].split("step ")[1].split()[0])

    steps[-1] = "--config.training.max_failed_saves=2"
    process = start(*steps, preexec_fn=limited(20_000))
    errors = process.communicate()[1]
    assert process.returncode == 2
    assert "failure 2 in a row; training stops" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    # What was there is there.
    assert int(errors.splitlines()[-1].split(" ")[-1]) in steps_of(tmp_path / "run")


def test_while_the_disk_is_full_metrics_wait(tmp_path):
    metrics = Metrics(tmp_path, 0)
    file, rest = metrics._file, iter([OSError(28, "full"), 7])

    def write(data):
        what = next(rest, OSError(28, "full"))
        if isinstance(what, OSError):
            raise what
        return file.write(data[:what])  # a disk may take a part

    metrics._file = SimpleNamespace(write=write)
    for step in range(1, 1000):
        metrics.write(step, {"loss": 1.0 / step})
    metrics._file = file
    metrics.close()
    assert list(losses_of(tmp_path)) == list(range(1, 1000))


def test_tensorboards_file_has_the_metrics_and_a_failing_one_is_told_once(tmp_path, caplog):
    metrics = Metrics(tmp_path, 0)
    metrics.write(50, {"loss": 0.5, "images_per_second": 100.0})
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, events = path.read_bytes(), []
    for start, size in tfrecords.index(path):
        events.append(Event.FromString(data[start : start + size]))
    values = {value.tag: value.simple_value for event in events for value in event.summary.value}
    assert values == {"loss": 0.5, "images_per_second": 100.0} and events[-1].step == 50

    def full(*_):
        raise OSError(28, "No space left on device")

    metrics._events.write_event = full
    for step in (100, 150):
        metrics.write(step, {"loss": 0.25})
    metrics.close()
    assert caplog.text.count("TensorBoard's file can't be written") == 1
    assert list(losses_of(tmp_path)) == [50, 100, 150]


def test_damaged_lines_of_the_metrics_are_left_out_and_those_after_them_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    bad = b'{"step": 2, "lo\n\xff\xfe\n[1]\n{"loss": 1}\n{"step": 3, "loss": "x"}\n'
    path.write_bytes(b'{"step": 1, "loss": 0.5}\n' + bad + b'{"step": 4, "loss": 0.25}\n{"step": 5')
    assert [row["step"] for row in read_metrics(path)] == [1, 4]
    Metrics(tmp_path, 4).close()
    assert losses_of(tmp_path) == {1: 0.5, 4: 0.25}


@pytest.mark.parametrize("what", ["link", "endless", "pipe"])
def test_metrics_that_are_no_file_are_replaced_and_no_link_is_followed(tmp_path, what):
    path, target = tmp_path / "metrics.jsonl", tmp_path / "precious"
    os.mkfifo(path) if what == "pipe" else path.symlink_to(
        "/dev/zero" if what == "endless" else target
    )
    metrics = Metrics(tmp_path, 0)
    metrics.write(1, {"loss": 0.5})
    metrics.close()
    assert losses_of(tmp_path) == {1: 0.5} and not path.is_symlink() and not target.exists()


@pytest.mark.parametrize("kind", bit_flips.KEPT)
def test_no_flipped_bit_is_read_as_something_else(kind):
    counts, wrong = bit_flips.flip(kind, flips=10, seed=1)
    assert not wrong and counts["noticed"]


@pytest.mark.parametrize(
    ("kind", "told"),  # what the code of that time gave
    [(checksums.crc_32c, "8d09445f"), (checksums.sums_of_pages, "90ca8db1f6781f7c")],
)
def test_files_with_earlier_checksums_are_read_and_compared(tmp_path, monkeypatch, kind, told):
    assert kind(np.arange(5000, dtype=np.float32)) == told
    (tmp_path / "model").mkdir()
    with monkeypatch.context() as patch:
        before = functools.partial(checksums.checksums, of_array=kind)
        patch.setattr(checkpointing, "checksums", before)
        patch.setattr(exported, "checksums", before)
        formats.write_checkpoint(tmp_path)
        formats.write_model(tmp_path / "model")
    kept = formats.read_checkpoint(tmp_path), formats.read_model(tmp_path / "model")
    wanted = (formats.STATE, (7, formats.PARAMS))
    assert jax.tree.all(jax.tree.map(np.array_equal, kept, wanted))
    path = tmp_path / "checkpoints" / "7" / "_CHECKPOINT_METADATA"
    facts = json.loads(path.read_text())
    sums = facts["custom_metadata"]["checksums"]
    sums |= dict.fromkeys(list(sums)[:1], told)
    path.write_text(json.dumps(facts))
    with pytest.raises(UserError, match="its checksum is another"):
        formats.read_checkpoint(tmp_path)


def test_files_without_checksums_are_read_as_before(tmp_path, caplog):
    model, params = tmp_path / "model", formats.PARAMS
    model.mkdir()
    formats.write_model(model)
    with safe_open(model / exported.WEIGHTS, framework="numpy") as file:
        named = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(named, model / exported.WEIGHTS, metadata={"step": "7"})
    assert exported.read_step(model) == 7
    (tmp_path / "x.msgpack").write_bytes(serialization.to_bytes(params))
    kept = formats.read_classifier(tmp_path), exported.read(model, params)
    assert jax.tree.all(jax.tree.map(np.array_equal, kept, (params, params)))
    formats.write_checkpoint(tmp_path)
    path = tmp_path / "checkpoints" / "7" / "_CHECKPOINT_METADATA"
    facts = json.loads(path.read_text())
    assert len(facts["custom_metadata"]["checksums"]) == len(jax.tree.leaves(formats.STATE))
    for text in (json.dumps(facts | {"custom_metadata": None}), None):
        path.unlink() if text is None else path.write_text(text)
        state = formats.read_checkpoint(tmp_path)
        assert jax.tree.all(jax.tree.map(np.array_equal, state, formats.STATE))
    assert not [record for record in caplog.records if record.name == "soft_truncation"]


def compared(images):
    """Wait until a thread has compared the images with their checksum."""
    for thread in threading.enumerate():
        if thread.name == f"compare {images.images.filename}":
            thread.join(5)


def test_large_decoded_images_are_compared_in_the_background(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_CHECKED_AT_ONCE", 0)
    formats.write_decoded(tmp_path)
    entry, *_ = formats.cache_entry(tmp_path)
    train = entry.read().train
    compared(train)
    assert len(train.fetch(np.arange(9))["image"]) == 9
    path = entry.folder / "train.uint8"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    train = entry.read().train
    compared(train)
    told = "is damaged; run the same command again: it decodes the images anew"
    with pytest.raises(UserError, match=told):
        train.fetch(np.arange(9))
    assert entry.read() is None and not entry.folder.exists()


@pytest.mark.parametrize(
    "text", ["[1]", "3", '{"nll": "x"}', '{"fid": 1.0}', '{"a":' * 9999, "pipe"]
)
def test_of_a_damaged_report_nothing_is_kept_and_a_line_says_so(tmp_path, caplog, text):
    path, same = tmp_path / "report.json", {"step": 3, "weights_digest": "a"}
    path.write_text(json.dumps(same | {"fd_of_x": 0.5, "num_samples": 9, "samples": "x"}))
    assert earlier_scores(same, tmp_path)["fd_of_x"] == 0.5 and not caplog.text
    path.unlink()
    assert earlier_scores(same, tmp_path) == {} and not caplog.text
    if text == "pipe":
        os.mkfifo(path)
    else:
        path.write_text(text)
    assert earlier_scores(same, tmp_path) == {}
    assert caplog.text.count("report.json is damaged") == len(caplog.messages) == 1


def test_data_that_changed_between_two_trainings_of_a_run_are_wanted(tmp_path, caplog):
    for i in range(40):
        Image.new("L", (8, 8), i).save(tmp_path / f"{i:02}.png")
    config = tiny_config()
    config.data.update(dataset="folder", path=str(tmp_path), cache=False)

    def train():
        caplog.clear()
        record_data(tmp_path, facts_of_data(datasets.load_data(config)))
        return [line for line in caplog.messages if "data have changed" in line]

    assert not train() and not train()
    Image.new("L", (8, 8), 99).save(tmp_path / "20.png")
    (line,) = train()
    assert line.count("36 training images") == 2
    for i in range(10, 40):
        (tmp_path / f"{i:02}.png").unlink()
    (line,) = train()
    assert (
        "36 training images" in line.split("then, ")[0] and "9 training" in line.split("then, ")[1]
    )
    (tmp_path / "data.json").write_text("[]")
    assert not train() and "data.json is damaged" in caplog.text and not train()


def test_a_broken_image_is_named_at_the_start_or_left_out(tmp_path, caplog):
    for i in range(20):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i:02}.png")
    raw = (tmp_path / "07.png").read_bytes()
    (tmp_path / "07.png").write_bytes(raw[: len(raw) // 2])
    (tmp_path / "12.png").write_text("not an image")
    config = tiny_config()
    config.data.update(dataset="folder", path=str(tmp_path), num_channels=3)
    with pytest.raises(UserError, match=r"2 of 20 files .* the first of them .*/07\.png"):
        datasets.get_dataset(config, "train")
    config.data.skip_unreadable = True
    assert len(datasets.get_dataset(config, "train")) == 16
    assert caplog.text.count("left out") == 2


@pytest.fixture
def interruptible():
    """SIGINT as a terminal's programs have it: a shell's jobs in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_ask_for_a_stop_and_are_given_back(number, log):
    before = signal.getsignal(number)
    with interrupts.Preemption() as preemption:
        assert not preemption.requested()
        signal.raise_signal(number)
        wait_until(preemption.requested)
    assert "a second" not in log.text
    with interrupts.Preemption() as preemption:
        signal.raise_signal(signal.SIGINT)
        wait_until(preemption.requested)
        assert "a second Ctrl-C stops at once" in log.text
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
            wait_until(lambda: False)
    assert signal.getsignal(number) == before


def test_nohup_is_kept_to():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupts.Preemption() as preemption:
            signal.raise_signal(signal.SIGHUP)
            time.sleep(0.2)
            assert not preemption.requested()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# Signals come while C has the main thread, as when XLA compiles.
IN_CPP = """
import hashlib, signal, sys, threading, time, jax
signal.signal(signal.SIGINT, signal.default_int_handler)
from runtime import interrupts
def interrupt():
    for _ in range(int(sys.argv[1])):
        time.sleep(0.5)
        signal.raise_signal(signal.SIGINT)
threading.Thread(target=interrupt, daemon=True).start()
with interrupts.ending_program():
    if sys.argv[1] == "2":
        with interrupts.Preemption():
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


@pytest.mark.parametrize("count", ["1", "2"])
def test_ctrl_c_ends_with_one_line_although_cpp_has_the_main_thread(count):
    done = subprocess.run(
        [sys.executable, "-c", IN_CPP, count], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1].startswith("error: interrupted; the same command goes on")
    assert ("a second Ctrl-C stops at once" in done.stderr) == (count == "2")
    assert len(done.stderr.splitlines()) == int(count)


def test_without_a_home_directory_a_run_goes_on_and_a_cache_is_asked_for(monkeypatch):
    def unknown(_):
        raise KeyError("uid not found")

    for name in ("HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    environment._keep_programs()
    with pytest.raises(UserError, match="no home directory to keep files in; set XDG_CACHE_HOME"):
        environment.cache_dir()


def test_a_workdir_that_is_moved_is_wanted_and_not_made_anew(tmp_path, caplog):
    (tmp_path / "run").mkdir()
    with checkpointing.checkpoints(tmp_path / "run", 6) as manager:
        saver = checkpointing.Saver(manager, max_failures=2)
        saver.save(0, {"x": np.ones(3)})
        assert saver.settle()
        (tmp_path / "run").rename(tmp_path / "moved")
        saver.save(1, {"x": np.ones(3)})
        assert not saver.settle() and "is gone; was the workdir moved?" in caplog.text
        (tmp_path / "moved").rename(tmp_path / "run")
        saver.save(2, {"x": np.ones(3)})
        assert saver.settle()
        (tmp_path / "run").rename(tmp_path / "moved")
        saver.save(3, {"x": np.ones(3)})
        with pytest.raises(UserError, match=r"is gone; was .* Checkpoints that are there: "):
            saver.save(4, {"x": np.ones(3)})
    assert not (tmp_path / "run").exists()


def test_a_clock_that_is_set_back_changes_no_rate(monkeypatch, log):
    ticks = iter([100.0, 102.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(ticks))
    progress = Progress("work", 10)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    progress.advance(10)
    monkeypatch.undo()
    assert "| 5 images/s |" in log.text


def test_the_log_is_kept_with_what_made_it(tmp_path, log, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py", "--mode=train"])
    with provenance.logged(tmp_path / "log.txt"):
        training_log.log.info("hello")
    training_log.log.info("not kept")
    text = (tmp_path / "log.txt").read_text()
    assert f"jax {jax.__version__}" in text and "main.py --mode=train" in text and "hello" in text
    assert "not kept" not in text
    with provenance.logged(tmp_path / "missing" / "log.txt"):
        pass
    assert "log.txt can't be written (No such file or directory)" in log.text


def test_what_compiles_says_so_before_its_first_image(log):
    Progress("work", 10, compiles=True)
    assert "work | compiling" in log.text and "then 10 images" in log.text


def test_progress_through_an_unknown_number_of_images_is_told_in_images(log):
    progress = Progress("work", 0, every=0)
    progress.advance(1000)
    progress.advance(234)
    assert "work | 1,234 images | " in log.text and "left" not in log.text


@pytest.mark.slow
def test_fewer_iterations_than_the_run_has_made_train_nothing(run, log):
    assert int(run_lib.train(tiny_config(n_iters=4, snapshot_freq=3), run).step) == 9
    assert "step 9 is reached, training.n_iters is 4: no training" in log.text
    assert "done: 9 steps" in log.text


def start_two(*args):
    """main.py in two processes of two devices."""
    return jobs.start_several(2, *TINY, *args, devices=2)


def errors_of(processes, returncode):
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [returncode] * 2, errors
    return errors


@pytest.mark.slow
def test_two_processes_train_as_one_and_one_goes_on_with_it(tmp_path):
    args = [f"--workdir={tmp_path}/run", "--config.training.n_iters=10"]
    processes = start_two(*args, "--config.optim.warmup=3")
    config = tiny_config(n_iters=20, snapshot_freq=1000, snapshot_freq_for_preemption=1000)
    one = run_lib.train(config, tmp_path / "one")  # on four devices
    errors = errors_of(processes, 0)
    assert "10/10" in errors[0] and "10/10" not in errors[1]

    # Both export what they trained; again into the same folder, both refuse.
    export = ["--mode=export", f"--workdir={tmp_path}/run", f"--to={tmp_path}/model"]
    errors_of(start_two(*export), 0)
    assert exported.read_step(tmp_path / "model") == 10
    for error in errors_of(start_two(*export), 2):
        assert "is there already; name a new one" in error and "Traceback" not in error

    other = run_lib.train(config, tmp_path / "run")
    # Sums over devices are made in another order across processes.
    for x, y in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True):
        # Adam makes steps of up to its rate, 2e-3, of gradients that are nothing but rounding.
        np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.slow
def test_processes_with_other_configs_end_in_one_line(tmp_path):
    processes = start_two(f"--workdir={tmp_path}/run")
    jobs.kill(processes[1])
    args = [*processes[1].args, "--config.seed=3"]
    processes[1] = subprocess.Popen(args, env=environment_of(2), stderr=subprocess.PIPE, text=True)
    for error in errors_of(processes, 2):
        line = error.splitlines()[-1]
        assert "seed of process 1 is not that of process 0, 42; start all by the same" in line
        assert "Traceback" not in error


@pytest.mark.slow
def test_flags_of_several_processes_belong_together():
    result = jobs.run_main(DIGITS, "--num_processes=2")
    assert result.returncode == 2 and "belong together" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.fixture
def compile_cache(tmp_path):
    """An empty folder that JAX keeps all compiled programs in."""
    folder = tmp_path / "xla"
    folder.mkdir()
    names = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in names.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_a_program_cut_off_in_the_compile_cache_is_compiled_anew(compile_cache, log):
    def compute():
        jax.clear_caches()
        return float(jax.jit(lambda x: jnp.sin(x).sum() * 3)(jnp.arange(5.0)))

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        environment._watch_cache()  # catch_warnings has put Python's own back
        value = compute()
        kept = {path: path.read_bytes() for path in compile_cache.glob("*-cache")}
        assert kept and not log.messages
        for path, whole in kept.items():
            path.write_bytes(whole[: len(whole) // 2])
        assert compute() == value
        damaged = [line for line in log.messages if "damaged program" in line]
        assert damaged and str(compile_cache) in damaged[0]
        log.clear()
        assert compute() == value
        assert not log.messages


def test_a_program_that_was_compiled_is_loaded_from_the_cache(compile_cache):
    environment._listen()
    loaded = []

    def note(event, **_):
        loaded.extend([event] if event == "/jax/compilation_cache/cache_hits" else [])

    jax.monitoring.register_event_listener(note)
    function, x = jax.jit(lambda x: jnp.cumsum(x) * 3), jnp.arange(5.0)
    first = function(x)
    assert environment._just_compiled and not loaded
    environment.load_compiled()
    np.testing.assert_array_equal(function(x), first)
    assert loaded and not environment._just_compiled
    loaded.clear()
    environment.load_compiled()  # nothing was compiled since
    function(x)
    assert not loaded


def test_a_program_that_can_not_be_replaced_is_told_once(compile_cache, monkeypatch, log):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    (compile_cache / "jit_f-12-cache").touch()
    monkeypatch.setattr(os, "unlink", refuse)
    warning = "Error reading persistent compilation cache entry for 'jit_f-12': denied"
    assert environment.mend_cache(warning) and environment.mend_cache(warning)
    (said,) = log.messages
    assert "neither read nor replaced" in said


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
def test_freed_memory_is_used_again_without_page_faults():
    program = """
import resource
import numpy as np
from runtime import environment
environment.prepare()
environment.keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    block = np.ones(10_000_000)
    del block
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 3 * 80_000_000 // 4096  # 20 times as many without it


@pytest.mark.slow
def test_damaged_files_are_read_or_refused_in_one_line():
    # LMDB's C library ends the process for some damaged pages.
    names = [name for name in formats.BROUGHT if name != "LSUN lmdb"]
    command = [sys.executable, "-m", "tests.stress.fuzz", "--seconds=0.4", "--seed=1000"]
    done = subprocess.run([*command, "--formats", *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("| 0 | 0 |") == len(names)


def test_the_newest_checkpoint_that_can_be_read_is_taken(tmp_path, monkeypatch):
    broken = {9}

    def restore(folder, shape, step):
        if step in broken:
            raise UserError("damaged")
        return step

    def newest():
        folder = tmp_path / "checkpoints"
        manager = SimpleNamespace(
            directory=folder, all_steps=lambda: steps_of(tmp_path), reload=lambda: None
        )
        return checkpointing.restore_newest(manager, None)

    monkeypatch.setattr(checkpointing, "restore", restore)
    for step in (3, 6, 9):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    assert newest() == 6 and steps_of(tmp_path) == [3, 6]
    assert [path.name[:2] for path in (tmp_path / "damaged_checkpoints").iterdir()] == ["9_"]
    broken.update((3, 6))
    with pytest.raises(UserError, match="none of the 2 checkpoints"):
        newest()


def test_checkpoints_to_evaluate_are_those_between_both_ends(tmp_path):
    for step in (2, 4, 6, 8):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    assert checkpointing.steps_to_evaluate(tmp_path) == [8]
    assert checkpointing.steps_to_evaluate(tmp_path, 2, 3, period=2) == [4, 6]
