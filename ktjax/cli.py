"""The command line: arguments -> configuration -> call."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from ktjax import doctor
from ktjax.commands import (
    BenchConfig,
    ChatConfig,
    ConvertConfig,
    ExportConfig,
    GenerateConfig,
    InspectConfig,
    MergeConfig,
    PlanConfig,
    run_bench,
    run_chat,
    run_convert,
    run_export,
    run_generation,
    run_inspect,
    run_merge,
    run_plan,
)
from ktjax.train.config import TrainConfig
from ktjax.train.config_file import read_config_file
from ktjax.train.options import fields_of, unknown_name
from ktjax.train.run import run_training

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130

# How help calls the value of an option.
_METAVARS = {str: "STR", int: "INT", float: "FLOAT", Path: "PATH", dict: "{KEY: VALUE}"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `ktjax`; returns the exit code.

    An error is one line on stderr and the code 2, with `--debug` a traceback; Ctrl-C is
    the code 130. Unknown arguments print the usage and raise SystemExit(2), as argparse
    does.
    """
    args, unknown = _parser().parse_known_args(arguments)
    if unknown:
        flag = unknown[0].partition("=")[0]
        args.error(f"unknown argument {flag}; {unknown_name(flag, args.flags)}")
    try:
        return args.call(args)
    except KeyboardInterrupt:
        print("ktjax: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        if args.debug:
            raise
        # str(KeyError) is the repr of its message.
        message = error.args[0] if isinstance(error, KeyError) else error
        line = " ".join(str(message).split()) or type(error).__name__
        print(f"ktjax: error: {line}", file=sys.stderr)
        return EXIT_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ktjax",
        description="LoRA fine-tuning of Mixture-of-Experts models in JAX.",
    )
    parser.set_defaults(debug=False)
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, add, help in (
        ("train", _add_train, "train the experts' adapters; alone, runs a demo"),
        ("plan", _add_plan, "say what a training would need, before loading anything"),
        ("generate", _add_generate, "answer a prompt with a base or a trained model"),
        ("chat", _add_chat, "talk with a base or a trained model"),
        ("export", _add_export, "write a training's adapter in PEFT's format"),
        ("merge", _add_merge, "write a model with an adapter in its weights"),
        ("convert", _add_convert, "write a model with its experts in another format"),
        ("inspect", _add_inspect, "show what a checkpoint or an adapter holds"),
        ("bench", _add_bench, "measure the kernels on this machine"),
        ("doctor", _add_doctor, "show what ktjax sees of this machine"),
    ):
        # No abbreviations: a new option must not change what an old command means.
        command = commands.add_parser(
            name, help=help, description=add.__doc__, allow_abbrev=False
        )
        command.add_argument(
            "--debug", action="store_true", help="show the traceback of an error"
        )
        command.set_defaults(error=command.error, flags=["--debug"])
        add(command)
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    """Train the LoRA adapters of a model's experts.

    Without options, a small model that ships with the package learns a task that it
    cannot do.
    """
    parser.add_argument(
        "config_file",
        type=Path,
        nargs="?",
        help="YAML file with options, one 'option: value' a line; those of the command "
        "line go first",
    )
    _add_options(parser, TrainConfig)
    parser.set_defaults(call=_train)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    """Say what memory a training would take, what fits, and how long a step would be.

    Of the model only config.json is read; a layer of random weights is measured.
    """
    _add_options(parser, PlanConfig)
    parser.set_defaults(call=_plan)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    """Answer one prompt, with the base model or with the adapters of a training."""
    _add_options(parser, GenerateConfig)
    parser.set_defaults(call=_generate)


def _add_chat(parser: argparse.ArgumentParser) -> None:
    """Talk with the base model, or with the adapters of a training switched on or off.

    /help in the conversation lists its commands.
    """
    _add_options(parser, ChatConfig)
    parser.set_defaults(call=_chat)


def _add_export(parser: argparse.ArgumentParser) -> None:
    """Write an adapter in PEFT's format: a training's newest, or one in another format.

    It is read again and compared bit by bit before the directory gets its name.
    """
    _add_options(parser, ExportConfig)
    parser.set_defaults(call=_export)


def _add_merge(parser: argparse.ArgumentParser) -> None:
    """Write a Hugging Face model with an adapter merged into its experts' weights."""
    _add_options(parser, MergeConfig)
    parser.set_defaults(call=_merge)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    """Write a model whose routed experts are in a storage format of ktjax.

    It loads without converting anything; all else is copied.
    """
    _add_options(parser, ConvertConfig)
    parser.set_defaults(call=_convert)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    """Show what a model, an adapter or a training holds, from headers alone."""
    _add_options(parser, InspectConfig)
    parser.set_defaults(call=_inspect)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    """Measure forward, forward with LoRA and train step of a layer of random weights.

    Beside them stand this machine's own peaks, measured in turns with them.
    """
    _add_options(parser, BenchConfig)
    parser.set_defaults(call=_bench)


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    """Show the CPU, the instruction set in use and why, NUMA, memory, and versions."""
    parser.set_defaults(call=_doctor)


def _add_options(parser: argparse.ArgumentParser, config: type) -> None:
    """A positional argument for each required field, an option for every other one.

    Options that are not given stay out of the namespace: the configuration knows its
    defaults.
    """
    flags = parser.get_default("flags")
    for field in fields_of(config):
        help = field.option.help.replace("%", "%%")
        if field.default is dataclasses.MISSING:
            parser.add_argument(field.name, type=field.kind, help=help)
            continue
        flag = "--" + field.name.replace("_", "-")
        flags.append(flag)
        if field.kind is bool:
            parser.add_argument(
                flag,
                # With --no-... too, for what a file of options sets.
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                help=help,
            )
            continue
        if field.default not in (None, {}):
            help += f" (default: {field.default})"
        parser.add_argument(
            flag,
            type=_mapping if field.kind is dict else field.kind,
            choices=field.choices,
            default=argparse.SUPPRESS,
            help=help,
            metavar=None if field.choices else _METAVARS.get(field.kind),
        )


def _mapping(text: str) -> dict[Any, Any]:
    """A mapping as one argument, `{key: value}` in YAML or JSON."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected {{key: value}}, got {text!r}")
    return value


def _config_arguments(args: argparse.Namespace, config: type) -> dict[str, Any]:
    given = vars(args)
    names = (field.name for field in fields_of(config))
    return {name: given[name] for name in names if name in given}


def _train(args: argparse.Namespace) -> int:
    file = args.config_file
    options = {} if file is None else read_config_file(file, TrainConfig)
    config = TrainConfig(**options | _config_arguments(args, TrainConfig))
    result = run_training(config, Console())
    return EXIT_INTERRUPTED if result.fit.interrupted else 0


def _plan(args: argparse.Namespace) -> int:
    run_plan(PlanConfig(**_config_arguments(args, PlanConfig)), Console())
    return 0


def _generate(args: argparse.Namespace) -> int:
    config = GenerateConfig(**_config_arguments(args, GenerateConfig))
    run_generation(config, Console())
    return 0


def _chat(args: argparse.Namespace) -> int:
    run_chat(ChatConfig(**_config_arguments(args, ChatConfig)), Console())
    return 0


def _export(args: argparse.Namespace) -> int:
    run_export(ExportConfig(**_config_arguments(args, ExportConfig)), Console())
    return 0


def _merge(args: argparse.Namespace) -> int:
    run_merge(MergeConfig(**_config_arguments(args, MergeConfig)), Console())
    return 0


def _convert(args: argparse.Namespace) -> int:
    run_convert(ConvertConfig(**_config_arguments(args, ConvertConfig)), Console())
    return 0


def _inspect(args: argparse.Namespace) -> int:
    run_inspect(InspectConfig(**_config_arguments(args, InspectConfig)), Console())
    return 0


def _bench(args: argparse.Namespace) -> int:
    run_bench(BenchConfig(**_config_arguments(args, BenchConfig)), Console())
    return 0


def _doctor(args: argparse.Namespace) -> int:
    Console().print(doctor.report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
