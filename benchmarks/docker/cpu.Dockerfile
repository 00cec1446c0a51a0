# moe-unlearn on processors. From the top folder of a clone:
#   docker build --file benchmarks/docker/cpu.Dockerfile --tag moe-unlearn:cpu .
#   docker run --rm --volume "$PWD:/home/user/work" moe-unlearn:cpu env
FROM python:3.12-slim-bookworm

RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /source
COPY pyproject.toml setup.py README.md LICENSE ./
COPY csrc csrc
COPY triton_kernels triton_kernels
COPY moe_unlearn moe_unlearn

# torch comes first, so that the native library is built against it; this index has it without CUDA's gigabytes
RUN pip install --no-cache-dir "torch>=2.10" --index-url https://download.pytorch.org/whl/cpu \
    && pip install --no-cache-dir "setuptools>=77" ninja \
    && MOE_UNLEARN_BUILD=cpu pip install --no-cache-dir --no-build-isolation ".[triton,data]" peft

RUN useradd --create-home --uid 1000 user
USER user
WORKDIR /home/user/work
ENTRYPOINT ["moe-unlearn"]
CMD ["env"]
