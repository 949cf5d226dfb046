# CUDA:  docker build -t backmerge .                      and run it with --gpus all: torch brings CUDA with it
# CPU:   docker build -t backmerge:cpu --build-arg PIP_ARGS="--extra-index-url URL" .      the index of torch's CPU builds
# Run:   docker run --rm -v "$PWD:/work" backmerge demo --out runs/demo
FROM python:3.11-slim-bookworm AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir build && python -m build --wheel --outdir /dist

FROM python:3.11-slim-bookworm
# bubblewrap is the sandbox for code that models write; inside a container it works only if user namespaces are allowed
RUN apt-get update && apt-get install -y --no-install-recommends bubblewrap && rm -rf /var/lib/apt/lists/*
ARG PIP_ARGS=""
ARG EXTRAS=export
COPY constraints.txt /tmp/constraints.txt
COPY --from=build /dist /tmp/dist
# the wheel is given as a file: its name alone would let pip take another package of that name from an index
RUN pip install --no-cache-dir --constraint /tmp/constraints.txt ${PIP_ARGS} \
    "backmerge[${EXTRAS}] @ file://$(ls /tmp/dist/*.whl)" \
    && rm -rf /tmp/dist /tmp/constraints.txt
RUN useradd --create-home user
USER user
WORKDIR /work
ENTRYPOINT ["backmerge"]
