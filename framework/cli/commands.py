"""The commands of ``orthotrain`` that need no trainer. What a command needs is imported when it runs."""

from collections.abc import Callable

from orthotrain.console.termination import check

TYPE_CHECKING = False  # as typing.TYPE_CHECKING, whose import takes as long as this whole module
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from typing import Any

    from orthotrain.cli.prompts import Answerer


def export_command(arguments: list[str]) -> None:
    """``orthotrain export``: write a merged Hugging Face folder or a PEFT adapter from a checkpoint."""
    parser = _parser("export", "Write a merged Hugging Face folder (safetensors, config, tokenizer) or a PEFT adapter.")
    parser.add_argument("--format", default="hf", choices=["hf", "peft"], help="merged model, or OFT adapter for PEFT")
    parser.add_argument("--ckpt", required=True, help="checkpoint of a run")
    parser.add_argument("--out", required=True, help="folder to write; must be new or empty")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"],
                        help="dtype of the merged model; by default the network's")  # fmt: skip
    _add_trust(parser)
    options = parser.parse_args(arguments)
    from orthotrain.export import export_checkpoint  # takes seconds, so a wrong command line is refused first
    from orthotrain.files.paths import local_path

    check()
    checkpoint, out = local_path(options.ckpt, "--ckpt"), local_path(options.out, "--out")
    print_written(export_checkpoint(checkpoint, out, options.format, options.dtype, **_trusted(options)))


def plan_command(arguments: list[str]) -> None:
    """``orthotrain plan``: count parameters and bytes of a config without allocating them."""
    from orthotrain.cli.plan import plan_adamw
    from orthotrain.cli.trainer_cli import PlanCLI

    cli = PlanCLI(args=arguments, run=False)
    print(cli.plan.table(plan_adamw(cli.model, *cli.shape)))


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


def prompts_command(arguments: list[str]) -> None:
    """``orthotrain predict --prompts``: continue own prompts with the network of a checkpoint."""
    parser = _answering_parser("predict", "Continue own prompts with the network of a checkpoint.")
    parser.add_argument("--prompts", nargs="+", action="extend", required=True, metavar="TEXT",
                        help="texts, or files: .txt with a prompt a line, .jsonl with prompt or messages")  # fmt: skip
    parser.add_argument("--out", help="file of JSON lines to write; by default they are printed")
    from orthotrain.errors import ConfigurationError

    if any(argument.startswith("--config=") for argument in arguments):
        raise ConfigurationError("predict --prompts takes no config, the checkpoint has all it needs: leave -c out")
    options = parser.parse_args(arguments)
    from orthotrain.cli.prompt_files import read_prompts
    from orthotrain.cli.prompts import predict
    from orthotrain.files.paths import local_path

    prompts = list(read_prompts(options.prompts))
    predict(_answerer(options), prompts, options.out and local_path(options.out, "--out"))


def chat_command(arguments: list[str]) -> None:
    """``orthotrain chat``: talk with the network of a checkpoint in the terminal."""
    parser = _answering_parser("chat", "Talk with the network of a checkpoint in the terminal.")
    options = parser.parse_args(arguments)
    from orthotrain.cli.prompts import chat

    chat(_answerer(options))


def compare_command(arguments: list[str]) -> None:
    """``orthotrain compare``: print a table of several runs and draw their curves in one picture."""
    parser = _parser("compare", "Print a table of several runs, and draw their curves in one picture.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs whose fit has ended")
    parser.add_argument("--out", default="comparison.png", help="picture to write; by default comparison.png")
    options = parser.parse_args(arguments)
    from orthotrain.cli.compare import Run, draw, table, warnings_of
    from orthotrain.files.paths import local_path

    out, runs = local_path(options.out, "--out"), [Run.read(folder) for folder in options.runs]
    print(table(runs))
    for line in warnings_of(runs):
        print(f"warning: {line}")
    print_written(draw(runs, out))


def _answering_parser(command: str, description: str) -> "ArgumentParser":
    parser = _parser(command, description)
    parser.add_argument("--ckpt_path", "--ckpt", required=True, help="checkpoint of a run, or its run folder")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="most tokens of an answer")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token")
    parser.add_argument("--top_p", type=float, default=0.95, help="draw from the most likely tokens of this share")
    parser.add_argument("--seed", type=int, default=0, help="seed of each answer")
    parser.add_argument("--raw", action="store_true", help="continue the text as it is, without a template")
    _add_trust(parser)
    return parser


def _answerer(options: "Namespace") -> "Answerer":
    from orthotrain.cli.prompts import Sampling, answerer

    check()
    sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p, options.seed)
    return answerer(options.ckpt_path, sampling, options.raw, **_trusted(options))


def _add_trust(parser: "ArgumentParser") -> None:
    """Add the options that give a checkpoint more rights, or say where its parts are."""
    parser.add_argument("--allow", nargs="*", default=[], metavar="MODULE.CLASS",
                        help="your own classes, and loading options, that the checkpoint may name")  # fmt: skip
    parser.add_argument("--trust_remote_code", action="store_true",
                        help="run code that comes with the pretrained model, as the run did")  # fmt: skip
    parser.add_argument("--imports", nargs="*", default=[], metavar="MODULE",
                        help="your modules to import first, such as one that registers a parameterization")  # fmt: skip
    parser.add_argument("--base", help="folder of the base model, if it has moved since the run")


def _trusted(options: "Namespace") -> "dict[str, Any]":
    from orthotrain.cli.own_modules import import_modules
    from orthotrain.files.paths import local_path

    import_modules(options.imports)
    base = options.base and local_path(options.base, "--base")
    return {"allow": options.allow, "trust_remote_code": options.trust_remote_code, "base": base}


def print_written(path: object) -> None:
    """Print which file or folder a command has written, with control characters of its name made visible."""
    from orthotrain.errors import visible

    print(f"wrote {visible(str(path))}")


def _parser(command: str, description: str) -> "ArgumentParser":
    """Return a parser whose errors are a single line, as all errors of the commands are."""
    from argparse import ArgumentParser
    from typing import NoReturn

    from orthotrain.errors import ConfigurationError

    class Parser(ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ConfigurationError(f"{self.prog.removeprefix('orthotrain ')}: {message}; see {self.prog} --help")

    return Parser(prog=f"orthotrain {command}", description=description, allow_abbrev=False)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "export": export_command,
    "chat": chat_command,
    "compare": compare_command,
    "plan": plan_command,
    "plugins": plugins_command,
    "calibrate": calibrate_command,
    "consolidate": consolidate_command,
}
