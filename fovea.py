"""The `fovea` command. Each sub-command imports what it needs when it runs, so that all start fast."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from service import __version__
from service.errors import FoveaError, one_line

_TRAINING_MODULES = frozenset({"torch", "onnx", "onnxscript", "safetensors"})
"""What the runtime is installed without."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train an image classifier, turn it into one self-describing ONNX file, and serve it.",
)


def _version(asked: bool) -> None:
    if asked:
        print(f"fovea {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options that stand before a command."""


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints.")],
    data: Annotated[
        Path | None,
        typer.Option(help="Folder or tar archive of images in one sub-folder per label; default CIFAR-10."),
    ] = None,
    size: Annotated[int, typer.Option(min=16, max=384, help="Side of the model's input in pixels.")] = 32,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the training images; default by their number.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Same seed, same data, same machine: same weights.")
    ] = 0,
    validation: Annotated[float, typer.Option(min=0.01, max=0.5, help="Fraction held out.")] = 0.1,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = False,
) -> None:
    """Train a network on labelled images. Ctrl-C leaves a checkpoint that --resume goes on from."""
    from rich.console import Console

    from model.data import load
    from model.train import recipe_for, require_free
    from model.train import train as run

    console = Console(markup=False)  # a file's name may hold brackets
    require_free(out, resume)
    loaded = load(data, size=size, validation=validation, seed=seed)
    for line in loaded.unreadable:
        console.print(f"skipped {line}", style="yellow", soft_wrap=True)
    console.print(
        f"{loaded.name}: {len(loaded.labels)} labels, {len(loaded.train)} images to train on, "
        f"{len(loaded.validation)} held out, {len(loaded.test)} to test"
    )
    command = shlex.join(["fovea", *sys.argv[1:]])
    recipe = recipe_for(len(loaded.train), epochs=epochs, validation=validation, seed=seed)
    source = None if data is None else str(data)
    if run(loaded, recipe, out, resume=resume, source=source, command=command, console=console) is None:
        raise typer.Exit(130)
    console.print(f"next: fovea export {out} --out zoo/NAME/1", soft_wrap=True)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Folder that `fovea train` wrote.")],
    out: Annotated[Path, typer.Option(help="Where to: <repository>/<name>/<version>, such as zoo/pets/1.")],
    data: Annotated[
        Path | None, typer.Option(help="Images to verify on; default what it was trained on.")
    ] = None,
) -> None:
    """Turn a checkpoint into one ONNX file that describes itself, and prove that it computes the same."""
    from rich.console import Console

    from export.to_onnx import export as run
    from model.checkpoint import load as load_checkpoint
    from model.data import load
    from service.repository import MODEL_FILE

    loaded = load_checkpoint(checkpoint)
    about, recipe = loaded.about, loaded.about["recipe"]
    source = data or (Path(about["source"]) if about["source"] else None)
    examples = load(
        source, size=about["geometry"]["height"], validation=recipe["validation"], seed=recipe["seed"]
    )
    report = run(loaded, examples, out)
    console = Console(highlight=False, markup=False)
    for agreement in report.agreement:
        console.print(
            f"batch {agreement.batch:>2}: logits agree to {agreement.logits:.1e}, "
            f"probabilities to {agreement.probabilities:.1e}"
        )
    golden, accuracy = report.golden, report.accuracy
    console.print(f"golden set: {golden.images} images, logits to {golden.logit_difference:.1e}")
    console.print(f"top-1 {accuracy.top1:.2%} of {accuracy.images} images ({accuracy.data})")
    console.print(f"wrote {out / MODEL_FILE}, {report.bytes / 1e6:.1f} MB", soft_wrap=True)


@app.command()
def serve(
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
    from service.__main__ import main as run

    given = {"host": host, "port": port, "models": models, "workers": workers}
    raise typer.Exit(run(**{name: value for name, value in given.items() if value is not None}))


@app.command()
def classify(
    files: Annotated[
        list[Path], typer.Argument(help="Images of any served format.", exists=True, dir_okay=False)
    ],
    model: Annotated[str | None, typer.Option(help="Which model of the repository.")] = None,
    models: Annotated[
        Path | None, typer.Option(help="Model repository or one model file [FOVEA_MODELS].")
    ] = None,
    top_k: Annotated[int, typer.Option(min=0, help="How many labels, best first; 0 gives all.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Write what the service would answer.")] = False,
) -> None:
    """Classify images here and now, without a server: the same code, the same answer."""
    from service.command import classify as run

    given = {} if models is None else {"models": models}
    raise typer.Exit(run(files, model=model, top_k=top_k, as_json=as_json, **given))


def main() -> None:
    """Run the command; an error of ours is one line on stderr and exit code 2."""
    try:
        app()
    except FoveaError as error:
        print(f"fovea: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        if error.name not in _TRAINING_MODULES:
            raise
        print(f"fovea: training and export need {error.name}; run `make setup`", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
