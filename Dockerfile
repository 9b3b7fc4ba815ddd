# syntax=docker/dockerfile:1
# vitcli from this source tree, for a CPU:
#   docker build -t vitcli .
#   docker run --rm -v "$PWD:/data" vitcli check photos/
# With CUDA 12.8 (the names are those of `uv pip install --torch-backend`):
#   docker build -t vitcli:cuda --build-arg TORCH_BACKEND=cu128 .
#   docker run --rm --gpus all -v "$PWD:/data" vitcli:cuda doctor
ARG PYTHON=3.13

FROM python:${PYTHON}-slim AS build
ARG TORCH_BACKEND=cpu
ENV VIRTUAL_ENV=/opt/vitcli UV_COMPILE_BYTECODE=1
RUN pip install --no-cache-dir "uv>=0.8" && uv venv "$VIRTUAL_ENV"
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY vitcli vitcli
COPY recipes recipes
RUN uv pip install --no-cache --torch-backend "$TORCH_BACKEND" .

FROM python:${PYTHON}-slim
COPY --from=build /opt/vitcli /opt/vitcli
# `docker run --user "$(id -u)"` writes runs that belong to you; any user may write into the home
# folder, which holds the caches.
RUN useradd --uid 1000 --create-home vitcli \
    && mkdir /data && chown vitcli /data && chmod 777 /home/vitcli
ENV PATH=/opt/vitcli/bin:$PATH HOME=/home/vitcli PYTHONUNBUFFERED=1
USER vitcli
WORKDIR /data
ENTRYPOINT ["vitcli"]
CMD ["--help"]
