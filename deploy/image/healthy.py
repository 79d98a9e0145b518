"""Whether the service in this container is ready: exit code 0, or else 1."""

import http.client  # and not urllib.request: that one would go through a proxy from the environment
import os
import sys

port = os.environ.get("FOVEA_PORT", "")  # Kubernetes sets it to tcp://… for a Service named fovea
service = http.client.HTTPConnection("127.0.0.1", int(port) if port.isdecimal() else 8000, timeout=2)
service.request("GET", "/health/ready")
sys.exit(service.getresponse().status != 200)
