# moe-unlearn on NVIDIA GPUs. From the top folder of a clone, CUDA of the major version that torch was built for:
#   docker build --file benchmarks/docker/cuda.Dockerfile --tag moe-unlearn:cuda .
#   docker run --rm --gpus all --volume "$PWD:/home/user/work" moe-unlearn:cuda env
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/moe-unlearn
ENV PATH=/opt/moe-unlearn/bin:$PATH

WORKDIR /source
COPY pyproject.toml setup.py README.md LICENSE ./
COPY csrc csrc
COPY triton_kernels triton_kernels
COPY moe_unlearn moe_unlearn

# torch comes first, so that the native libraries are built against it; it brings the Triton that goes with it
RUN pip install --no-cache-dir "torch>=2.10" "setuptools>=77" ninja \
    && MOE_UNLEARN_BUILD=cuda pip install --no-cache-dir --no-build-isolation ".[data]" peft

# the base image has a user of the number 1000 already
RUN useradd --create-home --uid 1001 user
USER user
WORKDIR /home/user/work
ENTRYPOINT ["moe-unlearn"]
CMD ["env"]
