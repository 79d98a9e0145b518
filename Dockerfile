# Its own stage, so that only a change to the list itself installs everything again.
FROM python:3.12-slim AS requirements
COPY pyproject.toml .
RUN python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' > /requirements.txt

FROM python:3.12-slim AS build
COPY --from=requirements /requirements.txt /
RUN python -m venv --without-pip /venv
# Of ONNX Runtime's Python, all but its core is for converting models, with torch and onnx.
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /venv/bin/python install --disable-pip-version-check --only-binary :all: -r /requirements.txt \
 && cd /venv/lib/python3*/site-packages \
 && rm -r onnxruntime/quantization onnxruntime/tools onnxruntime/transformers \
 && find . -type d -name tests -prune -exec rm -r {} +
WORKDIR /app
COPY zoo zoo
COPY service service
# Bytecode now, for a read-only file system; and a checkout made under umask 077 must be readable too.
RUN python -m compileall -q service && chmod -R a+rX .

FROM python:3.12-slim AS cpu
ENV PATH=/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    FOVEA_HOST=0.0.0.0
WORKDIR /app
COPY --from=build /venv /venv
COPY --from=build /app/zoo zoo
COPY --from=build /app/service service
# Proves that nothing is missing, and leaves the standard library's bytecode, which the base image lacks.
RUN ["python", "-c", "import service.app, service.server, service.supervisor, service.runner, service.__main__, http.client"]
# A number, so that Kubernetes can see that it is not root.
USER 10001:10001
EXPOSE 8000
# http.client and not urllib.request: that one would go through a proxy from the environment.
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --start-interval=1s CMD ["python", "-ISc", "\
import http.client, os, sys; \
service = http.client.HTTPConnection('127.0.0.1', os.environ.get('FOVEA_PORT') or 8000, timeout=2); \
service.request('GET', '/health/ready'); \
sys.exit(service.getresponse().status != 200)"]
ENTRYPOINT ["python", "-m", "service"]
