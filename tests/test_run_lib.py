"""Runs as a user starts them: separate processes, real files, real signals."""

import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import build
import evaluation
import main
import run_lib
import train_step
from build import REGISTRIES
from configs import saved
from configs.default import get_default_config
from configs.errors import UserError
from configs.saved import as_recorded
from configs.validate import validate
from runtime import workdir
from runtime.workdir import check_network, claim_workdir
from tests.helpers import GOLDEN, environment_of, sample_run, tiny_config
from tests.jobs import (
    DIGITS,
    ROOT,
    SMALL_MAIN,
    TINY,
    assert_identical,
    kill,
    losses_of,
    run_main,
    start,
    state_of,
    wait_until,
)
from tests.make_folder import make_folder

NOISE = "--config.model.parametrization=noise"  # as official networks do


@pytest.mark.usefixtures("small_network_here")
def test_a_killed_run_goes_on(tmp_path):
    config, args = tiny_config(n_iters=30, snapshot_freq=1000, snapshot_freq_for_preemption=10), []
    for section, fields in config.items():
        for name, value in fields.items() if section in ("model", "optim", "training") else ():
            args.append(f"--config.{section}.{name}={value}")
    cut = tmp_path / "cut"
    options = {"devices": 4, "program": SMALL_MAIN, "stderr": subprocess.DEVNULL}
    process = start(DIGITS, *args, f"--workdir={cut}", **options)
    wait_until((cut / "checkpoints" / "10").exists, process)
    kill(process)
    assert max(losses_of(cut)) < 30
    assert_identical(run_lib.train(config, cut), run_lib.train(config, tmp_path / "whole"))
    assert losses_of(cut) == losses_of(tmp_path / "whole")


@pytest.mark.release  # test_a_killed_run_goes_on is its quick form
def test_a_killed_run_continues_and_ends_bit_identical(tmp_path):
    args = [
        *TINY,
        "--config.training.n_iters=60",
        "--config.training.snapshot_freq_for_preemption=5",
    ]
    whole = run_main(DIGITS, *args, f"--workdir={tmp_path}/whole")
    assert whole.returncode == 0, whole.stderr
    assert "60/60" in whole.stderr and "images/s" in whole.stderr and "left" in whole.stderr

    cut = tmp_path / "cut"
    process = start(DIGITS, *args, f"--workdir={cut}", stderr=subprocess.DEVNULL)
    first, metrics = cut / "checkpoints" / "5", cut / "metrics.jsonl"
    wait_until(lambda: first.exists() and metrics.read_text().count("loss") > 13, process)
    kill(process)
    assert max(losses_of(cut)) < 60

    resumed = run_main(DIGITS, *args, f"--workdir={cut}")
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed at step" in resumed.stderr
    config = tiny_config()
    config.optim.warmup = 100
    a, b = (state_of(config, tmp_path / name) for name in ("whole", "cut"))
    assert int(a.step) == 60
    assert_identical(a, b)
    # The log has every step once, as if nothing had happened.
    assert losses_of(cut) == losses_of(tmp_path / "whole")


@pytest.mark.usefixtures("small_network_here")
@pytest.mark.slow
def test_a_finished_run_does_nothing_and_a_longer_one_goes_on(tmp_path):
    short = run_lib.train(tiny_config(n_iters=6), tmp_path / "run")
    again = run_lib.train(tiny_config(n_iters=6), tmp_path / "run")
    assert_identical(short, again)
    longer = run_lib.train(tiny_config(n_iters=12), tmp_path / "run")
    straight = run_lib.train(tiny_config(n_iters=12), tmp_path / "straight")
    assert int(longer.step) == 12
    assert_identical(longer, straight)

    # A config.json from before a field was made is of the same run.
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    del recorded["data"]["category"], recorded["training"]["mixed"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(recorded))
    assert_identical(longer, run_lib.train(tiny_config(n_iters=12), tmp_path / "run"))

    other = tiny_config(n_iters=12, k=0.5)
    with pytest.raises(UserError, match=r"training\.k is 1\.0 there and 0\.5 here"):
        run_lib.train(other, tmp_path / "run")
    assert int(run_lib.train(other, tmp_path / "run", override=True).step) == 12


def test_without_a_config_it_is_that_of_the_workdir(tmp_path):
    config = tiny_config(k=float("inf"))
    workdir.make_folder(tmp_path / "run", "--workdir")
    claim_workdir(as_recorded(config), tmp_path / "run", record=True)
    assert saved.get_config(str(tmp_path / "run")) == config
    given = ["main.py", "--workdir", f"{tmp_path}/run", "--config.seed=1"]
    recipe, *rest = main._with_saved_config(given)[1:]
    assert recipe == f"--config={ROOT}/configs/saved.py:{tmp_path}/run" and rest == given[1:]
    for others in (
        ["main.py", f"--config={ROOT}/configs/saved.py", *given[1:]],
        ["main.py", "--workdir=/none"],
    ):
        assert main._with_saved_config(others) == others
    path = tmp_path / "run" / "config.json"
    deep = '{"data": ' * 500 + "{}" + "}" * 500
    for damage in ("[]", "{", "3", '{"data": 3}', deep, "[" * 100_000, " " * 2**24 + "{}"):
        path.write_text(damage)
        with pytest.raises(UserError, match="is damaged"):
            saved.get_config(str(tmp_path / "run"))
    path.unlink()
    for what in ("/dev/zero", "pipe"):
        os.mkfifo(path) if what == "pipe" else path.symlink_to(what)
        with pytest.raises(UserError, match=r"is damaged .it is no file"):
            saved.get_config(str(tmp_path / "run"))
        path.unlink()


# Imports the program once, and runs each command in a fork.
EACH_IN_A_FORK = """
import json, os, sys
import evaluation, main, modes.sample, modes.transfer, run_lib
from absl import app
codes = []
for i, args in enumerate(json.loads(sys.argv[1])):
    child = os.fork()
    if not child:
        os.dup2(os.open(f"{i}.txt", os.O_CREAT | os.O_WRONLY), 2)
        sys.argv = ["main.py", *args]
        app.run(main.main, flags_parser=main._parse)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(codes)
"""


def said_by(commands, folder):
    """(exit code, text of the error stream) of main.py with each command, on four devices."""
    environment = environment_of(4) | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", EACH_IN_A_FORK, json.dumps(commands)]
    done = subprocess.run(words, cwd=folder, env=environment, stdout=subprocess.PIPE, check=True)
    texts = [(folder / f"{i}.txt").read_text() for i in range(len(commands))]
    return list(zip(json.loads(done.stdout), texts, strict=True))


def test_a_workdir_names_the_file_that_registered_what_its_config_names(tmp_path):
    config, commands = tiny_config(), []
    config.training.prior = "mine\x1b[2J"  # which would clear the terminal
    trust = "--config=/mine/my_config.py runs that Python file, so add it only if you trust who"
    asked = {"/mine/my_config.py": trust, "": "add --config=FILE"}
    for file in asked:
        run = tmp_path / f"a:run of {len(file)}"
        claim_workdir(as_recorded(config), run, record=True, config_file=file)
        assert saved.get_config(run) == config
        commands.append([f"--workdir={run}", "--mode=sample"])
    for (code, text), told in zip(said_by(commands, tmp_path), asked.values(), strict=True):
        assert code == 2 and "\x1b" not in text and len(text.splitlines()) == 1
        assert "training.prior is 'mine\\x1b[2J'; it must be one of power" in text
        assert told in text


def test_a_name_with_control_characters_can_not_forge_a_line_of_the_log():
    program = """
import logging
from runtime import environment
environment.prepare()
name = "a\\n12:00:00 all is well\\r\\x1b[31m\\u202e\\udcff.png"
logging.getLogger("soft_truncation").warning("left out: %s", name)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    (line,) = done.stderr.splitlines()
    assert line.endswith(r"left out: a\n12:00:00 all is well\r\x1b[31m\u202e\udcff.png")


def test_a_workdir_within_another_runs_is_refused(tmp_path):
    claim_workdir(as_recorded(tiny_config()), tmp_path / "run", record=True)
    (tmp_path / "run" / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"lies within .*run, the workdir of another run"):
        claim_workdir(as_recorded(tiny_config()), tmp_path / "run" / "p2", record=True)


@pytest.mark.slow
def test_a_run_of_an_older_version_goes_on(tmp_path):
    shutil.copytree(GOLDEN / "workdir", tmp_path / "run")
    config = saved.get_config(tmp_path / "run")
    assert int(state_of(config, tmp_path / "run").step) == 4
    config.training.n_iters = 8
    assert int(run_lib.train(config, tmp_path / "run").step) == 8
    losses, expected = losses_of(tmp_path / "run"), {}
    for line in (GOLDEN / "workdir" / "metrics_of_8_steps.jsonl").read_text().splitlines():
        row = json.loads(line)
        expected |= {row["step"]: row["loss"]} if "loss" in row else {}
    assert list(losses) == list(range(1, 9))
    # On the machine and the JAX that it was made by, they are equal bit for bit.
    np.testing.assert_allclose(
        [losses[i] for i in losses], [expected[i] for i in losses], rtol=1e-4
    )


@pytest.mark.parametrize(
    ("field", "value", "modes"),
    [
        ("training.k", 0.5, ["train"]),
        ("training.snapshot_freq", 7, ["train"]),
        ("optim.lr", 1.0, ["train"]),
        ("seed", 7, ["train"]),
        ("model.dtype", "bfloat16", ["train"]),
        ("model.remat", True, []),
        ("eval.num_samples", 99, []),
        ("model.nf", 12, ["train", "eval"]),
        ("data.image_size", 16, ["train", "eval"]),
        ("training.truncation_time", 1e-3, ["train", "eval"]),
    ],
)
def test_what_may_differ_from_the_workdirs_config(tmp_path, field, value, modes):
    claim_workdir(as_recorded(tiny_config()), tmp_path, record=True)
    other = tiny_config()
    section, _, name = field.rpartition(".")
    with (other[section] if section else other).unlocked():
        (other[section] if section else other)[name] = value

    def train():
        claim_workdir(as_recorded(other), tmp_path, record=False)

    def evaluate():
        check_network(as_recorded(other), tmp_path)

    for mode, check in (("train", train), ("eval", evaluate)):
        if mode in modes:
            with pytest.raises(UserError, match=f"another config: {field} is"):
                check()
        else:
            check()


@pytest.mark.usefixtures("small_network_here", "short_classifier", "curves")
def test_train_eval_and_sample_leave_what_they_promise(tmp_path):
    config = tiny_config(n_iters=6, snapshot_sampling=True)
    config.sampling.update(batch_size=8, n_images=12, method="dpm_solver", num_steps=3)
    config.eval.update(batch_size=8, num_samples=16, num_test_data=12, nelbo_draws=2, nll_steps=32)
    config.eval.cache_dir = str(tmp_path / "cache")
    workdir = tmp_path / "run"
    run_lib.train(config, workdir)
    assert (workdir / "training.png").stat().st_size > 5000
    assert len(list((workdir / "samples").glob("step_*.png"))) == 1
    assert list((workdir / "tensorboard").glob("events*"))

    report = evaluation.evaluate(config, workdir)
    assert report == json.loads((workdir / "eval" / "report.json").read_text())
    assert report["num_test_images"] == 12 and report["num_samples"] == 16
    assert np.isfinite([v for v in report.values() if isinstance(v, float)]).all()
    for name in ("nll", "nelbo", "nll_untrained_network", "nll_gaussian"):
        assert 1 < report[name] < 15, name
    assert not any("fid" in name for name in report)
    text = (workdir / "eval" / "report.md").read_text()
    assert (
        "the untrained network (itself scored on 8 of them) by" in text
        and "a Gaussian by" in text
        and "not FID" in text
    )
    # Everything again is the same again.
    assert evaluation.evaluate(config, workdir) == report

    grid = Image.open(sample_run(config, workdir))
    samples = np.load(workdir / "samples" / "samples.npz")["samples"]
    assert samples.shape == (12, 8, 8, 1) and samples.dtype == np.uint8
    assert set(np.unique(samples)) <= set(np.round(np.arange(17) * 255 / 16).astype(np.uint8))
    assert min(grid.size) > 100


@pytest.mark.release
@pytest.mark.slow
def test_an_official_checkpoint_is_imported_sampled_and_refused_a_second_time(tmp_path):
    args = [
        "--config.data.image_size=16",
        "--config.data.centered=False",
        "--config.model.nf=8",
        "--config.model.ch_mult=(1,2)",
        "--config.model.num_res_blocks=1",
        "--config.model.attn_resolutions=(8,)",
        f"--workdir={tmp_path}/run",
    ]
    recipe = "ve/cifar10_ncsnpp_st.py"
    checkpoint = f"--checkpoint={GOLDEN}/ve_ncsnpp.pth"
    result = run_main(recipe, *args, "--mode=import", checkpoint)
    assert result.returncode == 0, result.stderr
    assert "step 1234" in result.stderr and "Traceback" not in result.stderr
    sampler = ["--config.sampling.method=dpm_solver", "--config.sampling.num_steps=4"]
    few = ["--config.sampling.n_images=4", "--config.sampling.batch_size=4"]
    # No data are there, and none are needed.
    result = run_main(recipe, *args, "--mode=sample", *sampler, *few)
    assert result.returncode == 0, result.stderr
    assert np.load(tmp_path / "run" / "samples" / "samples.npz")["samples"].shape == (4, 16, 16, 3)
    result = run_main(recipe, *args, "--mode=import", checkpoint)
    assert result.returncode == 2 and "has checkpoints already" in result.stderr


@pytest.mark.release
@pytest.mark.usefixtures("small_network_here")
@pytest.mark.slow
def test_inpainting_and_a_lossless_evaluation_leave_what_they_promise(tmp_path):
    config = tiny_config(n_iters=3)
    config.data.dequantization = "lossless"
    config.training.reconstruction_loss = True
    run_lib.train(config, tmp_path)
    config.eval.update(batch_size=8, num_test_data=8, nelbo_draws=2, rtol=1e-2, atol=1e-2)
    config.eval.update(enable_sampling=False, cache_dir=str(tmp_path / "cache"))
    report = evaluation.evaluate(config, tmp_path)
    assert 1 < report["nelbo_lossless"] < 20 and report["nelbo_lossless_stderr"] > 0

    mask = np.zeros((4, 4), np.uint8)
    mask[:2] = 255  # the upper half, enlarged
    Image.fromarray(mask).save(tmp_path / "mask.png")
    config.sampling.update(method="pc", task="inpaint", n_images=8, batch_size=8)
    config.model.num_scales = 5
    for name, hidden in (
        ("left", np.s_[:, :, :4]),
        ("center", np.s_[:, 2:6, 2:6]),
        (str(tmp_path / "mask.png"), np.s_[:, :4]),
    ):
        config.sampling.mask = name
        path = sample_run(config, tmp_path)
        arrays = np.load(path.with_suffix(".npz"))
        assert arrays["samples"].shape == arrays["originals"].shape == (8, 8, 8, 1)
        kept = np.ones((8, 8, 8, 1), bool)
        kept[hidden] = False
        np.testing.assert_array_equal(arrays["samples"][kept], arrays["originals"][kept])
        assert (arrays["samples"][~kept] != arrays["originals"][~kept]).any()
    # Two images, six and two completions: a row has an original, what is known, and six.
    assert Image.open(path).size[0] > 8 * 48
    own = tmp_path / "own"  # a grey image, and one in colours, which is cropped and resized
    own.mkdir()
    Image.fromarray(np.full((8, 8), 99, np.uint8)).save(own / "a.png")
    Image.fromarray(np.full((20, 40, 3), 200, np.uint8)).save(own / "b.png")
    config.eval.images, config.sampling.n_images = str(own), 64
    arrays = np.load(sample_run(config, tmp_path).with_suffix(".npz"))
    for six, grey in zip(arrays["originals"].reshape(2, 6, 8, 8), (99, 200), strict=True):
        assert (six == round(round(grey * 16 / 255) * 255 / 16)).all()
    np.testing.assert_array_equal(arrays["samples"][:, 4:], arrays["originals"][:, 4:])
    config.sampling.mask = "nothing"
    with pytest.raises(UserError, match=r"sampling\.mask is 'nothing'"):
        sample_run(config, tmp_path)


@pytest.mark.release
@pytest.mark.slow
def test_a_strangers_folder_trains_with_the_command_of_the_readme(tmp_path):
    paths = make_folder(tmp_path / "my folder", 500)
    paths[7].write_bytes(paths[7].read_bytes()[:200])
    args = [f"--config.data.path={tmp_path}/my folder", f"--workdir={tmp_path}/run"]
    args += ["--config.data.image_size=8", "--config.model.nf=8", "--config.model.ch_mult=(1,)"]
    args += ["--config.training.n_iters=3", "--config.training.log_freq=1"]
    args += ["--config.training.snapshot_sampling=False"]
    broken = run_main("vp/folder_st.py", *args)
    assert broken.returncode != 0
    *progress, line = broken.stderr.strip().splitlines()
    assert line.startswith("error: 1 of 500") and str(paths[7]) in line
    assert all("decoding images" in other for other in progress)
    result = run_main("vp/folder_st.py", *args, "--config.data.skip_unreadable=True")
    assert result.returncode == 0, result.stderr
    assert f"left out: {paths[7]}" in result.stderr + result.stdout
    assert list(losses_of(tmp_path / "run")) == [1, 2, 3]


MISTAKES = (
    (["--config.training.kk=1"], "no such field: --config.training.kk=1"),
    (["--config.training.truncaton=soft"], "did you mean truncation?"),
    (["--mode=eval", "--override"], "--override is for --mode train"),
    (["--config.training.n_iters=many"], "many"),
    (["--config.training.batch_size=6"], "training.batch_size is 6"),
    (
        ["--config.data.dataset=folder", "--config.data.path=/nowhere"],
        "no file or folder /nowhere",
    ),
    (["--config.model.nf=18"], "model.nf"),
    (["--mode=fly"], "fly"),
    (["--config=nowhere.py", "--config.seed=1"], "there is no file nowhere.py in /"),
    ([f"--config={ROOT}/README.md"], "can't be loaded"),
    (["--config.seed=-1"], "seed is -1"),
    ([f"--workdir={ROOT}/README.md/run"], "README.md/run can't be written to"),
    (["--mode=sample"], "has no checkpoint"),
    (["digits"], "is not a flag"),
    (["--mode=import"], "needs --checkpoint"),
    (["--mode=export"], "needs --to"),
    (["--mode=compare", "typo", "other"], "typo has no run"),
    (["--to=here"], "--to is for --mode export"),
    (["--mode=import", "--checkpoint=/none.pth", NOISE], "No such file"),
    (["--mode=import", f"--checkpoint={GOLDEN}/vp_ddpmpp.pth", NOISE], "AttnBlock_0"),
)


@pytest.fixture(scope="module")
def said_of_mistakes(tmp_path_factory):
    """(folder, the exit code and the text of the error stream of each mistake)."""
    folder = tmp_path_factory.mktemp("mistakes")
    given = [f"--config={ROOT}/configs/{DIGITS}", f"--workdir={folder}/run"]
    return folder, said_by([[*given, *args] for args, _ in MISTAKES], folder)


@pytest.mark.slow
def test_a_folder_without_a_run_is_named(tmp_path):
    command = [sys.executable, ROOT / "main.py", "--workdir=typo", "--mode=sample"]
    done = subprocess.run(command, cwd=tmp_path, env=environment_of(1), capture_output=True)
    assert done.returncode == 2 and done.stderr.startswith(
        b"error: typo has no run (no config.json"
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(MISTAKES)), ids=lambda i: " ".join(MISTAKES[i][0]))
def test_a_mistake_is_one_line(said_of_mistakes, case):
    folder, said = said_of_mistakes
    code, text = said[case]
    assert code not in (0, None)
    assert MISTAKES[case][1] in text
    assert "Traceback" not in text
    *log, _ = text.strip().splitlines()
    assert not [entry for entry in log if " data: " not in entry and "17 levels" not in entry]
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("field", "value", "line"),
    [
        ("model.num_scales", 1, "at least 2"),
        ("eval.num_samples", 3, "4 or more"),
        ("training.truncation", "hard", "must be one of fixed, soft, equivalent_weight"),
        ("training.k", -1.0, "at least 0"),
        ("eval.nll_steps", 31, "32 or more"),
        ("training.balanced", True, "for training.mixed"),
        ("training.truncation_time", 1.5, "below 1"),
        ("training.sde", "rve-sde", "must be one of vpsde"),
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
    validate(config, 4, REGISTRIES)
    section, name = field.split(".")
    config[section][name] = value
    with pytest.raises(UserError) as error:
        validate(config, 4, REGISTRIES)
    assert line in str(error.value) and name in str(error.value)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"training.sde": "vesde", "model.sigma_max": 0.001}, "sigma_max must be larger"),
        (
            {"training.sde": "vesde", "training.unbounded_parametrization": True},
            "unbounded already",
        ),
        ({"model.scale_by_sigma": True}, "scale_by_sigma is for VE"),
        ({"model.name": "ncsnv2_64"}, "needs training.sde vesde"),
        ({"model.name": "ddpm", "model.fir": True}, "model.fir is True"),
        ({"model.name": "ddpm", "model.patch_size": 2}, "model.patch_size is 2"),
        ({"model.patch_size": 0}, "must be a positive number"),
        ({"model.patch_size": 3}, "needs a multiple of 24"),
        ({"model.fir": True, "model.fir_kernel": (1, 2, 1)}, "even number of taps"),
        ({"model.embedding_type": "fourier", "model.embedding_dim": 64}, "embedding_dim"),
        ({"model.embedding_dim": 3}, "must be even"),
        ({"training.mixed": True, "training.importance_sampling": False}, "mixed needs"),
        ({"training.mixed": True, "training.batch_size": 4}, "times 2, for training.mixed"),
        ({"sampling.predictor": "none"}, "nothing would be sampled"),
        (
            {"sampling.predictor": "ancestral_sampling", "sampling.probability_flow": True},
            "probability_flow needs",
        ),
        ({"sampling.task": "inpaint", "sampling.method": "heun"}, "needs sampling.method=pc"),
        ({"sampling.task": "colorize", "data.num_channels": 1}, "num_channels=3"),
        ({"data.dataset": "digits", "data.path": "somewhere"}, "comes with scikit-learn"),
        ({"training.mixed": True, "training.weighting": "variance"}, "has weightings of its own"),
        ({"data.dataset": "LSUN"}, "data.category is ''"),
        ({"data.dataset": "LSUN", "data.category": "cat"}, "must be one of bedroom"),
        ({"optim.grad_clip": 0.0}, "negative for no clipping"),
        ({"optim.grad_clip": float("nan")}, "negative for no clipping"),
        ({"model.fir": True, "model.fir_kernel": ("a", "b")}, "even number of taps"),
        (
            {"training.truncation": "equivalent_weight", "training.reconstruction_loss": True},
            "no equal of balanced",
        ),
        (
            {"training.sde": "reciprocal_vesde", "sampling.truncation_time": 1e-6},
            "where reciprocal_vesde has its smallest",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(changes, line):
    config = get_default_config()
    for field, value in changes.items():
        section, name = field.split(".")
        config[section][name] = value
    with pytest.raises(UserError, match=line):
        validate(config, 4, REGISTRIES)


def test_a_misspelt_field_in_a_recipe_is_refused():
    with pytest.raises(AttributeError, match="trunctaion"):
        get_default_config().training.trunctaion = "soft"
    with pytest.raises(KeyError, match="unbounded"):
        get_default_config().model.update(unbounded=True)


@pytest.mark.usefixtures("small_network_here")
@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    config = tiny_config(n_iters=12, max_skipped_steps=4)
    config.optim.update(lr=1e30, warmup=0)
    with pytest.raises(UserError, match=r"the loss is .* at step 5 \(τ = .* for 4 steps in a row"):
        run_lib.train(config, tmp_path)
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))
    facts = json.loads((tmp_path / "not_finite.json").read_text())
    assert facts["step"] == 5 and len(facts["t"]) == 8
    assert 1e-5 <= facts["tau"] <= min(facts["t"]) and max(facts["t"]) <= 1


@pytest.mark.usefixtures("small_network_here")
@pytest.mark.slow
def test_several_steps_a_call_with_the_data_on_the_device_are_the_same_run(tmp_path, monkeypatch):
    config = tiny_config(n_iters=13, n_jitted_steps=6, log_freq=3, eval_freq=6)
    one = run_lib.train(config, tmp_path / "one")
    monkeypatch.setattr(train_step, "_on_accelerator", lambda: True)
    assert (
        train_step.steps_a_call(build.set_up(config).loop) == 3
    )  # never past a step that logs or saves
    several = run_lib.train(config, tmp_path / "several")
    # Resumed at a step that no call of three begins at: single ones up to the next that does.
    part = config.copy_and_resolve_references()
    part.training.n_iters = 4
    run_lib.train(part, tmp_path / "resumed")
    resumed = run_lib.train(config, tmp_path / "resumed", override=True)
    for state in (several, resumed):
        assert int(state.step) == 13
        for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(state.params), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
    losses = losses_of(tmp_path / "one")
    assert list(losses) == [3, 6, 9, 12, 13]
    # A window of the log begins anew after the first call, which compiles.
    for name, begin in (("several", 6), ("resumed", 9)):
        ours = losses_of(tmp_path / name)
        for step in range(begin, 13, 3):
            np.testing.assert_allclose(ours[step], losses[step], rtol=1e-4)


def test_skipped_steps_are_counted_over_calls_of_several():
    sums = train_step.LossSums()
    for skipped in ([0, 0, 1], [1, 1, 1], [1, 0, 1]):
        skipped = np.array(skipped)
        sums.add({"loss": np.where(skipped, np.nan, 2.0), "skipped": skipped})
        last = sums.read()
        assert last["streak"] == {1: 1, 4: 4, 6: 1}[last["skipped"]]
    assert (last["loss"], last["steps"], last["skipped"]) == (6.0, 3, 6)


def test_samples_do_not_stop_where_noise_is_left():
    config = tiny_config(sde="reciprocal_vesde", truncation_time=1e-6)
    config.sampling.truncation_time = 1e-6
    build.set_up(config)
    config.sampling.truncation_time = 1e-5
    with pytest.raises(UserError, match=r"truncation_time is 1e-05, where .* has σ/α = 21\.3"):
        build.set_up(config)


def test_a_batch_need_only_be_shared_in_training():
    config = tiny_config(batch_size=12)
    build.set_up(config)
    with pytest.raises(UserError, match=r"batch_size is 12; .* the number of devices \(8\)"):
        build.set_up(config, 8)


@pytest.mark.parametrize(
    ("field", "value", "line"),
    [
        ("training.truncation_time", 1.0, "below 1"),
        ("sampling.truncation_time", 1.0, "below 1"),
        ("model.num_classes", 1, "2 or more"),
        ("model.embedding_dim", 2, "4 or more"),
    ],
)
def test_values_at_the_edge_are_refused(field, value, line):
    config = get_default_config()
    section, name = field.split(".")
    config[section][name] = value
    with pytest.raises(UserError, match=f"{field} is {value}.*{line}"):
        validate(config, 4, REGISTRIES)
