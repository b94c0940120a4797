# docker build -f docs/launch_files/gpu.Dockerfile -t gtalign:gpu .
# CUDA comes with jax's wheels; the host brings the driver and the NVIDIA container toolkit.
FROM python:3.11-slim
WORKDIR /opt/gtalign-jax
COPY requirements.txt setup.py README.md ./
COPY gtalign_jax gtalign_jax
COPY experiments experiments
COPY configs configs
RUN pip install --no-cache-dir '.[gpu,gs,s3,serve]'
USER 1000
ENTRYPOINT ["gtalign"]
