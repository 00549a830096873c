# One image for every role of a graph: `nixlbus worker ROLE`, `nixlbus ps`, `nixlbus nats-conf`.
# The layers go from what changes least to what changes most; a change of code rebuilds the last one alone.
ARG PYTHON_VERSION=3.11

# The dependencies' names by themselves, so that a change of a tool's settings in pyproject.toml reinstalls nothing.
FROM python:${PYTHON_VERSION}-slim-bookworm AS requirements
COPY pyproject.toml /
RUN python -c "import tomllib; project = tomllib.load(open('/pyproject.toml', 'rb'))['project']; \
print(*project['dependencies'], *project['optional-dependencies']['http'], sep='\n')" >/requirements.txt

FROM python:${PYTHON_VERSION}-slim-bookworm
# Extra arguments for pip, such as the index of torch's CPU builds, which are smaller.
ARG PIP_ARGS=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONUNBUFFERED=1

COPY --from=requirements /requirements.txt /tmp/requirements.txt
COPY constraints.txt /tmp/constraints.txt
RUN python -m pip install ${PIP_ARGS} -c /tmp/constraints.txt -r /tmp/requirements.txt

# These folders are what new volumes copy their owner and mode from: the init step writes each user's keys into its own.
RUN useradd --uid 10001 --user-group --create-home nixlbus \
    && install -d -o nixlbus -g nixlbus -m 0700 /etc/nixlbus \
    && cd /etc/nixlbus \
    && install -d -o nixlbus -g nixlbus -m 0700 frontend processor decode prefill encode traces \
    && install -d -o nixlbus -g nixlbus -m 0755 server

COPY pyproject.toml constraints.txt README.md LICENSE /src/
COPY bus /src/bus
COPY observability /src/observability
COPY schemas /src/schemas
COPY workers /src/workers
RUN python -m pip install ${PIP_ARGS} -c /src/constraints.txt --no-deps /src && python -m pip check

WORKDIR /home/nixlbus
USER 10001:10001
CMD ["nixlbus", "--help"]
