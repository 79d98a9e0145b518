"""`python -m tests.fuzz [NAME...]` runs targets, and `python -m tests.fuzz NAME -OPTION...` is libFuzzer."""

from __future__ import annotations

import random
import sys

from tests.fuzz.run import BUILD, run_all, write_seeds
from tests.fuzz.target import TARGETS, load_target


def fuzz_target(name: str, options: list[str]) -> None:
    """Fuzz one target until libFuzzer stops. Never returns."""
    import atheris

    if any(module.startswith("fovea.service.") for module in sys.modules):
        raise RuntimeError("the service was imported without the instruments of the fuzzer")
    with atheris.instrument_imports(include=["fovea.service", "python_multipart"]):
        target = load_target(name)

    def change_input(data: bytes, max_size: int, seed: int) -> bytes:
        choice = random.Random(seed)  # noqa: S311 - libFuzzer repeats inputs by their seeds
        if target.mutate is None or choice.random() < 0.5:
            return bytes(atheris.Mutate(data, max_size))
        return target.mutate(data, choice)[:max_size]

    def check_input(data: bytes) -> None:
        target.check(data)

    write_seeds(name, target)
    words = BUILD / name / "words"
    words.write_text("".join(f'"{_escape(word)}"\n' for word in target.words))
    arguments = [
        f"-max_len={target.max_size}",
        f"-artifact_prefix={BUILD / name}/found-",
        *([f"-dict={words}"] if target.words else []),
        "-timeout=10",
        "-rss_limit_mb=3000",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *arguments, *options], check_input, custom_mutator=change_input)
    atheris.Fuzz()


def _escape(word: bytes) -> str:
    """Return a word as libFuzzer's dictionaries write it."""
    return "".join(f"\\x{byte:02x}" for byte in word)


if __name__ == "__main__":
    if len(sys.argv) > 2 and sys.argv[2].startswith("-"):
        fuzz_target(sys.argv[1], sys.argv[2:])
    sys.exit(run_all(sys.argv[1:] or TARGETS))
