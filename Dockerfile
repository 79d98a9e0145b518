# Targets: cpu, for Python's slim image; cuda, for a CUDA runtime with the same Python.
# A release passes the bases by digest (deploy/image/bases.txt).
ARG PYTHON_IMAGE=python:3.12-slim
ARG CUDA_IMAGE=nvidia/cuda:12.8.1-cudnn-runtime-ubuntu24.04

FROM ${PYTHON_IMAGE} AS cpu-packages
COPY deploy/image /image
RUN --mount=type=cache,target=/root/.cache/pip sh /image/install.sh /image/cpu.txt

FROM ${PYTHON_IMAGE} AS cuda-packages
COPY deploy/image /image
RUN --mount=type=cache,target=/root/.cache/pip sh /image/install.sh /image/cuda.txt

FROM ${PYTHON_IMAGE} AS app
WORKDIR /app
COPY zoo zoo
COPY deploy/image/healthy.py deploy/image/serve ./
COPY fovea fovea
COPY service service
# Bytecode now, for a read-only file system; and a checkout made under umask 077 must be readable too.
RUN python -m compileall -q fovea service && chmod -R a+rX . && chmod a+x serve

FROM ${PYTHON_IMAGE} AS cpu
ENV PYTHONPATH=/packages PYTHONUNBUFFERED=1 TYPER_USE_RICH=0 FOVEA_HOST=0.0.0.0
WORKDIR /app
COPY --from=cpu-packages /packages /packages
COPY --from=app /app .
# Proves that nothing is missing, and leaves the standard library's bytecode, which the base image lacks.
RUN ["python3", "-c", "import fovea.cli, fovea.service.app, fovea.service.http.server, fovea.service.supervisor.supervisor, fovea.service.runners.process, fovea.service.explain.process, fovea.service.rollout.trial_process, fovea.service.rollout.publish, fovea.service.__main__, fovea.service.cli, http.client"]
LABEL org.opencontainers.image.title="Fovea" \
      org.opencontainers.image.description="An image classification service" \
      org.opencontainers.image.licenses="MIT"
# A number, so that Kubernetes can see that it is not root.
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --start-interval=1s CMD ["python3", "-IS", "healthy.py"]
# `docker run fovea` serves; `docker run fovea --port 9000`, `docker run fovea publish …`
ENTRYPOINT ["/app/serve"]

FROM ${CUDA_IMAGE} AS cuda
RUN apt-get update && apt-get install --yes --no-install-recommends python3 && rm -rf /var/lib/apt/lists/*
ENV PYTHONPATH=/packages PYTHONUNBUFFERED=1 TYPER_USE_RICH=0 FOVEA_HOST=0.0.0.0 FOVEA_PROVIDER=cuda
WORKDIR /app
COPY --from=cuda-packages /packages /packages
COPY --from=app /app .
RUN ["python3", "-c", "import fovea.cli, fovea.service.app, fovea.service.http.server, fovea.service.supervisor.supervisor, fovea.service.runners.process, fovea.service.explain.process, fovea.service.rollout.trial_process, fovea.service.rollout.publish, fovea.service.__main__, fovea.service.cli, http.client"]
LABEL org.opencontainers.image.title="Fovea" \
      org.opencontainers.image.description="An image classification service" \
      org.opencontainers.image.licenses="MIT"
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --start-interval=1s CMD ["python3", "-IS", "healthy.py"]
# `docker run fovea` serves; `docker run fovea --port 9000`, `docker run fovea publish …`
ENTRYPOINT ["/app/serve"]

# What `docker build` makes where no target is named.
FROM cpu
