"""Runs as a user starts them: separate processes, real files, real signals."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

import run_lib
from configs.default import UserError, get_default_config, validate
from tests.helpers import tiny_config

ROOT = pathlib.Path(__file__).parent.parent
TINY = (
    "--config.model.nf=8",
    "--config.model.ch_mult=(1,)",
    "--config.model.attn_resolutions=()",
    "--config.training.batch_size=8",
    "--config.training.log_freq=1",
    "--config.training.eval_freq=1000",
    "--config.training.snapshot_freq=1000",
    "--config.training.snapshot_sampling=False",
)


def command(config, *args):
    return [sys.executable, str(ROOT / "main.py"), "--config", f"{ROOT}/configs/{config}", *args]


def run_main(config, *args, cwd=ROOT, devices=1):
    env = dict(os.environ, XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}")
    return subprocess.run(
        command(config, *args), cwd=cwd, env=env, capture_output=True, text=True, check=False
    )


def losses_of(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def state_of(config, workdir):
    setup = run_lib.set_up(config)
    return run_lib._restore_latest(config, workdir, setup.state_shape)


def assert_identical(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_killed_run_continues_and_ends_bit_identical(tmp_path):
    args = [
        *TINY,
        "--config.training.n_iters=60",
        "--config.training.snapshot_freq_for_preemption=5",
    ]
    whole = run_main("vp/digits_st.py", *args, f"--workdir={tmp_path}/whole")
    assert whole.returncode == 0, whole.stderr
    assert "60/60" in whole.stderr and "images/s" in whole.stderr and "left" in whole.stderr

    cut = tmp_path / "cut"
    env = dict(os.environ, XLA_FLAGS="--xla_force_host_platform_device_count=1")
    process = subprocess.Popen(
        command("vp/digits_st.py", *args, f"--workdir={cut}"), env=env, stderr=subprocess.DEVNULL
    )
    metrics = cut / "metrics.jsonl"
    while not ((cut / "checkpoints" / "5").exists() and metrics.read_text().count("loss") > 13):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert max(losses_of(cut)) < 60

    resumed = run_main("vp/digits_st.py", *args, f"--workdir={cut}")
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed at step" in resumed.stderr
    config = tiny_config()
    config.optim.warmup = 100
    a, b = (state_of(config, tmp_path / name) for name in ("whole", "cut"))
    assert int(a.step) == 60
    assert_identical(a, b)
    # The log has every step once, as if nothing had happened.
    assert losses_of(cut) == losses_of(tmp_path / "whole")


def test_a_finished_run_does_nothing_and_a_longer_one_goes_on(tmp_path):
    short = run_lib.train(tiny_config(n_iters=6), tmp_path / "run")
    again = run_lib.train(tiny_config(n_iters=6), tmp_path / "run")
    assert_identical(short, again)
    longer = run_lib.train(tiny_config(n_iters=12), tmp_path / "run")
    straight = run_lib.train(tiny_config(n_iters=12), tmp_path / "straight")
    assert int(longer.step) == 12
    assert_identical(longer, straight)
    assert (tmp_path / "run" / "training.png").stat().st_size > 5000

    other = tiny_config(n_iters=12, k=0.5)
    with pytest.raises(UserError, match=r"training\.k is 1\.0 there and 0\.5 here"):
        run_lib.train(other, tmp_path / "run")
    # A damaged checkpoint is one line, and stays where it is.
    for file in (tmp_path / "run" / "checkpoints" / "12").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"checkpoints/12 can't be read"):
        run_lib.train(tiny_config(n_iters=13), tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "12").is_dir()


def test_train_eval_and_sample_leave_what_they_promise(tmp_path):
    config = tiny_config(n_iters=6, snapshot_sampling=True)
    config.sampling.update(batch_size=8, n_images=12, rtol=1e-2, atol=1e-2)
    config.eval.update(
        batch_size=8, num_samples=16, num_test_data=12, nelbo_draws=2, rtol=1e-2, atol=1e-2
    )
    config.eval.cache_dir = str(tmp_path / "cache")
    workdir = tmp_path / "run"
    run_lib.train(config, workdir)
    assert len(list((workdir / "samples").glob("step_*.png"))) == 1
    assert list((workdir / "tensorboard").glob("events*"))

    report = run_lib.evaluate(config, workdir)
    assert report == json.loads((workdir / "eval" / "report.json").read_text())
    assert report["num_test_images"] == 12 and report["num_samples"] == 16
    assert np.isfinite([v for v in report.values() if isinstance(v, float)]).all()
    for name in ("nll", "nelbo", "nll_untrained_network", "nll_gaussian"):
        assert 1 < report[name] < 15, name
    assert not any("fid" in name for name in report)
    text = (workdir / "eval" / "report.md").read_text()
    assert "the untrained network by" in text and "a Gaussian by" in text and "not FID" in text
    # Everything again is the same again.
    assert run_lib.evaluate(config, workdir) == report

    grid = Image.open(run_lib.sample(config, workdir))
    samples = np.load(workdir / "samples" / "samples.npz")["samples"]
    assert samples.shape == (12, 8, 8, 1) and samples.dtype == np.uint8
    assert set(np.unique(samples)) <= set(np.round(np.arange(17) * 255 / 16).astype(np.uint8))
    assert min(grid.size) > 100


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--config.training.kk=1"], "kk"),
        (["--config.training.n_iters=many"], "many"),
        (["--config.training.batch_size=6", "devices=4"], "training.batch_size is 6"),
        (["--config.data.dataset=folder", "--config.data.path=/nowhere"], "no folder /nowhere"),
        (["--config.model.nf=18"], "model.nf"),
        (["--mode=fly"], "fly"),
        (["--config=nowhere.py"], "nowhere.py"),
        ([f"--config={ROOT}/README.md"], "can't be loaded"),
        (["--config.seed=-1"], "seed is -1"),
        ([f"--workdir={ROOT}/README.md/run"], "README.md/run can't be written to"),
        (["--mode=sample"], "has no checkpoint"),
        (["digits"], "is not a flag"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, args, line):
    devices = 4 if "devices=4" in args else 1
    args = [a for a in args if a != "devices=4"]
    result = run_main("vp/digits_st.py", f"--workdir={tmp_path}/run", *args, devices=devices)
    assert result.returncode not in (0, None)
    assert line in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("field", "value", "line"),
    [
        ("model.num_scales", 1, "at least 2"),
        ("eval.num_samples", 3, "4 or more"),
        ("training.truncation", "hard", "must be one of fixed, soft, equivalent_weight"),
        ("training.k", -1.0, "at least 0"),
        ("training.truncation_time", 1.5, "below 1"),
        ("training.sde", "vesde", "must be one of vpsde"),
        ("data.image_size", 30, "multiple of 8"),
        ("data.num_channels", 2, "must be 1"),
        ("model.ch_mult", (1, "a"), "positive whole numbers"),
        ("model.nf", 18, "multiple of 4"),
        ("model.dtype", "float16", "float32, bfloat16"),
        ("model.ema_rate", 1.0, "[0, 1)"),
        ("model.beta_max", 0.05, "larger than"),
        ("optim.num_micro_batch", 3, "num_micro_batch (3)"),
        ("optim.lr", float("nan"), "positive"),
        ("sampling.corrector", "magic", "none, langevin"),
        ("eval.batch_size", 0, "positive"),
    ],
)
def test_a_config_that_cannot_work_is_refused(field, value, line):
    config = get_default_config()
    validate(config, 4)
    section, name = field.split(".")
    config[section][name] = value
    with pytest.raises(UserError) as error:
        validate(config, 4)
    assert line in str(error.value) and name in str(error.value)


def test_a_misspelt_field_in_a_recipe_is_refused():
    with pytest.raises(AttributeError, match="trunctaion"):
        get_default_config().training.trunctaion = "soft"
    with pytest.raises(KeyError, match="unbounded"):
        get_default_config().model.update(unbounded=True)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "vp").glob("[a-z]*.py")))
def test_every_recipe_is_valid(path):
    module = __import__(f"configs.vp.{path.stem}", fromlist=["get_config"])
    config = module.get_config()
    for num_devices in (1, 2, 4, 8):
        validate(config, num_devices)
    setup_shape = jax.eval_shape(
        lambda: run_lib._init_state(
            config, run_lib.mutils.create_model(config), run_lib.losses.get_optimizer(config)
        )
    )
    assert run_lib.mutils.count_params(setup_shape.params) > 100_000


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    config = tiny_config(n_iters=12)
    config.optim.update(lr=1e30, warmup=0)
    with pytest.raises(UserError, match=r"the loss is .* at step \d+ \(τ = "):
        run_lib.train(config, tmp_path)
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))
