# syntax=docker/dockerfile:1

# Build:  docker build -t unmask .
# Run:    docker run --read-only --tmpfs /tmp -p 127.0.0.1:8000:8000 unmask
# PyPI's torch for x86-64 Linux carries CUDA. For a small CPU image hand pip another index:
#         docker build --build-arg PIP_EXTRA_INDEX_URL=<index of CPU wheels> -t unmask:cpu .
ARG BASE=python:3.11-slim-bookworm

# The list of dependencies by itself: other changes to pyproject.toml must not install torch again.
FROM ${BASE} AS requirements
COPY pyproject.toml /
RUN python -c "import tomllib; print(*tomllib.load(open('/pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
    > /requirements.txt

FROM ${BASE} AS dependencies
ARG PIP_EXTRA_INDEX_URL
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_PROGRESS_BAR=off \
    PIP_ROOT_USER_ACTION=ignore
RUN python -m venv /opt/unmask
ENV PATH=/opt/unmask/bin:${PATH}
WORKDIR /src
COPY --from=requirements /requirements.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --requirement requirements.txt

FROM dependencies AS project
COPY LICENSE README.md pyproject.toml ./
COPY samplers samplers
COPY policies policies
COPY server server
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM ${BASE}
RUN groupadd --gid 10001 unmask \
    && useradd --uid 10001 --gid unmask --no-create-home --home-dir /data --shell /usr/sbin/nologin unmask \
    && install --directory --owner=unmask --group=unmask /data
COPY --from=dependencies /opt/unmask /opt/unmask
# The root file system may be read-only: what is downloaded goes to /data, what is scratch to /tmp.
ENV PATH=/opt/unmask/bin:${PATH} \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/data/huggingface \
    MPLCONFIGDIR=/tmp/matplotlib
RUN --mount=type=bind,from=project,source=/wheel,target=/wheel \
    pip install --no-cache-dir --no-deps --no-index --compile /wheel/*.whl

ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="unmask" \
      org.opencontainers.image.description="An OpenAI-style inference server for diffusion language models" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

USER 10001:10001
WORKDIR /data
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=10s --start-period=120s --retries=3 CMD ["unmask", "health"]
ENTRYPOINT ["unmask"]
CMD ["serve", "--host", "0.0.0.0"]
