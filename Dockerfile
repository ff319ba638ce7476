# syntax=docker/dockerfile:1
# qlora with CUDA, as a user without rights. Build it, then train from a recipe in the current folder:
#
#   docker build -t qlora .
#   docker run --rm --gpus all --user "$(id -u):$(id -g)" -v qlora-cache:/cache -v "$PWD:/runs" qlora train mine.yaml
#
# /cache keeps downloaded models and data sets between runs; /runs is where recipes are read and runs are written,
# as yourself with --user, as uid 10001 without.

# The CUDA that the pinned PyTorch is built for; Ubuntu 24.04 brings Python 3.12.
FROM nvidia/cuda:13.0.2-runtime-ubuntu24.04

# Ubuntu keeps only the newest fix of its Python, so a pinned version would soon be gone.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/qlora/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1

# Dependencies first: this layer, of several gigabytes, is built again only when one of these two files changes.
WORKDIR /opt/build
COPY pyproject.toml ./
COPY scripts/constraints.txt scripts/
RUN python3 -m venv /opt/qlora \
    && python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
        > requirements.txt \
    && pip install --constraint scripts/constraints.txt --requirement requirements.txt

# The package itself; pip takes the versions that build it from the environment.
COPY README.md LICENSE ./
COPY recipes recipes
COPY qlora_cli qlora_cli
RUN PIP_CONSTRAINT=scripts/constraints.txt PIP_BUILD_CONSTRAINT=scripts/constraints.txt pip install --no-deps . \
    && qlora --help >/dev/null

# Open to every uid, for --user; USER names one that has no entry in the image. Ubuntu has given uid 1000 away.
RUN useradd --create-home --uid 10001 qlora \
    && mkdir -p /cache/huggingface /runs \
    && chmod 1777 /cache /cache/huggingface /runs /home/qlora
ENV HOME=/home/qlora \
    USER=qlora \
    HF_HOME=/cache/huggingface \
    XDG_CACHE_HOME=/cache
VOLUME ["/cache", "/runs"]
WORKDIR /runs
USER 10001

ENTRYPOINT ["qlora"]
CMD ["--help"]
