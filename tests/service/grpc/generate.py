"""Write the modules that are generated from `service/grpc/inference.proto` again.

Run `python -m tests.service.grpc.generate` after a change of the file.
"""

from __future__ import annotations

from pathlib import Path

from grpc_tools import protoc

from tests.servers import ROOT

FOLDER = ROOT / "service" / "grpc"


def generate_modules(folder: Path, *options: str) -> None:
    """Write `inference_pb2.py` and its types to a folder; further options write more."""
    arguments = ["protoc", f"-I{FOLDER}", f"--python_out={folder}", f"--pyi_out={folder}", *options]
    if protoc.main([*arguments, "inference.proto"]):
        raise RuntimeError("protoc failed")


if __name__ == "__main__":
    generate_modules(FOLDER)
