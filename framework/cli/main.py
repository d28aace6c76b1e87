"""The command ``orthotrain``: LightningCLI's fit, validate, test and predict, and commands that need no trainer.

Importing this module takes a few milliseconds, and ``main`` handles signals before anything else. Every other module is
imported where it is needed, so that a signal at any later moment ends the command with one line.
"""

import sys
from collections.abc import Sequence

from orthotrain.cli.commands import COMMANDS, prompts_command
from orthotrain.console.streams import open_standard_streams, reader_is_gone, silence_standard_output
from orthotrain.console.termination import INTERRUPTED, NAMES, Ended, check, give_back, listen

USAGE = """usage: orthotrain COMMAND [options]

  fit       train from a config:      orthotrain fit -c pretrain/quickstart.yaml
  validate  evaluate a checkpoint:    orthotrain validate -c CONFIG --ckpt_path last
  test      the same on the test split
  predict   write generated samples:  orthotrain predict -c CONFIG --ckpt_path last
            continue own prompts:     orthotrain predict --ckpt_path CHECKPOINT --prompts "Once upon a time" prompts.txt
  chat      talk with a model:        orthotrain chat --ckpt CHECKPOINT
  export    write a merged model:     orthotrain export --ckpt CHECKPOINT --out DIR [--format hf|peft]
  compare RUN RUN ...        print a table of several runs, and draw their curves in one picture
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
    from orthotrain.cli.own_modules import add_own_folders
    from orthotrain.console.failures import check_working_folder, quiet_threads
    from orthotrain.console.filtered_messages import hide_messages
    from orthotrain.errors import ConfigurationError

    hide_messages()
    quiet_threads()
    check_working_folder()
    check()
    if command not in (*TRAINER_COMMANDS, *COMMANDS):
        raise ConfigurationError(_unknown(command))
    options = resolve_config_arguments(arguments[1:])
    add_own_folders(options)
    if command == "predict" and any(option.partition("=")[0] == "--prompts" for option in options):
        prompts_command(options)
    elif command in TRAINER_COMMANDS:
        run_trainer([command, *options])
    else:
        COMMANDS[command](options)


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


TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
