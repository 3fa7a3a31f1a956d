# A Blyan node that runs as nobody in particular and writes to its home alone.
#
#   docker build --tag blyan-node .
#   docker run --init --volume blyan:/var/lib/blyan --publish 4040:4040 blyan-node start --role gpu
#
# Packages are at the versions of constraints.txt. torch comes from the index TORCH_INDEX where that
# has it: give PyTorch's CPU index, or PyPI's Linux build with several GB of CUDA is taken.

ARG PYTHON=3.11.14-slim-bookworm

FROM python:${PYTHON} AS build
ARG TORCH_INDEX=
# fastecdsa, which libp2p needs, is on PyPI as source only.
RUN apt-get update -qq && \
    apt-get install -y -qq --no-install-recommends gcc libc6-dev libgmp-dev && \
    rm -rf /var/lib/apt/lists/*
WORKDIR /src
RUN python -m venv /opt/blyan
# What is installed here changes rarely: an edit of our own code does not bring torch again.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN /opt/blyan/bin/pip install --quiet --no-cache-dir --disable-pip-version-check \
    ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} --constraint constraints.txt .
COPY protocols protocols
COPY storage storage
COPY blyan_node blyan_node
COPY cli cli
COPY setup.py ./
# What `blyan-node --version` shows: --build-arg BLYAN_COMMIT="$(git rev-parse HEAD)".
ARG BLYAN_COMMIT=
RUN /opt/blyan/bin/pip install --quiet --no-cache-dir --disable-pip-version-check \
    --constraint constraints.txt --no-deps --force-reinstall .

# Makes the demo's model: `docker compose run --rm model`.
FROM build AS model
RUN /opt/blyan/bin/pip install --quiet --no-cache-dir --disable-pip-version-check \
    --constraint constraints.txt gguf
COPY demo demo
ENTRYPOINT ["/opt/blyan/bin/python", "demo/smollm2.py"]
CMD ["/srv/models/smollm2"]

FROM python:${PYTHON} AS node
RUN apt-get update -qq && \
    apt-get install -y -qq --no-install-recommends libgmp10 libstdc++6 && \
    rm -rf /var/lib/apt/lists/* && \
    install -d -m 0700 -o 1000 -g 1000 /var/lib/blyan
COPY --from=build /opt/blyan /opt/blyan
# HOME as well, since the user that compose names may be unknown in here.
ENV PATH=/opt/blyan/bin:/usr/local/bin:/usr/bin:/bin \
    BLYAN_HOME=/var/lib/blyan \
    HOME=/var/lib/blyan
USER 1000:1000
WORKDIR /var/lib/blyan
VOLUME /var/lib/blyan
EXPOSE 4040
STOPSIGNAL SIGTERM
# 2, "no node to reach", means something else to Docker.
HEALTHCHECK --interval=5s --timeout=5s --start-period=60s --retries=3 \
    CMD blyan-node status || exit 1
ENTRYPOINT ["blyan-node"]
CMD ["start"]
