# syntax=docker/dockerfile:1
# Everything but the tests: Prefect server and worker, the DVC stages, Ray head and workers.
# Build from the project root: docker build -f infra/docker/platform.Dockerfile .
FROM python:3.11.14-slim-bookworm AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/mm
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
# torch first and alone: its index decides between CPU and CUDA, and the layer seldom changes. What it
# needs comes with the rest, since that index has other versions of it.
RUN /opt/mm/bin/pip install --no-deps --index-url "${TORCH_INDEX}" "$(grep '^torch==' constraints.txt)"
COPY mm_model mm_model
RUN /opt/mm/bin/pip install --constraint constraints.txt '.[train,serve,pipeline]'
COPY infra/docker/requirements-server.txt requirements-server.txt
RUN /opt/mm/bin/pip install --constraint constraints.txt --requirement requirements-server.txt

FROM python:3.11.14-slim-bookworm
# expat: linked by rasterio's wheel; git: lineage tags and DVC; tini: reaps what Ray leaves behind.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git libexpat1 tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home --home-dir /srv/mm mm
COPY --from=build /opt/mm /opt/mm
ENV PATH=/opt/mm/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    MM_PROJECT=/srv/mm/project \
    DO_NOT_TRACK=1 \
    DVC_NO_ANALYTICS=1 \
    GX_ANALYTICS_ENABLED=false \
    MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false \
    MLFLOW_DISABLE_TELEMETRY=true \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    PROJ_NETWORK=OFF \
    RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0
USER 1000:1000
WORKDIR /srv/mm/project
ENTRYPOINT ["tini", "--"]
CMD ["mm", "--help"]
# Each service of the compose file replaces this by the question that fits it.
HEALTHCHECK --interval=30s --timeout=20s CMD ["mm", "--help"]
