# stretto serve in a container: docker build -t stretto . && docker run -p 8000:8000 stretto zoo:tiny
ARG PYTHON=3.12
FROM python:${PYTHON}-slim
# The native forward is compiled for the processor at hand at first use; without a compiler the torch path serves.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src ./src
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu -c constraints.txt ".[serve,grammar]"
RUN useradd --create-home stretto
USER stretto
WORKDIR /home/stretto
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=6s --start-period=60s \
    CMD python -c "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=5)"
ENTRYPOINT ["stretto", "serve", "--host", "0.0.0.0"]
CMD ["zoo:tiny"]
