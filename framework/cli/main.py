"""The command ``orthotrain``: LightningCLI's fit, validate, test and predict, and commands that need no trainer.

Importing this module takes a few milliseconds, and ``main`` handles signals before anything else. Every other module is
imported where it is needed, so that a signal at any later moment ends the command with one line.
"""

import sys
from collections.abc import Callable, Sequence

from orthotrain.console.streams import open_standard_streams, reader_is_gone, silence_standard_output
from orthotrain.console.termination import INTERRUPTED, NAMES, Ended, check, give_back, listen

TYPE_CHECKING = False  # as typing.TYPE_CHECKING, whose import takes as long as this whole module
if TYPE_CHECKING:
    from argparse import ArgumentParser

USAGE = """usage: orthotrain COMMAND [options]

  fit       train from a config:      orthotrain fit -c pretrain/quickstart.yaml
  validate  evaluate a checkpoint:    orthotrain validate -c CONFIG --ckpt_path last
  test      the same on the test split
  predict   write generated samples:  orthotrain predict -c CONFIG --ckpt_path last
  export    write a merged model:     orthotrain export --ckpt CHECKPOINT --out DIR [--format hf|peft]
  plan      count the parameters and bytes of a config before anything is allocated
  plugins   list the registered parameterizations
  calibrate measure what the parts of a POET layer cost on this device, for route=auto
  consolidate FOLDER FILE    write a distributed checkpoint as one file

'orthotrain COMMAND --help' lists the options of a command. A later -c file overrides keys of an earlier one, and
--a.b.c VALUE overrides one key. A config that is no file is looked up among the configs of the package.

  orthotrain fit --help                     options of the trainer
  orthotrain fit --model.help PoetModule    options of a module; --data.help TextData: options of its data
  orthotrain fit -c CONFIG --print_config   the config of a run with every default
  orthotrain fit -c CONFIG --run_folder DIR --ckpt_path last    resume from the newest checkpoint in DIR"""

SYNONYMS = {
    **dict.fromkeys(("train", "finetune", "pretrain"), "fit"),
    **dict.fromkeys(("eval", "evaluate"), "validate"),
    **{"generate": "predict", "merge": "export"},
}
"""Names that other programs give to the commands -> our commands."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; a known failure ends in one line on standard error (:mod:`orthotrain.console.failures`).

    SIGTERM and Ctrl-C end the command at its next safe point (:mod:`orthotrain.console.termination`), with exit code
    143 or 130 whatever else has happened.

    Args:
        argv: The command and its options. None takes the arguments of the process, which ends afterwards: a signal
            that comes later ends the process at once.
    """
    before = listen()
    error: BaseException | None = None
    try:
        _run(list(sys.argv[1:] if argv is None else argv))
    except BaseException as caught:
        error = caught
    signum = give_back(before, ending=argv is None)
    if signum:
        _end_as_asked(signum, error)
    if error is not None:
        raise error


def _run(arguments: list[str]) -> None:
    if not open_standard_streams():
        exit_with_error("standard output is closed: write it to a file, or to /dev/null")
    try:
        _dispatch(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        exit_with_error(INTERRUPTED, code=130)
    except SystemExit:
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        from orthotrain.console.failures import explain

        explanation = explain(error)
        if explanation is None:
            raise
        if reader_is_gone():
            silence_standard_output()
        exit_with_error(*explanation)


def _end_as_asked(signum: int, error: BaseException | None) -> None:
    """Exit with the code of the signal; print the reason unless it was printed before."""
    if error is None:
        print(f"orthotrain: {NAMES[signum]} came when the command was done", file=sys.stderr, flush=True)
    elif not isinstance(error, SystemExit):  # such as the error of a step when a rank or a worker has ended
        exit_with_error(f"{INTERRUPTED} ({type(error).__name__}: {error})", code=128 + signum)
    elif isinstance(error, Ended) and error.message:
        exit_with_error(error.message, code=128 + signum)
    sys.exit(128 + signum)


def _dispatch(arguments: list[str]) -> None:
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(USAGE)
        return
    if command == "--version":
        from importlib import metadata

        print(f"orthotrain {metadata.version('orthotrain')}")
        return
    from orthotrain.cli.config_files import resolve_config_arguments
    from orthotrain.console.failures import check_working_folder, quiet_threads
    from orthotrain.console.filtered_messages import hide_messages
    from orthotrain.errors import ConfigurationError

    hide_messages()
    quiet_threads()
    check_working_folder()
    check()
    if command in TRAINER_COMMANDS:
        run_trainer([command, *resolve_config_arguments(arguments[1:])])
    elif command in COMMANDS:
        COMMANDS[command](resolve_config_arguments(arguments[1:]))
    else:
        raise ConfigurationError(_unknown(command))


def _unknown(command: str) -> str:
    import difflib

    known = [*TRAINER_COMMANDS, *COMMANDS]
    near = difflib.get_close_matches(command, [*known, *SYNONYMS], n=1)
    hint = f"did you mean {SYNONYMS.get(near[0], near[0])}? " if near else ""
    return f"unknown command {command!r}: {hint}choose one of {', '.join(known)}"


def exit_with_error(message: str, code: int = 2) -> None:
    """Print one line on standard error and exit: with 2 for bad input, with 1 for a run that failed."""
    import contextlib

    from orthotrain.errors import visible

    # if standard error is closed, the exit code still reports the failure
    with contextlib.suppress(OSError, ValueError):
        print(f"orthotrain: error: {visible(message)}", file=sys.stderr, flush=True)
    sys.exit(code)


def print_written(path: object) -> None:
    """Print which file or folder a command has written, with control characters of its name made visible."""
    from orthotrain.errors import visible

    print(f"wrote {visible(str(path))}")


def run_trainer(arguments: list[str]) -> None:
    """Run one of LightningCLI's commands."""
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from orthotrain.cli.trainer_cli import OrthotrainCLI
    from orthotrain.errors import ConfigurationError

    check()
    try:
        OrthotrainCLI(args=arguments)
    except MisconfigurationException as error:  # Lightning raises it for options of the user
        raise ConfigurationError(str(error)) from error


def export_command(arguments: list[str]) -> None:
    """``orthotrain export``: write a merged Hugging Face folder or a PEFT adapter from a checkpoint."""
    parser = _parser("export", "Write a merged Hugging Face folder (safetensors, config, tokenizer) or a PEFT adapter.")
    parser.add_argument("--format", default="hf", choices=["hf", "peft"], help="merged model, or OFT adapter for PEFT")
    parser.add_argument("--ckpt", required=True, help="checkpoint of a run")
    parser.add_argument("--out", required=True, help="folder to write; must be new or empty")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"],
                        help="dtype of the merged model; by default the network's")  # fmt: skip
    parser.add_argument("--allow", nargs="*", default=[], metavar="MODULE.CLASS",
                        help="your own classes, and loading options, that the checkpoint may name")  # fmt: skip
    parser.add_argument("--trust_remote_code", action="store_true",
                        help="run code that comes with the pretrained model, as the run did")  # fmt: skip
    parser.add_argument("--base", help="folder of the base model, if it has moved since the run")
    options = parser.parse_args(arguments)
    from orthotrain.export import export_checkpoint  # takes seconds, so a wrong command line is refused first
    from orthotrain.files.paths import local_path

    check()
    checkpoint, out = local_path(options.ckpt, "--ckpt"), local_path(options.out, "--out")
    base = options.base and local_path(options.base, "--base")
    given = {"allow": options.allow, "trust_remote_code": options.trust_remote_code, "base": base}
    print_written(export_checkpoint(checkpoint, out, options.format, options.dtype, **given))


def plan_command(arguments: list[str]) -> None:
    """``orthotrain plan``: count parameters and bytes of a config without allocating them."""
    from orthotrain.cli.trainer_cli import PlanCLI

    print(PlanCLI(args=arguments, run=False).plan.table())


def plugins_command(arguments: list[str]) -> None:
    """``orthotrain plugins``: list the registered parameterizations, one line for each."""
    _parser("plugins", "List the registered parameterizations.").parse_args(arguments)
    from orthotrain.plugins import get, known

    for name in known():
        cls = get(name)
        print(f"{name:<18}{(cls.__doc__ or '').strip().splitlines()[0]}  [{cls.__module__}.{cls.__qualname__}]")


def calibrate_command(arguments: list[str]) -> None:
    """``orthotrain calibrate``: measure the parts of a POET layer; ``route=auto`` uses the result from then on."""
    from orthotrain.cli.calibrate import calibrate, comparison, usable_device, write_table
    from orthotrain.files.paths import local_path

    parser = _parser("calibrate", "Measure what the parts of a POET layer cost on a device, for route=auto.")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where to measure; by default cpu")
    parser.add_argument("--out", help="file to write; by default routes.json in the cache folder, which layers read")
    options = parser.parse_args(arguments)
    entry, parts = calibrate(usable_device(options.device))
    print(comparison(entry, parts))
    print_written(write_table(entry, options.out and local_path(options.out, "--out")))


def consolidate_command(arguments: list[str]) -> None:
    """``orthotrain consolidate``: write a distributed checkpoint as one file."""
    description = "Write a distributed checkpoint as one file, which every strategy and export can read."
    parser = _parser("consolidate", description)
    parser.add_argument("folder", metavar="FOLDER", help="the distributed checkpoint")
    parser.add_argument("file", metavar="FILE", help="file to write; must not exist")
    options = parser.parse_args(arguments)
    from orthotrain.distributed.consolidate import consolidate

    print_written(consolidate(options.folder, options.file))


TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "export": export_command,
    "plan": plan_command,
    "plugins": plugins_command,
    "calibrate": calibrate_command,
    "consolidate": consolidate_command,
}


def _parser(command: str, description: str) -> "ArgumentParser":
    """Return a parser whose errors are a single line, as all errors of the commands are."""
    from argparse import ArgumentParser
    from typing import NoReturn

    from orthotrain.errors import ConfigurationError

    class Parser(ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ConfigurationError(f"{self.prog.removeprefix('orthotrain ')}: {message}; see {self.prog} --help")

    return Parser(prog=f"orthotrain {command}", description=description, allow_abbrev=False)
