# branchtree in a container. For CPUs:
#   docker build -t branchtree .
# For NVIDIA GPUs, on any base with Python 3.11 or 3.12 as python3:
#   docker build -t branchtree --build-arg BASE=nvidia/cuda:12.8.1-runtime-ubuntu24.04 --build-arg TORCH_INDEX= .
# Run with the folder of runs and the hub's cache outside:
#   docker run --rm -v "$PWD/runs:/work/runs" -v "$HOME/.cache/huggingface:/cache" branchtree train quickstart
ARG BASE=python:3.12-slim

FROM python:3.12-slim AS build
WORKDIR /source
RUN pip install --no-cache-dir build
COPY . .
RUN python -m build --wheel --outdir /dist

FROM ${BASE}
# Where pip finds torch; empty for its usual index, whose builds are for CUDA.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN if ! python3 -m venv --help >/dev/null 2>&1; then \
        apt-get update && apt-get install --yes --no-install-recommends python3 python3-venv \
        && rm -rf /var/lib/apt/lists/*; \
    fi && python3 -m venv /opt/branchtree
ENV PATH=/opt/branchtree/bin:$PATH HF_HOME=/cache PYTHONUNBUFFERED=1
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch torchvision
COPY --from=build /dist /dist
RUN pip install --no-cache-dir /dist/*.whl && branchtree plugins
WORKDIR /work
ENTRYPOINT ["branchtree"]
CMD ["--help"]
