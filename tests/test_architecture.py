"""Promises about the packages as a whole: what importing costs, what is public, what every command answers."""

import importlib
import importlib.util
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

import mllm_protector_guard

ROOT = Path(__file__).parent.parent
HEAVY = {
    "accelerate",
    "gguf",
    "huggingface_hub",
    "langchain",
    "langchain_core",
    "langgraph",
    "langsmith",
    "llama_index",
    "numpy",
    "peft",
    "sklearn",
    "torch",
    "transformers",
}
LIGHT_MODULES = [
    "mllm_protector_guard",
    "mllm_protector_guard.batching",
    "mllm_protector_guard.calls",
    "mllm_protector_guard.errors",
    "mllm_protector_guard.fakes",
    "mllm_protector_guard.guard",
    "mllm_protector_guard.guarded_stream",
    "mllm_protector_guard.jsonl",
    "mllm_protector_guard.patience",
    "mllm_protector_guard.policy",
    "mllm_protector_guard.ports",
    "mllm_protector_guard.rescoring",
    "mllm_protector_guard.sentences",
    "mllm_protector_guard.stream_check",
    "mllm_protector_guard.stream_scoring",
    "mllm_protector_guard.streaming",
    "mllm_protector_guard.timelimit",
    "mllm_protector_guard.tracing",
    "mllm_protector_guard.types",
    "mllm_protector_guard.verdicts",
]
INTEGRATIONS = {
    "langchain_mllm_protector": ("langchain_core", "langchain"),
    "llama_index_mllm_protector": ("llama_index", "llama-index"),
}
TENSORS = {"torch", "transformers", "peft"}


def run_python(code, **environment):
    """What `code` printed, run in a process of its own that knows nothing of the tests."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(statement):
    code = f"{statement}\nimport sys, json\nprint(json.dumps(sorted({{n.partition('.')[0] for n in sys.modules}})))"
    return set(json.loads(run_python(code)))


class TestImporting:
    @pytest.mark.parametrize("module", LIGHT_MODULES)
    def test_the_engine_is_light(self, module):
        assert not loaded_by(f"import {module}") & HEAVY

    def test_the_star_import_takes_the_model_loaders_and_still_no_torch(self):
        names = json.loads(
            run_python(
                "from mllm_protector_guard import *\nimport json, sys\n"
                "print(json.dumps([sorted(globals()), 'torch' in sys.modules, 'transformers' in sys.modules]))"
            )
        )
        assert set(mllm_protector_guard.__all__) <= set(names[0])
        assert names[1:] == [False, False]

    @pytest.mark.parametrize("module", INTEGRATIONS)
    def test_an_integration_brings_its_framework_and_no_tensors(self, module):
        loaded = loaded_by(f"import {module}")
        others = {name for name in INTEGRATIONS if name != module} | {
            framework for name, (framework, _) in INTEGRATIONS.items() if name != module
        }
        assert not loaded & (TENSORS | others)

    def test_the_command_line_is_light(self):
        assert not loaded_by("import mllm_protector_guard.cli.main") & HEAVY

    @pytest.mark.parametrize("module", ["mllm_protector_guard", "mllm_protector_guard.models", *INTEGRATIONS])
    def test_importing_changes_nothing(self, module):
        # The frameworks come first, so that only what this project does is compared.
        framework = INTEGRATIONS.get(module, (None,))[0]
        code = f"""
import json, logging, os, sys, threading, warnings
{"import langchain_core.tracers.context" if framework == "langchain_core" else ""}
{"import llama_index.core" if framework == "llama_index" else ""}
import pydantic

def state():
    return [
        dict(os.environ),
        [repr(handler) for handler in logging.getLogger().handlers],
        logging.getLogger().level,
        [repr(entry) for entry in warnings.filters],
        [thread.name for thread in threading.enumerate()],
        repr(sys.excepthook), repr(sys.stdout), os.getcwd(),
    ]

before = state()
import {module}
ours = [n for n in logging.root.manager.loggerDict if n.partition(".")[0] in ({module!r}, "mllm_protector_guard")]
print(json.dumps([before == state(), [n for n in ours if logging.getLogger(n).handlers]]))
"""
        assert json.loads(run_python(code)) == [True, []]

    @pytest.mark.parametrize(("module", "framework", "extra"), [(m, f, e) for m, (f, e) in INTEGRATIONS.items()])
    def test_an_integration_without_its_framework_names_the_cure(self, module, framework, extra):
        printed = run_python(
            f"import sys\nsys.modules[{framework!r}] = None\n"
            "from mllm_protector_guard import MissingDependencyError\n"
            f"try:\n    import {module}\n"
            "except MissingDependencyError as error:\n    print(error.extra, '|', error)\n"
        )
        named, _, message = printed.partition(" | ")
        assert named == extra
        assert f'pip install "mllm-protector-guard[{extra}]"' in message


class TestPublicNames:
    @pytest.mark.parametrize("module", ["mllm_protector_guard", "mllm_protector_guard.fakes", *INTEGRATIONS])
    def test_all_is_exact(self, module):
        package = importlib.import_module(module)
        listed = package.__all__
        assert len(set(listed)) == len(listed)
        assert all(getattr(package, name) is not None for name in listed)
        found = {
            name
            for name, value in vars(package).items()
            if not name.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value))
        }
        borrowed = {"Any", "Collection", "MissingDependencyError", "Sequence", "Turn"} - {*listed}
        assert found - borrowed <= set(listed)

    def test_an_unknown_name_is_an_attribute_error(self):
        with pytest.raises(AttributeError, match="no attribute 'load_everything'"):
            _ = mllm_protector_guard.load_everything

    @pytest.mark.parametrize("name", ["load_detector", "load_detoxifier", "load_guard"])
    def test_the_loaders_are_functions(self, name):
        assert inspect.isfunction(getattr(mllm_protector_guard, name))

    def test_every_public_thing_has_a_docstring(self):
        documented = [n for n in mllm_protector_guard.__all__ if inspect.isclass(getattr(mllm_protector_guard, n))]
        assert [name for name in documented if not getattr(mllm_protector_guard, name).__doc__] == []

    def test_every_module_of_the_engine_says_what_it_is_for(self):
        package = ROOT / "mllm_protector_guard"
        for info in pkgutil.walk_packages([str(package)], "mllm_protector_guard."):
            source = importlib.util.find_spec(info.name).origin
            assert Path(source).read_text(encoding="utf-8").startswith(('"""', 'r"""')), source


class TestCommands:
    @staticmethod
    def commands():
        def walk(command, path):
            yield path
            for name, child in getattr(command, "commands", {}).items():
                yield from walk(child, (*path, name))

        from mllm_protector_guard.cli.main import app

        return list(walk(typer.main.get_command(app), ()))

    def test_the_commands_of_the_readme_are_there(self):
        names = {path[0] for path in self.commands() if path}
        assert names >= {"pull", "score", "rewrite", "check", "train", "evaluate"}

    def test_every_help_exits_0(self):
        from mllm_protector_guard.cli.main import app

        for path in self.commands():
            answer = CliRunner().invoke(app, [*path, "--help"])
            assert answer.exit_code == 0, path
            assert "Usage" in answer.output

    def test_the_installed_command_starts(self):
        done = subprocess.run(
            [Path(sys.executable).with_name("mllm-protector"), "--version"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stdout.split()[-1]) == (0, mllm_protector_guard.__version__)


RECIPES = sorted((ROOT / "mllm_protector_guard" / "training" / "recipes").glob("*.yaml"))


class TestShipped:
    @pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
    def test_every_recipe_parses(self, path):
        pytest.importorskip("yaml")
        from mllm_protector_guard.training.config import load_recipe

        assert load_recipe(path) is not None

    @pytest.mark.parametrize("package", ["mllm_protector_guard", *INTEGRATIONS])
    def test_types_are_shipped(self, package):
        assert Path(importlib.import_module(package).__file__).with_name("py.typed").is_file()

    def test_versions_agree(self):
        changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
        assert re.search(rf"^## \[{re.escape(mllm_protector_guard.__version__)}\]", changelog, re.MULTILINE)

    def test_every_extra_but_the_one_for_cuda_is_part_of_all(self):
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
            "optional-dependencies"
        ]
        (everything,) = extras["all"]
        assert set(re.search(r"\[(.*)\]", everything)[1].split(",")) == set(extras) - {"all", "quantization"}

    def test_the_example_of_the_architecture_runs(self):
        text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
        examples = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "import" in block]
        for example in examples:
            exec(compile(example, "ARCHITECTURE.md", "exec"), {"__name__": "example"})
        assert examples
