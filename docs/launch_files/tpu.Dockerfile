# docker build -f docs/launch_files/tpu.Dockerfile -t gtalign:tpu .
# libtpu comes with jax; the VM or the node brings the chips.
FROM python:3.11-slim
WORKDIR /opt/gtalign-jax
COPY requirements.txt setup.py README.md ./
COPY gtalign_jax gtalign_jax
COPY experiments experiments
COPY configs configs
RUN pip install --no-cache-dir '.[tpu,gs,s3,serve]'
USER 1000
ENTRYPOINT ["gtalign"]
