# TensorRT-LLM with trt_razor: NVIDIA's Triton image, our plugins, our package. docs/ngc.md says how to use it.
#
#     docker build --tag trt-razor .
#     docker build --tag trt-razor --build-arg IMAGE=nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3 .
#
# Plain `docker build` is enough, with or without BuildKit.

# TensorRT-LLM 1.0.0: 25.09 and 25.10; 1.1.0: 25.12 to 26.02; 1.2.1: 26.04 to 26.07.
ARG IMAGE=nvcr.io/nvidia/tritonserver:25.10-trtllm-python-py3
# Only compiles. CUDA 12.9 knows every chip that we have code for, and what it makes runs with the drivers of all these
# images, because the CUDA runtime is linked statically. The images themselves may come without a compiler.
ARG CUDA_IMAGE=nvcr.io/nvidia/cuda:12.9.1-devel-ubuntu24.04

FROM ${IMAGE} AS server

# ---- kernels and plugins ---------------------------------------------------------------------------------------------
FROM ${CUDA_IMAGE} AS plugins
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends cmake g++ make ninja-build \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /src
# Headers are all that is needed of TensorRT: those of the version that will load the plugins.
COPY --from=server /usr/local/tensorrt/include /usr/local/tensorrt/include
COPY CMakeLists.txt CMakePresets.json Makefile ./
COPY cmake cmake
COPY plugins plugins
COPY trt_razor/__init__.py trt_razor/
# Empty: every chip from 8.0 to 12.0. One takes a fraction of the time: --build-arg ARCHS=90-real
ARG ARCHS=
# Empty: a compiler on every core, each with up to 2 GB.
ARG JOBS=
RUN make plugin TENSORRT_ROOT=/usr/local/tensorrt ARCHS="${ARCHS}" JOBS="${JOBS:-$(nproc)}" \
    && ls -l trt_razor/kernels

# ---- the image -------------------------------------------------------------------------------------------------------
FROM server
WORKDIR /opt/trt_razor
COPY . .
COPY --from=plugins /src/trt_razor/kernels/ trt_razor/kernels/

# python3 is the system's up to 26.02 and that of /opt/venv-tritonserver from 26.03 on; `python` may be missing.
RUN python3 docker/install.py \
    && { command -v python || ln -s "$(command -v python3)" /usr/local/bin/python; } \
    && { command -v make || { apt-get update && apt-get install --yes --no-install-recommends make \
         && rm -rf /var/lib/apt/lists/*; }; }

# Building finds the plugins by itself. A server knows nothing of them: LD_PRELOAD=$RAZOR_PRELOAD tritonserver …
# It would be harmless in every process (plugins/tensorrt/README.md), but whoever starts a server shall see it.
# The system's Python takes packages from pip only with the first of these.
ENV PIP_BREAK_SYSTEM_PACKAGES=1 \
    TRT_RAZOR_PLUGIN=/opt/trt_razor/trt_razor/kernels/libtrt_razor_plugins_trt10.so \
    RAZOR_PRELOAD=/opt/trt_razor/trt_razor/kernels/libtrt_razor_preload_trt10.so
