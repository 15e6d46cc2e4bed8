"""The command `mllm-protector`."""
