"""`python -m mllm_protector_guard.cli`, the same as `mllm-protector`."""

from mllm_protector_guard.cli.main import app

app(prog_name="mllm-protector")
