"""Whether the service in this container is ready: exit code 0, or else 1."""

import http.client  # and not urllib.request: that one would go through a proxy from the environment
import os
import ssl
import sys
from itertools import pairwise
from pathlib import Path

environment = {name.upper(): value for name, value in os.environ.items()}
words = Path("/proc/1/cmdline").read_text(errors="replace").split("\0")  # or what `--init` runs


def option(name: str) -> str:
    """Return the last value of an option of the command (`--name value`, `--name=value`), or ""."""
    values = [after for word, after in pairwise(words) if word == name]
    values += [word.partition("=")[2] for word in words if word.startswith(f"{name}=")]
    return values[-1] if values else ""


# Kubernetes sets FOVEA_PORT to tcp://… for a Service named fovea.
names = ("FOVEA_PORT", "AIP_HTTP_PORT", "PORT")
default = "8080" if Path("/opt/ml/model").is_dir() else "8000"  # SageMaker's folder and port
ports = (option("--port"), *(environment.get(name, "") for name in names), default)
port = next(int(value) for value in ports if value.isdecimal())
host = option("--host") or environment.get("FOVEA_HOST") or "127.0.0.1"
host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - reads it
service = http.client.HTTPConnection(host, port, timeout=2)
if environment.get("FOVEA_TLS_CERT"):
    # The certificate has the public name of the service, not this address, and nobody stands in between.
    tls = ssl.create_default_context()
    tls.check_hostname = False
    tls.verify_mode = ssl.CERT_NONE
    service = http.client.HTTPSConnection(host, port, timeout=2, context=tls)
service.request("GET", "/health/ready")
sys.exit(service.getresponse().status != 200)
