# Three images of the same code, one for each build of TensorFlow: sogclr-cpu, sogclr-gpu, sogclr-tpu. `make images` builds them.
#
# Each can be a step of the pipeline and, on Dataflow, a worker: Beam's own program starts it there, KFP names a command here.

ARG BUILD
ARG BASE=docker.io/library/debian:bookworm-slim
ARG BEAM_SDK=docker.io/apache/beam_python3.11_sdk:2.77.0
FROM ${BEAM_SDK} AS beam

FROM ${BASE} AS python
RUN apt-get update -qq \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && ln -s /opt/sogclr/bin/python3 /usr/local/bin/python3 && ln -s /opt/sogclr/bin/python3 /usr/local/bin/python

# What is only needed to install stays in this stage.
FROM python AS installed
ARG BUILD
COPY requirements/${BUILD}.lock /tmp/requirements.lock
# pip stays in the image: Beam's boot asks it whether Beam is installed, and a worker without it does not start.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf,required=false \
    python3.11 -m venv /opt/sogclr \
    && /opt/sogclr/bin/pip install --quiet --no-cache-dir --no-deps --require-hashes --requirement /tmp/requirements.lock
COPY pyproject.toml README.md LICENSE /tmp/source/
COPY trainer /tmp/source/trainer
COPY eval /tmp/source/eval
COPY beam_jobs /tmp/source/beam_jobs
COPY components /tmp/source/components
COPY pipelines /tmp/source/pipelines
RUN --mount=type=secret,id=pip,target=/etc/pip.conf,required=false \
    /opt/sogclr/bin/pip install --quiet --no-cache-dir --no-deps --no-build-isolation /tmp/source

FROM python AS for-cpu
FROM python AS for-tpu
FROM python AS for-gpu
# As in NVIDIA's own images. The first two tell NVIDIA's container runtime what to mount; Google's machines have no such runtime
# and mount the driver at /usr/local/nvidia.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib:/usr/local/nvidia/lib64 \
    PATH=/usr/local/nvidia/bin:$PATH

FROM for-${BUILD} AS image
ARG BUILD
ARG COMMIT
RUN test -n "${COMMIT}" || { echo "error: --build-arg COMMIT=... must say which commit the code is of"; exit 2; }
COPY --from=beam /opt/apache/beam /opt/apache/beam
COPY --from=installed /opt/sogclr /opt/sogclr
# Beam's boot would make a virtual environment of its own, which does not see the packages in /opt/sogclr.
ENV PATH=/opt/sogclr/bin:$PATH \
    RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT=1 \
    PYTHONUNBUFFERED=1 \
    SOGCLR_COMMIT=${COMMIT} \
    MLFLOW_DISABLE_TELEMETRY=true \
    DO_NOT_TRACK=true
LABEL org.opencontainers.image.title="sogclr-${BUILD}" \
      org.opencontainers.image.revision="${COMMIT}" \
      org.opencontainers.image.licenses="Apache-2.0"
# Root owns what the steps write and open: /gcs on Vertex AI, /var/opt on a Dataflow worker, /dev/vfio on a TPU VM. Google's own
# training images run as root too.
USER root
WORKDIR /root
ENTRYPOINT ["/opt/apache/beam/boot"]
