"""The command line: python main.py --config configs/vp/digits_st.py --mode train."""

import argparse
import logging
import os
import pathlib
import re
import sys
import traceback

try:
    from absl import app, flags
    from ml_collections import config_flags

    from configs import saved
    from configs.errors import UserError
    from runtime import environment, interrupts
except ModuleNotFoundError as missing:
    sys.exit(
        f"error: the package of {missing.name} is not installed here; activate the environment, "
        ". .venv/bin/activate, which make .venv builds, or install requirements.txt"
    )

# They make the configs of networks of others.
_EDM, _DIFFUSERS = "official/edm.py", "official/diffusers.py"

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "A config file; --config.section.field=value overrides a field.",
    lock_config=True,
)
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "eval", "sample", "stats", "import", "export", "push", "compare"],
    "What to do; compare takes the folders of runs.",
)
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "For --mode import: an official .pth file, a .pkl of EDM, or a folder of diffusers.",
)
_TO = flags.DEFINE_string(
    "to",
    None,
    "For --mode export: the new folder, or the new .pth file; push: hf://user/name of the Hugging "
    "Face hub; compare: the folder.",
)
_FORMAT = flags.DEFINE_enum(
    "format",
    None,
    ["safetensors", "pth", "diffusers"],
    "For --mode export: a folder with the EMA weights, which is usual, the official release's "
    "checkpoint, or a pipeline of diffusers.",
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "The folder of the run; by default runs/<folder of the config>/<name of the config>.",
)
_OVERRIDE = flags.DEFINE_bool(
    "override", False, "For --mode train: continue in a workdir of another config."
)
_INIT_FROM = flags.DEFINE_string(
    "init_from",
    None,
    "For --mode train: start a new run from the weights of another run, or of an exported model.",
)
_EXPERT = flags.DEFINE_string(
    "expert", None, "For --mode eval and sample: RUN@t, a run whose score is used from t on."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "For several processes: host:port of process 0."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "The number of processes.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "The index of this process, from 0.")
_TIMEOUT = flags.DEFINE_integer("timeout", 300, "Seconds to wait for the other processes.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Detect processes and coordinator by SLURM, Open MPI or the TPU."
)


def _with_saved_config(argv: list[str]) -> list[str]:
    """Without --config, add a flag for the config saved in the workdir, or by --init_from's run.

    In a new workdir, the config is that of a network of others that is to be imported.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    parser.add_argument("--workdir")
    parser.add_argument("--init_from")
    parser.add_argument("--checkpoint", default="")
    try:
        given, _ = parser.parse_known_args(argv[1:])
    except argparse.ArgumentError:
        return argv  # a flag without a value; absl reports it
    path = pathlib.Path((given.config or __file__).partition(":")[0])
    if not path.is_file():
        raise UserError(f"--config: there is no file {path} in {pathlib.Path.cwd()}")
    folders = [pathlib.Path(name) for name in (given.workdir, given.init_from) if name]
    found = [folder for folder in folders if (folder / "config.json").exists()]
    if given.config:
        return argv
    of_others = {
        given.checkpoint.endswith(".pkl"): _EDM,
        os.path.isdir(given.checkpoint): _DIFFUSERS,
    }
    if of_others.get(True) and not given.workdir:
        raise UserError(
            "--checkpoint of another project needs --workdir, the new folder of the run"
        )
    if found and given.workdir:
        recipe, source = "configs/saved.py", str(found[0])
    elif True in of_others:
        recipe, source = of_others[True], given.checkpoint
    else:
        return argv
    recipe = os.path.join(os.path.dirname(os.path.abspath(__file__)), recipe)
    return [argv[0], f"--config={recipe}:{source}", *argv[1:]]  # overrides come after it


def _with_home(argument: str) -> str:
    """Expand ~ in --flag=~/path; a shell expands it only at the start of a word."""
    name, sign, value = argument.partition("=")
    return f"{name}={os.path.expanduser(value)}" if sign and value.startswith("~") else argument


def _parse(argv: list[str]) -> list[str]:
    """Parse the flags; a mistake ends the program with a one-line message."""
    argv = [_with_home(argument) for argument in argv]
    environment.prepare()  # before the config file is loaded, which may use JAX
    logging.getLogger("soft_truncation").setLevel(logging.WARNING)  # an old name of a field
    try:
        rest = flags.FLAGS(_with_saved_config(argv))
        if _MODE.value == "compare":
            return rest
        if _CONFIG.value is None and _INIT_FROM.value:
            raise UserError(
                f"--init_from without --config needs --workdir, and {_INIT_FROM.value} to be a run "
                "or an exported model"
            )
        if _CONFIG.value is None and _WORKDIR.value:
            raise UserError(
                f"{_WORKDIR.value} has no run (no config.json there); give --workdir of one, or "
                "--config FILE for a new one"
            )
        if _CONFIG.value is None:
            raise UserError(
                "--config is missing; for example --config configs/vp/digits_st.py, or --workdir "
                "of a run that has one"
            )
        if len(rest) > 1:
            raise UserError(f"{rest[1]!r} is not a flag; overrides look like --config.seed=1")
    except (UserError, flags.Error) as error:
        _fail(error)
    except Exception as error:  # a config file is Python code, which can raise any kind of error
        message = str(error.args[0]) if error.args else ""  # it may end with a suggestion
        field = message.split()[-1].strip("'\"?") if message else ""
        given = [arg for arg in argv if arg.startswith("--config.") and field and field in arg]
        if given and isinstance(error, (AttributeError, KeyError)):
            meant = re.search(r'mean "(\w+)"', message)
            hint = f"; did you mean {meant[1]}?" if meant else ""
            _fail(UserError(f"the config has no such field: {' '.join(given)}{hint}"))
        what = f"{type(error).__name__}: {error}{_place(error)}"
        _fail(UserError(f"--config can't be loaded: {what}"))
    return rest


def _place(error: Exception) -> str:
    """The place in the config file where the error was raised, for the message."""
    places = [
        f" ({frame.f_code.co_filename}, line {line})"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__") == "config_config"  # ml_collections' name for the file
    ]
    return places[-1] if places else ""


def _fail(error: Exception) -> None:
    print(f"error: {environment.shown(' '.join(str(error).split()))}", file=sys.stderr)
    sys.exit(2)


def _config_path() -> tuple[str, str]:
    """The file that --config names, and its argument, which may have colons; empty: none."""
    path, _, argument = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    return path, argument


def _config_file() -> str:
    """The file of the config; for a config saved in a workdir, the file that it recorded."""
    path, workdir = _config_path()
    if workdir and pathlib.Path(path).name == "saved.py":
        return str(saved.read(workdir).get("config_file", ""))
    return "" if path.endswith((_EDM, _DIFFUSERS)) else str(pathlib.Path(path).resolve())


def _default_workdir() -> str:
    path = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"]))
    return str(pathlib.Path("runs") / path.parent.name / path.stem)


def _hint_at_config_file(error: UserError) -> str:
    """A hint to add --config if a saved config may need what its config file registers."""
    if not _config_path()[0].endswith("saved.py") or "it must be one of" not in str(error):
        return ""
    file = _config_file()
    if not file:  # of an exported model, whose folder may have come without it
        return "; if a config file of your own registers it, add --config=FILE"
    return (
        f"; the run's config file may register it: --config={file} runs that Python file, so add "
        "it only if you trust who made it"
    )


def _check_flags() -> None:
    """Raise a UserError for a flag of another mode, or one that the mode lacks."""
    only = {"checkpoint": "import", "override": "train", "init_from": "train"}
    only |= {"to": "export or push", "expert": "eval or sample"}
    for flag, mode in only.items():
        if getattr(flags.FLAGS, flag) and _MODE.value not in mode.split(" or "):
            raise UserError(f"--{flag} is for --mode {mode}")
    if _FORMAT.value and _MODE.value != "export":
        raise UserError("--format is for --mode export; for samples, --config.sampling.format")
    if _MODE.value == "export" and not _TO.value:
        raise UserError("--mode export needs --to, a new folder or .pth file")
    if _MODE.value == "push" and not _TO.value:
        raise UserError("--mode push needs --to hf://user/name")
    if _MODE.value == "import" and not _CHECKPOINT.value:
        raise UserError("--mode import needs --checkpoint, a .pth or .pkl file, or a folder")


def _run(workdir: str) -> None:
    """Run the chosen mode; its modules are imported when all processes are connected."""
    import build
    import evaluation
    import run_lib
    from modes import sample, transfer

    config, mode = _CONFIG.value, _MODE.value
    if mode == "train":
        run_lib.train(config, workdir, _OVERRIDE.value, _config_file(), _INIT_FROM.value or "")
        return
    if mode == "eval":
        evaluation.evaluate(config, workdir, _EXPERT.value or "")
        return
    setup = build.open_run(config, workdir, _EXPERT.value or "")
    if mode == "sample":
        sample.sample(setup, workdir)
    elif mode == "stats":
        evaluation.make_statistics(setup)
    elif mode == "export":
        others = {"pth": transfer.export_official, "diffusers": transfer.export_diffusers}
        export = others.get(_FORMAT.value or "", transfer.export)
        export(setup, workdir, _TO.value or "")
    elif mode == "push":
        transfer.push(setup, workdir, _TO.value or "")
    else:
        transfer.import_official(setup, workdir, _CHECKPOINT.value or "", _config_file())


def main(argv: list[str]) -> None:
    """Run the chosen mode; a mistake that the user can fix is printed as one line."""
    from runtime import hosts

    if _MODE.value == "compare":
        _compare(argv[1:])
        return
    with hosts.ending_together():
        _connect_and_run(_WORKDIR.value or _default_workdir())


def _compare(runs: list[str]) -> None:
    from modes import compare

    folder = pathlib.Path(_TO.value or "runs/comparison")
    try:
        print(compare.compare(runs, folder))
    except (UserError, OSError) as error:
        _fail(error)
    print(f"written to {folder}/compare.md, with the curves")


def _connect_and_run(workdir: str) -> None:
    from runtime import hosts

    try:
        hosts.initialize(
            _COORDINATOR.value,
            _NUM_PROCESSES.value,
            _PROCESS_ID.value,
            _DISTRIBUTED.value,
            _TIMEOUT.value,
        )
        environment.check_devices()
        environment.keep_freed_memory()
        level = logging.INFO if hosts.is_main() else logging.ERROR
        logging.getLogger("soft_truncation").setLevel(level)
        _check_flags()
        _run(workdir)
    except UserError as error:
        _fail(UserError(f"{error}{_hint_at_config_file(error)}"))
    except OSError as error:
        if error.errno is None:
            raise
        where = error.filename or workdir
        _fail(UserError(f"{where}: {error.strerror}; mend that and run the same command again"))


if __name__ == "__main__":
    with interrupts.ending_program():
        app.run(main, flags_parser=_parse)
