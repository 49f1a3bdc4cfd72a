# Never run: there was no Docker where it was written.
#
#   docker build -t xmag .
#   docker build -t xmag:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
#   docker run --rm -v "$PWD:/data" -v xmag-models:/models xmag extract slides -o features
#
# Slides and outputs lie below /data; what is fetched from the Hub is kept in the volume /models. The
# user is 1000: --user "$(id -u):$(id -g)" where /data belongs to another. With a GPU add
# --gpus all; decoding processes share memory, so add --shm-size 2g.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY examples examples
COPY xmag xmag
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

FROM python:${PYTHON}-slim
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=dicom,openslide,evaluate,remote,s3,gs
# hadolint ignore=DL3013
RUN pip install --no-cache-dir "$TORCH" --index-url "$TORCH_INDEX"
RUN --mount=type=bind,from=build,source=/dist,target=/dist \
    pip install --no-cache-dir "$(echo /dist/xmag-*.whl)[$EXTRAS]"
RUN useradd --create-home --uid 1000 xmag && install -d -m 1777 /data /models
ENV HF_HOME=/models
VOLUME /models
USER 1000
WORKDIR /data
ENTRYPOINT ["xmag"]
CMD ["--help"]
