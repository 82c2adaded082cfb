# The `randlora` command in a container: docs/where_it_runs.md says how to build and use it.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim-bookworm

# Where torch's wheel comes from: the one for CPUs, or for a CUDA version, such as .../whl/cu130. All else is from PyPI.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# Triton, and torch.compile on a CPU, compile at run time.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/randlora
COPY constraints.txt ./
RUN pip install --no-cache-dir --no-deps -c constraints.txt --index-url "${TORCH_INDEX}" torch
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN pip install --no-cache-dir -c constraints.txt '.[train]'

# Downloaded models and compiled kernels go to /cache, data and runs to /work; any user may write there (--user).
RUN useradd --create-home --uid 1000 randlora && install --directory --mode 1777 /cache /work
ENV HF_HOME=/cache/huggingface \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    TRITON_CACHE_DIR=/cache/triton \
    MPLCONFIGDIR=/cache/matplotlib \
    PYTHONUNBUFFERED=1
USER randlora
WORKDIR /work
VOLUME ["/cache"]
ENTRYPOINT ["randlora"]
CMD ["--help"]
