# syntax=docker/dockerfile:1
# The MLflow server: tracking, registry and proxied artefacts; it runs no model.
# Build from the project root: docker build -f infra/docker/mlflow.Dockerfile .
FROM python:3.11.14-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/mlflow
WORKDIR /src
COPY constraints.txt infra/docker/requirements-server.txt ./
RUN /opt/mlflow/bin/pip install --constraint constraints.txt mlflow \
        --requirement requirements-server.txt

FROM python:3.11.14-slim-bookworm
RUN useradd --uid 1000 --create-home --home-dir /srv/mlflow mlflow
COPY --from=build /opt/mlflow /opt/mlflow
ENV PATH=/opt/mlflow/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false \
    MLFLOW_DISABLE_TELEMETRY=true \
    MLFLOW_MODEL_CATALOG_URI="" \
    MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
USER 1000:1000
WORKDIR /srv/mlflow
EXPOSE 5000
CMD ["mlflow", "server", "--host", "0.0.0.0", "--port", "5000"]
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=6 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:5000/health', timeout=4)"]
