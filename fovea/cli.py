"""The `fovea` command. Each sub-command imports what it needs when it runs, so that all start fast."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperGroup

from fovea.service import __version__
from fovea.service.errors import FoveaError, SettingsError, to_one_line

if TYPE_CHECKING:
    from fovea.model.data.dataset import Dataset
    from fovea.model.networks.checkpoint import Checkpoint

_TRAINING_MODULES = frozenset({"torch", "onnx", "onnxscript", "safetensors", "huggingface_hub"})
"""What the runtime is installed without."""

_CHECKOUT_PACKAGES = frozenset({"fovea.model", "fovea.export", "fovea.bench"})
"""What the container image is made without."""

EXAMPLES = {
    "train": "fovea train --data photos --export zoo/pets/1",
    "export": "fovea export runs/pets --out zoo/pets/1",
    "import": "fovea import model.onnx --labels labels.txt --name pets --out zoo --preset imagenet",
    "serve": "fovea serve zoo --port 8000",
    "publish": "fovea publish model.onnx --models zoo --name pets",
    "classify": "fovea classify cat.jpg photos --top-k 3",
    "explain": "fovea explain cat.jpg --out heat.png",
    "bench": "fovea bench http://127.0.0.1:8000 cat.jpg --rate 50",
    "doctor": "fovea doctor --seconds 10",
}
"""A call of each command, shown in its help and where something is missing."""

_SUMMARIES = {
    "export": "Turn a checkpoint into one ONNX file.",
    "import": "Import an ONNX classifier from elsewhere.",
    "publish": "Put a model into a repository.",
    "classify": "Classify images without a server.",
    "explain": "Show what the model looked at.",
    "doctor": "Say what limits the service on this machine.",
}
"""Lines of the list of commands, where the first sentence of the help is too long for it."""

_METAVARS = {Path: "PATH", str: "TEXT", int: "INTEGER", float: "FLOAT"}


class _CommandGroup(TyperGroup):
    """The commands, each with an example in its help, and options that say what they take."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name."""
        command = super().get_command(ctx, cmd_name)
        if command is None:
            return None
        command.epilog = f"Example: {EXAMPLES[cmd_name]}"
        command.short_help = _SUMMARIES.get(cmd_name, command.short_help)
        parameter: Any
        for parameter in command.params:
            kind = _parameter_type(cmd_name, parameter.name)
            if kind is not None and kind is not bool and parameter.metavar is None:
                name = _METAVARS.get(kind) or f"[{'|'.join(map(str, get_args(kind)))}]"
                parameter.metavar = name
                if parameter.param_type_name == "argument":
                    parameter.metavar = str(parameter.name).upper()
                    parameter.display_type = lambda _, name=name: name
        return command


def _parameter_type(command: str, parameter: str | None) -> Any:
    """What one value of a command's parameter is; None for `--help`."""
    for info in app.registered_commands:
        if info.callback and (info.name or info.callback.__name__) == command:
            kind = get_type_hints(info.callback).get(parameter or "")
            if get_origin(kind) in (Union, UnionType):
                kind = next(one for one in get_args(kind) if one is not type(None))
            return get_args(kind)[0] if get_origin(kind) is list else kind
    return None


app = typer.Typer(
    cls=_CommandGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train an image classifier or import one, as one self-describing ONNX file, and serve it.",
)


def _show_version(is_requested: bool) -> None:
    if is_requested:
        print(f"fovea {__version__}")
        raise typer.Exit


@app.callback()
def _handle_main_options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Options that stand before a command."""


@app.command()
def train(
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for checkpoints and the report; default runs/<name of the data>."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder, or tar or ZIP archive, of images in one sub-folder per label, or a CSV file with a "
            "column of paths and one of labels; default CIFAR-10."
        ),
    ] = None,
    path_column: Annotated[
        str | None, typer.Option(help="Column of the CSV file that names the images; default by its name.")
    ] = None,
    label_column: Annotated[
        list[str] | None,
        typer.Option(
            help="Column that names the label; default by its name. More than once where each label has a "
            "column of 1 and 0."
        ),
    ] = None,
    label_depth: Annotated[
        int | None,
        typer.Option(min=1, help="Folder from the top that is the label, where that is not clear: 1, 2, …"),
    ] = None,
    label_case: Annotated[
        Literal["merge", "keep"] | None,
        typer.Option(help="Labels such as Cat and cat: one label (merge) or two (keep); default an error."),
    ] = None,
    net: Annotated[
        str | None,
        typer.Option(help="cnn, cnn_large, resnet18, resnet34, resnet50 or mobilenet_v2; default cnn."),
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Side of the model's input in pixels, 16 … 384; default by the data.")
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="Weights to start from: hf:owner/repository, a file, a run, or a version in zoo/.",
        ),
    ] = None,
    teacher: Annotated[
        list[Path] | None,
        typer.Option(help="A finished run whose answers are learned too (distillation); may be repeated."),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the training images; default by their number.")
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(min=0.1, help="In about how many minutes it is to end; chooses the epochs."),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Same seed, same data, same machine: same weights.")
    ] = 0,
    validation: Annotated[float, typer.Option(min=0.01, max=0.5, help="Fraction held out.")] = 0.1,
    flip: Annotated[
        bool, typer.Option(help="Learn mirror images too; not where left and right matter, as in letters.")
    ] = True,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write events for TensorBoard into the run's folder.")
    ] = False,
    export: Annotated[
        Path | None,
        typer.Option(
            help="Export the result there and make it the repository's default: "
            "<repository>/<name>/<version>, such as zoo/pets/1."
        ),
    ] = None,
) -> None:
    """Train a network on labelled images. Ctrl-C leaves a checkpoint that --resume goes on from."""
    from rich.console import Console

    from fovea.export.from_checkpoint import require_new_version
    from fovea.model.data.choices import Choices
    from fovea.model.run import TrainingOptions, run_training
    from fovea.service.inference.preprocess import configure_pillow

    configure_pillow()
    console = Console(markup=False)  # a file's name may hold brackets
    if export:
        require_new_version(export)
    options = TrainingOptions(
        out=out or Path("runs") / (data.absolute().name.split(".")[0] if data else "cifar10"),
        data=data,
        choices=Choices(path_column, tuple(label_column or ()), label_depth, label_case),
        net=net,
        size=size,
        start=start,
        teachers=teacher or [],
        epochs=epochs,
        minutes=minutes,
        seed=seed,
        validation=validation,
        flip=flip,
        resume=resume,
        tensorboard=tensorboard,
        command=_format_command_line(),
    )
    result = run_training(options, console)
    if result is None:
        raise typer.Exit(130)
    if export:
        _export_and_report(*result, export, default=True)
        console.print(f"next: fovea serve --models {export.parent.parent}", soft_wrap=True)
    else:
        console.print(f"next: fovea export {options.out} --out zoo/NAME/1", soft_wrap=True)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Folder that `fovea train` wrote.")],
    out: Annotated[Path, typer.Option(help="Where to: <repository>/<name>/<version>, such as zoo/pets/1.")],
    data: Annotated[
        Path | None, typer.Option(help="Images to verify on; default what it was trained on.")
    ] = None,
    default: Annotated[
        bool, typer.Option("--default", help="Make it the model that answers where a request names none.")
    ] = False,
) -> None:
    """Turn a checkpoint into one ONNX file that describes itself, and prove that it computes the same."""
    from fovea.export.from_checkpoint import require_new_version
    from fovea.model.networks.checkpoint import load_checkpoint as load_checkpoint
    from fovea.model.run import reload_dataset
    from fovea.service.inference.preprocess import configure_pillow

    configure_pillow()
    require_new_version(out)
    loaded_checkpoint = load_checkpoint(checkpoint)
    _export_and_report(
        loaded_checkpoint, reload_dataset(loaded_checkpoint.metadata, data, checkpoint), out, default=default
    )


def _export_and_report(checkpoint: Checkpoint, data: Dataset, out: Path, *, default: bool) -> None:
    """Export, and say how close graph and network are."""
    from rich.console import Console

    from fovea.export.from_checkpoint import export_checkpoint as run
    from fovea.service.artifact.repository import MODEL_FILE

    report = run(checkpoint, data, out, default=default)
    console = Console(highlight=False, markup=False)
    for agreement in report.agreement:
        console.print(
            f"batch {agreement.batch:>2}: logits agree to {agreement.logits:.1e}, "
            f"probabilities to {agreement.probabilities:.1e}"
        )
    golden, accuracy = report.golden, report.accuracy
    console.print(f"golden set: {golden.images} images, logits to {golden.logit_difference:.1e}")
    console.print(
        f"accuracy {accuracy.top1:.2%} of {data.format_image_count(accuracy.images)} ({accuracy.data})"
    )
    console.print(f"wrote {out / MODEL_FILE}, {report.bytes / 1e6:.1f} MB", soft_wrap=True)


@app.command("import")
def import_(
    file: Annotated[
        Path | None, typer.Argument(help="ONNX file of an image classifier, from any tool.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="What its outputs are called: one a line, or a JSON list or map.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What the model is to be called.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Repository to write to, as <name>/<next version>/model.onnx, such as zoo."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="How it wants its images: imagenet, keras-mobilenet, inception, clip or zero-one. "
            "The options below take the place of what it says."
        ),
    ] = None,
    mean: Annotated[
        str | None, typer.Option(help="What is taken from each channel, in the order of the channels: A,B,C.")
    ] = None,
    std: Annotated[str | None, typer.Option(help="What each is divided by after that: A,B,C.")] = None,
    scale: Annotated[
        str | None,
        typer.Option(
            help="What pixels 0 … 255 are multiplied by first, such as 1/255; default by the size of mean "
            "and std."
        ),
    ] = None,
    bgr: Annotated[
        bool | None,
        typer.Option("--bgr/--rgb", help="Whether blue comes first; default red, or the preset's."),
    ] = None,
    resize: Annotated[int | None, typer.Option(min=1, help="Length of the shorter side, in pixels.")] = None,
    size: Annotated[
        str | None,
        typer.Option(
            "--crop",
            "--size",
            help="The middle that is kept, the input's size: 224, or height x width as 224x320. "
            "Needed where the graph takes any.",
        ),
    ] = None,
    interpolation: Annotated[
        str | None, typer.Option(help="nearest, box, bilinear, hamming, bicubic or lanczos.")
    ] = None,
    stretch: Annotated[
        bool, typer.Option("--stretch", help="Stretch to the input's size, and crop nothing.")
    ] = False,
    task: Annotated[str | None, typer.Option(help="multiclass, binary or multilabel.")] = None,
    layout: Annotated[str | None, typer.Option(help="nchw or nhwc, where its shape does not tell.")] = None,
    output: Annotated[str | None, typer.Option(help="Name of the output, where there are several.")] = None,
    check: Annotated[
        Path | None,
        typer.Option(
            help="Images in one sub-folder per label: how good it is, and whether the preset is right."
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Keep the preset though another does clearly better on --check.")
    ] = False,
    default: Annotated[
        bool, typer.Option("--default", help="Make it the model that answers where a request names none.")
    ] = False,
) -> None:
    """Give an ONNX classifier from elsewhere all that it lacks, and prove that it still computes the same."""
    from fovea.export.importer.cli import import_model as run

    run(
        file,
        labels=labels,
        name=name,
        out=out,
        preset=preset,
        mean=mean,
        std=std,
        scale=scale,
        bgr=bgr,
        resize=resize,
        size=size,
        interpolation=interpolation,
        stretch=stretch,
        task=task,
        layout=layout,
        output=output,
        check=check,
        force=force,
        default=default,
        command=_format_command_line(),
        example=EXAMPLES["import"],
    )


@app.command()
def serve(
    path: Annotated[
        Path | None, typer.Argument(help="Model repository or one model file; the same as --models.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on [FOVEA_HOST].")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on [FOVEA_PORT].")] = None,
    models: Annotated[
        Path | None, typer.Option(help="Model repository or one model file [FOVEA_MODELS].")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes that share the port and the processors [FOVEA_WORKERS].")
    ] = None,
) -> None:
    """Serve the models in the repository over HTTP. All other settings are FOVEA_* variables."""
    from fovea.service.__main__ import main as run

    if path is not None and models is not None and path != models:
        raise SettingsError(f"{path} and --models {models} are two places; give one of them")
    settings = {"host": host, "port": port, "models": path or models, "workers": workers}
    raise typer.Exit(run(**{name: value for name, value in settings.items() if value is not None}))


@app.command()
def publish(
    model: Annotated[Path, typer.Argument(help="A model file.")],
    models: Annotated[Path | None, typer.Option(help="Model repository [FOVEA_MODELS].")] = None,
    name: Annotated[str | None, typer.Option(help="What it is called; default what it says itself.")] = None,
) -> None:
    """Put a model into a repository, as its latest version: a service that watches it tries and serves it."""
    from fovea.service.rollout.publish import publish_model as run
    from fovea.service.settings import load_settings

    settings = load_settings(**({} if models is None else {"models": models}))
    print(f"published {run(model, settings.models, name)}")


@app.command()
def classify(
    files: Annotated[list[Path], typer.Argument(help="Images of any served format, and folders of them.")],
    model: Annotated[str | None, typer.Option(help="Which model of the repository.")] = None,
    models: Annotated[
        Path | None, typer.Option(help="Model repository or one model file [FOVEA_MODELS].")
    ] = None,
    top_k: Annotated[int, typer.Option(min=0, help="How many labels, best first; 0 gives all.")] = 5,
    coverage: Annotated[
        float | None,
        typer.Option(help="Also the labels among which the true one is this often, such as 0.95."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write what the service would answer.")] = False,
) -> None:
    """Classify images here and now, without a server: the same code, the same answer."""
    from fovea.service.cli import classify_files as run

    settings = {} if models is None else {"models": models}
    raise typer.Exit(run(files, model=model, top_k=top_k, coverage=coverage, as_json=as_json, **settings))


@app.command()
def explain(
    file: Annotated[Path, typer.Argument(help="Image of any served format.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="PNG to write: the image under its heat map.")],
    label: Annotated[
        str | None, typer.Option(help="What speaks for this label; default the most probable.")
    ] = None,
    method: Annotated[
        Literal["auto", "cam", "occlusion"],
        typer.Option(help="`cam` is exact, where the network allows it; `occlusion` is for every network."),
    ] = "auto",
    samples: Annotated[
        int,
        typer.Option(min=0, max=8000, help="Masked images of an occlusion; 0: as many as there is time for."),
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Same seed and samples, same map.")] = 0,
    model: Annotated[str | None, typer.Option(help="Which model of the repository.")] = None,
    models: Annotated[
        Path | None, typer.Option(help="Model repository or one model file [FOVEA_MODELS].")
    ] = None,
) -> None:
    """Show what the model looked at: a heat map over the image, as the service makes it."""
    from fovea.service.cli import explain_file as run

    settings = {} if models is None else {"models": models}
    run(file, out, model=model, label=label, method=method, seed=seed, samples=samples, **settings)


@app.command()
def bench(
    url: Annotated[str, typer.Argument(help="Of a running service, such as http://127.0.0.1:8000.")],
    images: Annotated[
        list[Path] | None,
        typer.Argument(help="What is sent; default pictures of 512 x 384."),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(min=0.1, max=100_000, help="Requests a second, whether or not others are answered."),
    ] = None,
    callers: Annotated[
        int, typer.Option(min=1, max=4096, help="Without --rate: how many, each with one request at a time.")
    ] = 8,
    seconds: Annotated[float, typer.Option(min=0.1, max=3600, help="For how long.")] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="Write the figures as JSON.")] = False,
) -> None:
    """Load a running service, and say how fast it answers. With --rate latencies are what users would see."""
    from fovea.bench.command import run_bench as run

    raise typer.Exit(run(url, images or [], rate=rate, callers=callers, seconds=seconds, as_json=as_json))


@app.command()
def doctor(
    seconds: Annotated[float, typer.Option(min=1, max=600, help="Length of the self-load.")] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="Write what was found as JSON.")] = False,
) -> None:
    """Start the service with the settings of the environment, load it, and say what keeps it from more."""
    from fovea.bench.doctor import run_doctor as run

    raise typer.Exit(run(seconds=seconds, as_json=as_json))


# --- the process ---------------------------------------------------------------------------------


def _format_command_line() -> str:
    """Return this call, as a model tells how it was made; bytes that are not UTF-8 are question marks."""
    return shlex.join(["fovea", *sys.argv[1:]]).encode(errors="replace").decode()


_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
_CommandError: type[Exception] = typer.BadParameter.__mro__[2]
"""Of Click, which later versions of Typer bring along under another name."""


def _describe_error(error: Any) -> str:
    """What is wrong with the command line, in our words."""
    context, parameter = getattr(error, "ctx", None), getattr(error, "param", None)
    command = str(context.info_name) if context else ""
    if parameter is None:
        sentence = str(error.format_message()).rstrip(".")
        command_match = re.fullmatch(r"No such command '(.*?)'.*", sentence, re.DOTALL)
        if command_match:
            return _describe_unknown("command", command_match[1], list(EXAMPLES), "fovea --help")
        option = getattr(error, "option_name", None)
        if option is not None and sentence.startswith("No such option"):
            options = [name for one in context.command.params for name in one.opts] if context else []
            return _describe_unknown("option", str(option), options, f"fovea {command} --help")
        return f"{sentence[:1].lower()}{sentence[1:]}; see `fovea {command} --help`"
    is_argument = parameter.param_type_name == "argument"
    name = parameter.metavar if is_argument else max(parameter.opts, key=len)
    if type(error).__name__ == "MissingParameter":
        return f"`fovea {command}` needs {name}, such as: {EXAMPLES.get(command, '')}"
    kind = _parameter_type(command, parameter.name)
    get_errors = getattr(error.__cause__, "errors", None)
    value = f" is {str(get_errors()[0]['input'])!r}" if get_errors else ""
    return f"'{name}'{value}: it takes {_describe_expected_value(kind, parameter)}"


def _describe_unknown(kind: str, name: str, known: list[str], help_command: str) -> str:
    import difflib

    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    advice = f"did you mean {nearest[0]}?" if nearest else f"see `{help_command}`"
    return f"there is no {kind} {name!r}; {advice}"


def _describe_expected_value(kind: Any, parameter: Any) -> str:
    """What a parameter takes."""
    if get_origin(kind) is Literal:
        *others, last = map(str, get_args(kind))
        return f"{', '.join(others)} or {last}"
    word = {int: "an integer", float: "a number", Path: "a path"}.get(kind, "another value")
    min_value, max_value = getattr(parameter, "min", None), getattr(parameter, "max", None)
    if min_value is not None and max_value is not None:
        return f"{word} from {min_value:g} to {max_value:g}"
    if min_value is not None:
        return f"{word} of at least {min_value:g}"
    return word if max_value is None else f"{word} of at most {max_value:g}"


def _exit_with_error(message: str, code: int = 2) -> None:
    print(f"fovea: {message}", file=sys.stderr)
    sys.exit(code)


def main() -> None:
    """Run the command; a mistake is one line on stderr and exit code 2, an interruption exit code 130."""
    for stream in (sys.stdout, sys.stderr):  # a terminal may know no `█`, and a file's name be no UTF-8
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
        sys.exit(code if isinstance(code, int) else 0)
    except FoveaError as error:
        _exit_with_error(to_one_line(error))
    except ModuleNotFoundError as error:
        if error.name in _CHECKOUT_PACKAGES:
            _exit_with_error("this installation has the service alone; use a checkout for it")
        if error.name not in _TRAINING_MODULES:
            raise
        _exit_with_error(f"training, export and import need {error.name}; run `make setup`")
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(getattr(error, "message", error), file=sys.stderr)
            sys.exit(2)
        _exit_with_error(to_one_line(ValueError(_describe_error(error))))
    except _CommandError as error:
        _exit_with_error(to_one_line(error))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except BrokenPipeError:  # whoever reads has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        prefix = "" if error.filename is None else f"{os.fsencode(error.filename).decode(errors='replace')}: "
        _exit_with_error(f"{prefix}{error.strerror or to_one_line(error)}")
