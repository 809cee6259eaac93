# syntax=docker/dockerfile:1
# The endpoint: the [serve] extra alone, no training stack, no compiler, no git.
# Build from the project root: docker build -f infra/docker/serve.Dockerfile .
FROM python:3.11.14-slim-bookworm AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/mm
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN /opt/mm/bin/pip install --no-deps --index-url "${TORCH_INDEX}" "$(grep '^torch==' constraints.txt)"
COPY mm_model mm_model
RUN /opt/mm/bin/pip install --constraint constraints.txt '.[serve]'

FROM python:3.11.14-slim-bookworm
# expat: linked by rasterio's wheel; tini: reaps what Ray leaves behind.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libexpat1 tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home --home-dir /srv/mm mm
COPY --from=build /opt/mm /opt/mm
COPY --chown=mm:mm params.yaml /srv/mm/project/params.yaml
# GDAL_SKIP works only as the environment of the process: no driver that could read other files.
ENV PATH=/opt/mm/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    MM_PROJECT=/srv/mm/project \
    DO_NOT_TRACK=1 \
    GDAL_SKIP=VRT \
    MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false \
    MLFLOW_DISABLE_TELEMETRY=true \
    PROJ_NETWORK=OFF \
    RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0
USER 1000:1000
WORKDIR /srv/mm/project
EXPOSE 8000
ENTRYPOINT ["tini", "--"]
CMD ["mm", "serve"]
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=6 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/-/healthz', timeout=4)"]
