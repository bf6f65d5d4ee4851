# Trains Phi-3-mini in the folder that you mount; flags after the image's name go to train_lora_local.py:
#
#   docker build -t stoney-rl-local .
#   docker run --rm --gpus all -v .:/app stoney-rl-local
#
# The wheel of torch 2.13.0 brings CUDA 13.0, cuDNN and NCCL along, so a plain Python image is all it needs. From the
# host come the driver, 580 or newer (https://docs.nvidia.com/deploy/cuda-compatibility), and the NVIDIA Container Toolkit.

FROM python:3.11.15-slim-bookworm

# gcc and libc6-dev: Triton, which TRL's fused LM head runs on, compiles its launcher on the first GPU step.
# tini: as process 1 Python would ignore SIGTERM until a handler is set, and `docker stop` would have to kill it.
# hadolint ignore=DL3008  # Debian keeps one version of a package; a pin breaks with the next security update
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev tini \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/stoney-rl
COPY requirements.txt requirements-gpu.txt requirements.lock ./
# hadolint ignore=DL3042  # pip's cache is a mount, kept for the next build and in no layer
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m pip install --root-user-action=ignore -r requirements.txt -r requirements-gpu.txt -c requirements.lock

COPY LICENSE docker-entrypoint.sh *.py ./
COPY stoney_rl stoney_rl
COPY data/planted data/planted
# Without a mounted folder there is no owner to run as: then it is user 1000, and the outputs go with the container.
RUN install -d -o 1000 -g 1000 /app

ENV PYTHONUNBUFFERED=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /app
# There is no USER: the entrypoint starts as root to see whose folder it is, and becomes that user for good.
ENTRYPOINT ["tini", "--", "/opt/stoney-rl/docker-entrypoint.sh"]
CMD ["train_lora_local.py"]
