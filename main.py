"""Train, evaluate, sample, …: python main.py --config configs/vp/digits_st.py --mode train."""

import argparse
import errno
import logging
import os
import pathlib
import re
import sys
import traceback

from absl import app, flags
from ml_collections import config_flags

import environment
from configs.default import UserError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The recipe; --config.section.field=value overrides a field.", lock_config=True
)
_MODE = flags.DEFINE_enum(
    "mode", "train", ["train", "eval", "sample", "stats", "import"], "What to do."
)
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "--mode import: an official .pth file.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Default: runs/<config's folder>/<its name>.")
_OVERRIDE = flags.DEFINE_bool("override", False, "--mode train: go on in another config's workdir.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "Several processes: host:port of process 0; README.md says more."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Ask SLURM, Open MPI or the TPU for these.")


def _with_saved_config(argv: list[str]) -> list[str]:
    """Without --config: the config of a workdir that has one."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    parser.add_argument("--workdir")
    try:
        given, _ = parser.parse_known_args(argv[1:])
    except argparse.ArgumentError:
        return argv  # a flag without its value: absl says so
    folder = given.workdir and pathlib.Path(given.workdir)
    if given.config or not folder or not (folder / "config.json").exists():
        return argv
    recipe = pathlib.Path(__file__).parent / "configs" / "saved.py"
    return [argv[0], f"--config={recipe}:{folder}", *argv[1:]]  # overrides come after it


def _with_home(argument: str) -> str:
    """--workdir=~/runs with ~ replaced; a shell does so only where a word begins with it."""
    name, sign, value = argument.partition("=")
    return f"{name}={os.path.expanduser(value)}" if sign and value.startswith("~") else argument


def _parse(argv: list[str]) -> list[str]:
    """Flags, with every mistake as one line."""
    argv = [_with_home(argument) for argument in argv]
    environment.prepare()  # before the config's file, which may use JAX
    try:
        rest = flags.FLAGS(_with_saved_config(argv))
        if _CONFIG.value is None:
            raise UserError(
                "--config is missing; for example --config configs/vp/digits_st.py, or --workdir "
                "of a run that has one"
            )
        path, *_ = config_flags.get_config_filename(flags.FLAGS["config"]).split(":")
        if not pathlib.Path(path).is_file():
            raise UserError(f"--config: there is no file {path}")
        if len(rest) > 1:
            raise UserError(f"{rest[1]!r} is not a flag; overrides look like --config.seed=1")
    except (UserError, flags.Error) as error:
        _fail(error)
    except Exception as error:  # a recipe is Python: it can raise anything at all
        said = str(error.args[0]) if error.args else ""  # it may end with a suggestion
        field = said.split()[-1].strip("'\"?") if said else ""
        given = [arg for arg in argv if arg.startswith("--config.") and field and field in arg]
        if given and isinstance(error, (AttributeError, KeyError)):
            meant = re.search(r'mean "(\w+)"', said)
            hint = f"; did you mean {meant[1]}?" if meant else ""
            _fail(UserError(f"the config has no such field: {' '.join(given)}{hint}"))
        what = f"{type(error).__name__}: {error}{_place(error)}"
        _fail(UserError(f"--config can't be loaded: {what}"))
    return rest


def _place(error: Exception) -> str:
    """Where in the config's file it was raised."""
    places = [
        f" ({frame.f_code.co_filename}, line {line})"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__") == "config_config"  # ml_collections' name for the file
    ]
    return places[-1] if places else ""


def _fail(error: Exception) -> None:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)


def _default_workdir() -> str:
    path = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"]))
    return str(pathlib.Path("runs") / path.parent.name / path.stem)


def main(argv: list[str]) -> None:
    """Do what the flags say."""
    del argv
    config, workdir = _CONFIG.value, _WORKDIR.value or _default_workdir()
    try:
        import hosts

        hosts.initialize(
            *(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, _DISTRIBUTED.value)
        )
        import run_lib

        level = logging.INFO if hosts.is_main() else logging.ERROR
        logging.getLogger("soft_truncation").setLevel(level)
        if _CHECKPOINT.value and _MODE.value != "import":
            raise UserError("--checkpoint is for --mode import")
        if _OVERRIDE.value and _MODE.value != "train":
            raise UserError("--override is for --mode train")
        if _MODE.value == "train":
            run_lib.train(config, workdir, override=_OVERRIDE.value)
        elif _MODE.value == "eval":
            run_lib.evaluate(config, workdir)
        elif _MODE.value == "sample":
            run_lib.sample(config, workdir)
        elif _MODE.value == "stats":
            run_lib.make_statistics(config)
        elif not _CHECKPOINT.value:
            raise UserError("--mode import needs --checkpoint, an official .pth file")
        else:
            run_lib.import_official(config, workdir, _CHECKPOINT.value)
    except UserError as error:
        _fail(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
            raise
        _fail(UserError(f"{error.filename or workdir} can't be written: {error.strerror}"))


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
