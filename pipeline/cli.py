"""The command line: `hardbatch look|run|plan|inspect|report|compare|list|gc|verify|demo`.

Heavy imports come late, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from hardbatch.pipeline.artifacts.files import user_path
from hardbatch.pipeline.errors import ConfigError, HardbatchError, IntegrityError, LeavingError, printable
from hardbatch.pipeline.reproducible import make_reproducible

if TYPE_CHECKING:
    from hardbatch.pipeline.run import Plan

_EXIT_CODES = """exit codes: 0 done, 1 disk or worker failure, 2 usage or settings, 3 bad input, 4 integrity,
5 locked by another process, 6 no space, 7 too many broken rows, 130 and 143 interrupted"""
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_DEMO_SLOTS = 16
_BATCHES_LISTED = 20
_SORTS = ("mask-rate", "negatives", "hardness")  # as in `views.report.SORTS`, which is imported late
_EXECUTORS = ("inline", "processes", "ray")  # as in `executors.choose.EXECUTORS`


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code. An error that the user can fix is one line, never a traceback."""
    parser = _parser()
    given = list(sys.argv[1:] if arguments is None else arguments)
    options, unknown = parser.parse_known_args(given)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{_advice(given, unknown)}")
    if options.command is None:
        parser.print_help(sys.stderr)
        return 2
    os.environ.setdefault("DO_NOT_TRACK", "1")
    make_reproducible()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character still shows the rest
    leave = _Leave()
    handled = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # as nohup sets it
    is_main = threading.current_thread() is threading.main_thread()  # others may not handle signals
    previous = {number: signal.signal(number, leave) for number in handled if is_main}
    try:
        code = leave.watch(options)
        sys.stdout.flush()  # here, so that a full disk behind it is reported
        return code
    except HardbatchError as error:
        return _fail(options, error)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # the reader of our output has left
        return 0
    except OSError as error:
        from hardbatch.pipeline.artifacts.files import as_user_error

        user_error = as_user_error(error)
        if user_error is None:
            raise
        try:
            sys.stdout.flush()
        except OSError:
            sys.stdout = open(os.devnull, "w")  # drops what found no room; exiting would try to write it again
        return _fail(options, user_error)
    except LeavingError as leaving:
        what = "interrupted" if leaving.signum == signal.SIGINT else "terminated"
        print(f"hardbatch: {what}; committed work stays, run the same command to continue", file=sys.stderr)
        return 128 + leaving.signum
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _fail(options: argparse.Namespace, error: HardbatchError) -> int:
    """Shows an error that the user can fix, with --json as an object, and returns its exit code."""
    print(f"hardbatch: {error}", file=sys.stderr)
    if getattr(options, "json", False):
        print(json.dumps({"error": str(error), "exit_code": error.exit_code}))
    return error.exit_code


def _advice(given: Sequence[str], unknown: Sequence[str]) -> str:
    """Says how to write arguments that the parser does not know; `given` is the whole command line."""
    from hardbatch.pipeline.advice import advice_on_key, advice_on_override

    for number, word in enumerate(given):
        if word == "--set" and number + 1 < len(given):
            text = given[number + 1]
            if advice := advice_on_override(text, given[number + 2 :]):
                return advice
    flag = next((word for word in unknown if word.startswith("--")), None)
    if flag is None or given[:1] not in (["run"], ["plan"], ["demo"]):
        return ""
    from hardbatch.pipeline.config import setting_names

    # A flag such as --batch-size is the name of a setting.
    name = flag.removeprefix("--").partition("=")[0]
    meant = advice_on_key(name, [], setting_names())
    return f"{meant}; give settings as --set stage.field=value" if meant else ""


class _Parser(argparse.ArgumentParser):
    """Says what to do about a manifest in the place of a command."""

    def error(self, message: str) -> NoReturn:
        if "argument COMMAND: invalid choice" in message and ".toml" in message:
            message += "; to make the shards of a manifest: hardbatch run MANIFEST"
        super().error(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="hardbatch",
        description="Turns a corpus of (query, document) pairs into hard, false-negative-masked training batches.",
        epilog=f"settings: docs/manifests.md; files on disk: docs/artifacts.md\n{_EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hardbatch {importlib.metadata.version('hardbatch')}")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def add(name: str, command: object, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        return sub

    look = add("look", _look, "show the columns and first rows of data, and propose what to write in a manifest")
    look.add_argument("source", help="a file, a pattern in quotes or a URL, as a manifest names it")
    look.add_argument("--format", default="auto", help="as in a manifest (default: by the file's name)")
    look.add_argument("--data-root", type=user_path, help="folder that the source is relative to (default: this one)")

    for name, command, text in (
        ("run", _run, "make the shards of a manifest; the last line printed is their folder"),
        (
            "plan",
            _plan,
            "show what a run would make and reuse, why, how long it would take and how much it would write",
        ),
    ):
        sub = add(name, command, text)
        sub.add_argument("manifest", type=user_path, help="TOML file that names the datasets; see data_manifests/")
        sub.add_argument(
            "--data-root", type=user_path, help="folder that local paths are relative to (default: the manifest's)"
        )
        sub.add_argument(
            "--follow-links", action="store_true", help="read files that links below the data root lead to, anywhere"
        )
        _add_common(sub)
        if name == "run":
            sub.add_argument("--json", action="store_true", help="print one JSON object instead of the summary")
            _add_executor(sub)
        else:
            sub.add_argument(
                "--rates",
                type=user_path,
                metavar="FILE",
                help="read no data: estimate from num_pairs and these rates, as in examples/rates_cpu.toml",
            )
            sub.add_argument("--workers", type=_positive, help="with --rates: how many workers share the work")
    inspect = add(
        "inspect", _inspect, "show the batches of a shards folder, or with --log how long the steps of a run took"
    )
    inspect.add_argument("shards", type=user_path, nargs="?", help="folder that `hardbatch run` printed")
    inspect.add_argument(
        "--batch", type=int, metavar="N", help="show the pairs of batch N, which documents are masked, and why"
    )
    inspect.add_argument(
        "--limit", type=_positive, metavar="N", help=f"number of batches to list (default {_BATCHES_LISTED})"
    )
    inspect.add_argument(
        "--sort",
        choices=_SORTS,
        help="list first the batches with the most masked slots, with the fewest negatives per query, or the hardest",
    )
    inspect.add_argument(
        "--log",
        type=user_path,
        metavar="FILE",
        help="show the steps of a run log with seconds, rows, bytes and memory; for a workspace, its newest log",
    )
    report = add("report", _report, "write a page (HTML) with the figures of a shards folder, and batches to read")
    report.add_argument("shards", type=user_path, help="folder that `hardbatch run` printed")
    report.add_argument(
        "--output", type=user_path, metavar="FILE", help="the page (default: report-CORPUS-KEY.html in this folder)"
    )
    compare = add("compare", _compare, "show two shards folders side by side: settings and figures that differ")
    for name in ("first", "second"):
        compare.add_argument(name, type=user_path, help="folder that `hardbatch run` printed")
    for name, command, text in (
        ("list", _list, "list the artifacts of a workspace: size, age, and whether the latest run needs them"),
        ("gc", _gc, "show the artifacts that no latest run needs, and with --delete delete them"),
    ):
        sub = add(name, command, text)
        sub.add_argument(
            "workspace",
            type=user_path,
            nargs="?",
            default=Path("workspace"),
            help="a workspace, or the folder of one corpus in it (default: workspace)",
        )
        if name == "gc":
            sub.add_argument("--delete", action="store_true", help="delete them; by default they are only shown")
    verify = add("verify", _verify, "check every byte of the artifacts at or below a folder against their digests")
    verify.add_argument("path", type=user_path, help="a shards folder, any artifact, or a whole workspace")
    demo = add("demo", _demo, "make batches from docstrings of installed Python packages and show one")
    _add_common(demo)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _add_common(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--workspace",
        type=user_path,
        default=Path("workspace"),
        help="folder that artifacts are written to (default: workspace)",
    )
    sub.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="STAGE.FIELD=VALUE",
        help="override a setting, for example pack.batch_size=256 or dataset.NAME.limit=1000; may be repeated",
    )


def _add_executor(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--executor",
        choices=_EXECUTORS,
        default="inline",
        help="who does the work: this process, other processes of this machine, or actors of Ray (default: inline)",
    )
    sub.add_argument("--workers", type=_positive, metavar="N", help="number of workers (default: one for each GPU)")
    sub.add_argument("--ray-address", metavar="HOST:PORT", help="a Ray cluster (default: start Ray on this machine)")


def _plan_of(options: argparse.Namespace) -> Plan:
    from hardbatch.pipeline.run import plan_corpus

    return plan_corpus(
        options.manifest,
        options.workspace,
        data_root=options.data_root,
        overrides=options.set,
        follow_links=options.follow_links,
    )


def _run(options: argparse.Namespace) -> int:
    from hardbatch.pipeline.executors.choose import open_executor
    from hardbatch.pipeline.progress import choose_progress
    from hardbatch.pipeline.run import run_steps
    from hardbatch.pipeline.runlog import open_run_log
    from hardbatch.pipeline.views.report import summary_text
    from hardbatch.pipeline.views.result import run_result

    with open_executor(options.executor, options.workers, options.ray_address) as executor:
        plan = _plan_of(options)
        progress = choose_progress()
        with open_run_log(plan.corpus, options.manifest, options.set) as log:
            num_run = run_steps(plan.steps, progress, log, executor)
    num_reused = len(plan.steps) - num_run
    print(f"steps run: {num_run}, reused: {num_reused}", file=sys.stderr)
    if options.json:
        log_path = log.path if log.is_begun else None
        print(json.dumps(run_result(plan.shards, num_run=num_run, num_reused=num_reused, log=log_path)))
    else:
        print(summary_text(plan.shards))
        print(plan.shards)
    return 0


def _look(options: argparse.Namespace) -> int:
    from hardbatch.pipeline.views.look import look_text

    print(look_text(options.source, options.data_root, format=options.format))
    return 0


def _list(options: argparse.Namespace) -> int:
    from hardbatch.pipeline.views.workspace import list_text

    print(list_text(options.workspace))
    return 0


def _gc(options: argparse.Namespace) -> int:
    from hardbatch.pipeline.views.workspace import collect_garbage

    print(collect_garbage(options.workspace, delete=options.delete))
    return 0


def _plan(options: argparse.Namespace) -> int:
    if options.rates is not None:
        from hardbatch.pipeline.config import load_manifest
        from hardbatch.pipeline.views.capacity import capacity_text, read_rates_file

        manifest = load_manifest(options.manifest, options.set)
        print(capacity_text(manifest, read_rates_file(options.rates), options.workers or 1))
        return 0
    if options.workers is not None:
        raise ConfigError("--workers needs --rates FILE: without it, times are those of earlier runs on this machine")

    from hardbatch.pipeline.views.plan import plan_text

    plan = _plan_of(options)
    print(plan_text(plan.steps, plan.shards))
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from hardbatch.pipeline.views.batch import batch_text
    from hardbatch.pipeline.views.log import log_text
    from hardbatch.pipeline.views.report import batches_text

    if (options.shards is None) == (options.log is None):
        raise ConfigError("inspect: give either a shards folder or --log with a run log")
    for name, what in (("limit", "is the number"), ("sort", "is the order")):
        if getattr(options, name) is not None and (options.log or options.batch is not None):
            raise ConfigError(f"inspect: --{name} {what} of batches to list; leave it out with --batch or --log")
    if options.log is not None and options.batch is not None:
        raise ConfigError("inspect: --batch is for a shards folder; leave it out with --log")
    if options.log is not None:
        text = log_text(options.log)
    elif options.batch is None:
        text = batches_text(options.shards, limit=options.limit or _BATCHES_LISTED, sort=options.sort)
    else:
        text = batch_text(options.shards, options.batch)
    print("\n".join(map(printable, text.split("\n"))))  # other people's shards may hold terminal commands
    return 0


def _report(options: argparse.Namespace) -> int:
    from hardbatch.pipeline.views.html import report_html
    from hardbatch.pipeline.views.report import read_shards

    artifact = read_shards(options.shards)
    path = options.output or Path(f"report-{artifact.manifest.domain}-{artifact.path.name}.html")
    page = report_html(artifact.path)
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {path}: cannot be written: {error.strerror}") from None
    print(path)
    return 0


def _compare(options: argparse.Namespace) -> int:
    from hardbatch.pipeline.views.compare import compare_text

    print("\n".join(map(printable, compare_text(options.first, options.second).split("\n"))))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from hardbatch.pipeline.artifacts.artifact import iter_artifact_paths, verify_artifact

    paths = list(iter_artifact_paths(options.path))
    if not paths:
        raise IntegrityError(f"{options.path}: no complete artifact here (no manifest.json at or below it)")
    faults = [fault for path in paths for fault in verify_artifact(path)]
    for fault in faults:
        print(f"hardbatch: {printable(fault)}", file=sys.stderr)
    print(f"artifacts read: {len(paths)}, faults: {len(faults)}")
    return IntegrityError.exit_code if faults else 0


def _demo(options: argparse.Namespace) -> int:
    from importlib.resources import files

    from hardbatch.pipeline.views.batch import batch_text

    options.data_root, options.follow_links, options.json = None, False, False
    options.executor, options.workers, options.ray_address = "inline", None, None
    options.manifest = Path(str(files("hardbatch"))) / "data_manifests" / "demo.toml"
    code = _run(options)
    plan = _plan_of(options)
    example = batch_text(plan.shards, _typical_batch(plan.shards), num_slots=_DEMO_SLOTS)
    print(f"\nOne batch as text:\n{example}")
    print(plan.shards)
    return code


def _typical_batch(shards: Path) -> int:
    """The number of the batch of median masked hardness."""
    import polars as pl

    index = pl.read_parquet(shards / "index.parquet").sort("masked_hardness", "batch_id")
    return int(index["batch_id"][len(index) // 2])


class _Leave:
    """Handles signals: the first one ends the command, further ones change nothing while it ends."""

    def __init__(self) -> None:
        self._signum: int | None = None

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        error = sys.exception()
        while error is not None:
            if isinstance(error, LeavingError):
                return
            error = error.__context__
        self._signum = signum
        raise LeavingError(signum)

    def watch(self, options: argparse.Namespace) -> int:
        """Runs the command. Compiled code of a library may replace our error by one of its own, so restore it."""
        try:
            return int(options.command(options))
        except (Exception, KeyboardInterrupt):
            if self._signum is None:
                raise
            raise LeavingError(self._signum) from None


if __name__ == "__main__":
    sys.exit(main())
