# clipjob in a container; docs/container.md says how to run it. The build arguments:
#
#   BASE_IMAGE      a Debian with Python 3.11, python3-venv and CA certificates; pin its digest for a release
#   LOCK            run.txt (CUDA 13, driver 580 or newer) or run-cu126.txt (CUDA 12.6: older drivers and GPUs)
#   EXTRAS          more locks, with spaces between: gcsfs, adlfs, tensorboard
#   PACKAGES        more of Debian's packages: "gcc libc6-dev" for --compile
#   VERSION, REVISION   of the source, for the image's labels
#
# Behind a proxy with a certificate of its own:  docker build --secret id=ca_bundle,src=ca.pem …
#
# What is installed, the package alone, and a base with both: an edit of the source changes one small layer.
ARG BASE_IMAGE=docker.io/library/python:3.11-slim

FROM ${BASE_IMAGE} AS deps
ARG LOCK=run.txt
ARG EXTRAS=""
WORKDIR /build
COPY requirements/ requirements/
RUN --mount=type=secret,id=ca_bundle --mount=type=cache,target=/root/.cache/pip \
    if [ -s /run/secrets/ca_bundle ]; then export PIP_CERT=/run/secrets/ca_bundle; fi \
    && python3 -m venv /opt/venv \
    && for lock in "$LOCK" $(for extra in $EXTRAS; do echo "extra-$extra.txt"; done); do \
        /opt/venv/bin/pip install --disable-pip-version-check --require-hashes --requirement "requirements/$lock" || exit; \
    done

FROM deps AS app
COPY pyproject.toml README.md LICENSE ./
COPY job/ job/
RUN /opt/venv/bin/pip install --disable-pip-version-check --no-index --no-deps --no-build-isolation --root /app .

# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS runtime
ARG PACKAGES=""
# hadolint ignore=DL3008,DL3009,SC2086
RUN install -d -o 10001 -g 0 -m 0775 /runs \
    && if [ -n "$PACKAGES" ]; then \
        apt-get update && apt-get install -y --no-install-recommends $PACKAGES && rm -rf /var/lib/apt/lists/*; \
    fi
COPY --from=deps /opt/venv /opt/venv
COPY --from=app /app/opt/venv /opt/venv

# Any user id may run this, with a read-only root: all that libraries write goes to /tmp, and they ask for a name, not for /etc/passwd.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    USER=clipjob \
    HF_HOME=/tmp/huggingface \
    XDG_CACHE_HOME=/tmp/cache \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="clipjob" \
    org.opencontainers.image.description="Fine-tunes an OpenCLIP model as a batch job that can be killed at any moment" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="$VERSION" \
    org.opencontainers.image.revision="$REVISION"
WORKDIR /runs
USER 10001:0
EXPOSE 9465
# Exec form: the job is PID 1 and hears SIGTERM itself.
ENTRYPOINT ["clipjob"]
CMD ["--help"]
