# The server behind its edge, for CPU and CUDA from one file. Nothing in the final stage compiles, writes outside
# /run/detserve and /tmp, or runs as root.
#
#   docker build -t detserve:cpu  --build-arg TORCH_INDEX=URL .         URL: PyTorch's index of CPU wheels
#   docker build -t detserve:cuda --build-arg VARIANT=cuda .
#   docker run --read-only --tmpfs /run/detserve:uid=10001 --tmpfs /tmp -p 8080:8080 detserve:cpu
#   docker run --gpus all -p 8080:8080 detserve:cuda
#   docker run -v "$PWD/models:/models:ro" …                            every .mar in there instead of the demo model
#
# Without TORCH_INDEX torch's default wheel is taken, which brings CUDA along (about 5 GB) and runs on a CPU too. A release
# build pins the base image by its digest: --build-arg PYTHON_IMAGE=python:3.11.14-slim-bookworm@sha256:…
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG VARIANT=cpu
ARG TORCH_INDEX=
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
RUN python -m venv /opt/detserve
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY handlers handlers
COPY serving serving
COPY tools tools
# Wheels alone: there is no compiler here either.
RUN case "$VARIANT" in cpu) extra=onnx ;; cuda) extra=onnx-gpu ;; *) echo "VARIANT: got $VARIANT, expected cpu or cuda" >&2; exit 2 ;; esac \
 && CC=/bin/false PIP_ONLY_BINARY=:all: /opt/detserve/bin/pip install --constraint constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} ".[$extra]"
# The demo model, so that a container without a volume answers.
COPY model_store/shapes model_store/shapes
RUN mkdir /models \
 && /opt/detserve/bin/detserve archive model_store/shapes/shapes.yaml --out /models/shapes.mar

FROM ${PYTHON_IMAGE}
RUN apt-get update \
 && apt-get install --yes --no-install-recommends nginx-light \
 && rm -rf /var/lib/apt/lists/* \
 && ! command -v cc
RUN groupadd --system --gid 10001 detserve \
 && useradd --system --uid 10001 --gid 10001 --home-dir /run/detserve --no-create-home --shell /usr/sbin/nologin detserve \
 && install --directory --owner=10001 --group=10001 --mode=0700 /run/detserve
COPY --from=build /opt/detserve /opt/detserve
COPY --from=build /models /models
# NVIDIA_…: what the NVIDIA container toolkit brings in where there is a GPU; nothing without it.
ENV PATH=/opt/detserve/bin:$PATH \
    HOME=/run/detserve \
    DETSERVE_STATE_DIR=/run/detserve \
    DETSERVE_CACHE_DIR=/run/detserve/cache \
    DETSERVE_MODEL_STORE=/models \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /run/detserve
# Inference over HTTP, over gRPC, and the monitor (/metrics, /ready, /live), which stays inside.
EXPOSE 8080 7070 8083
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=180s --retries=3 \
    CMD ["/opt/detserve/bin/python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8083/ready', timeout=4)"]
# No shell in between: SIGTERM reaches the server, which answers what is in flight and ends.
ENTRYPOINT ["/opt/detserve/bin/detserve"]
CMD ["serve", "start", "--foreground", "--edge", "--host=0.0.0.0", "--port=8080", "--edge-grpc-port=7070", "--monitor-port=8083"]
