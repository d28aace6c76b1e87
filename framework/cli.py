"""The command line: LightningCLI's fit, validate, test and predict, and export, plan and plugins beside them."""

import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from orthotrain.config_files import resolve_config_arguments
from orthotrain.errors import ConfigurationError

USAGE = """usage: orthotrain COMMAND [options]

  fit       train from a config:      orthotrain fit -c pretrain/quickstart.yaml
  validate  evaluate a checkpoint:    orthotrain validate -c CONFIG --ckpt_path last
  test      the same on the test split
  predict   write generated samples:  orthotrain predict -c CONFIG --ckpt_path last
  export    merged model folder:      orthotrain export --ckpt CHECKPOINT --out DIR [--format hf|peft]
  plan      parameters and bytes of a config before anything is allocated
  plugins   the registered parameterizations

'orthotrain COMMAND --help' tells more. Several -c files are laid over each other; every key of a config can be given
as --a.b.c VALUE. A config that is not found as a file is looked up among those that ship with the package."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; bad input ends in one line on standard error and exit code 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(USAGE)
        return
    try:
        if command in ("fit", "validate", "test", "predict"):
            run_trainer(resolve_config_arguments(arguments))
        elif command in COMMANDS:
            COMMANDS[command](resolve_config_arguments(arguments[1:]))
        else:
            known = ", ".join(["fit", "validate", "test", "predict", *COMMANDS])
            raise ConfigurationError(f"unknown command {command!r}: choose one of {known}")
    except ConfigurationError as error:
        fail(str(error))


def fail(message: str) -> None:
    """Print one line on standard error and exit with code 2."""
    print(f"orthotrain: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(2)


def run_trainer(arguments: list[str]) -> None:
    """Run one of LightningCLI's commands."""
    _quiet()
    from orthotrain.lightning_cli import OrthotrainCLI

    OrthotrainCLI(args=arguments)


def export_command(arguments: list[str]) -> None:
    """``orthotrain export``: write a merged Hugging Face folder or a PEFT adapter from a checkpoint."""
    from orthotrain.export import export_checkpoint

    parser = _parser("export", "Write a merged Hugging Face folder (safetensors, config, tokenizer) or a PEFT adapter.")
    parser.add_argument("--format", default="hf", choices=["hf", "peft"], help="merged model, or OFT adapter for PEFT")
    parser.add_argument("--ckpt", required=True, help="checkpoint of a run")
    parser.add_argument("--out", required=True, help="folder to write; must be new or empty")
    options = parser.parse_args(arguments)
    print(f"wrote {export_checkpoint(options.ckpt, options.out, options.format)}")


def plan_command(arguments: list[str]) -> None:
    """``orthotrain plan``: count parameters and bytes of a config without allocating them."""
    from orthotrain.lightning_cli import PlanCLI

    print(PlanCLI(args=arguments, run=False).plan.table())


def plugins_command(arguments: list[str]) -> None:
    """``orthotrain plugins``: list the registered parameterizations, a line each."""
    from orthotrain.plugins import get, known

    _parser("plugins", "List the registered parameterizations.").parse_args(arguments)
    for name in known():
        cls = get(name)
        print(f"{name:<18}{(cls.__doc__ or '').strip().splitlines()[0]}  [{cls.__module__}.{cls.__qualname__}]")


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "export": export_command,
    "plan": plan_command,
    "plugins": plugins_command,
}


def _quiet() -> None:
    """Drop what Lightning says that no user can act on."""
    warnings.filterwarnings("ignore", message=r".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=r".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=r"Checkpoint directory .* exists and is not empty")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in str(record.msg))


def _parser(command: str, description: str) -> Any:
    from argparse import ArgumentParser

    return ArgumentParser(prog=f"orthotrain {command}", description=description)
