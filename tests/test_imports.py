"""Who imports whom, read from the sources; and what a light command must not load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORDER = ["errors", "config", "storage", "data", "distributed", "modeling", "train", "evaluate"]
MAY_IMPORT = {name: set(ORDER[: number + 1]) for number, name in enumerate(ORDER)}
MAY_IMPORT["evaluate"] -= {"train"}
# torch-free like the data steps: the pipeline's preflight
MAY_IMPORT["plan"] = {"errors", "config", "storage", "data", "plan"}
MAY_IMPORT["train"] |= {"plan"}
# how many tokens fit into the GPU at hand
MAY_IMPORT["modeling"] |= {"plan"}
# the launching of jobs on a cluster, which needs no torch; training pods read its request
MAY_IMPORT["nodes"] = {"errors", "config", "storage", "nodes"}
MAY_IMPORT["train"] |= {"nodes"}
MAY_IMPORT["publish"] = {"errors", "config", "storage", "publish"}
# the command line calls every stage, inside its functions
MAY_IMPORT["handlers"] = {*ORDER, "plan", "publish", "handlers"}
MAY_IMPORT["commands"] = {"commands"}
MAY_IMPORT["cli"] = {*ORDER, "publish", "handlers", "commands", "cli"}
MAY_IMPORT["__main__"] = {"cli"}
# the programmatic interface, imported when it is first used
MAY_IMPORT["__init__"] = {"errors", "api"}
MAY_IMPORT["api"] = {*ORDER, "api"}
PIPELINES_MAY_IMPORT = {"config", "storage", "data", "errors", "plan"}


def imports(path):
    """(module, whether at the top level) of every import in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module, id(node) in top
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in top


def sources(package):
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", sources("dpo"), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_packages_of_dpo_import_only_what_is_below_them(path):
    package = path.relative_to(ROOT / "dpo").parts[0].removesuffix(".py")
    for module, _ in imports(path):
        first, _, rest = module.partition(".")
        assert first not in ("components", "pipelines", "tests"), module
        if first == "dpo" and rest:
            assert rest.partition(".")[0] in MAY_IMPORT[package], module


@pytest.mark.parametrize("path", sources("components"), ids=lambda p: p.stem)
def test_components_import_dpo_inside_their_bodies(path):
    for module, top in imports(path):
        assert not (top and module.partition(".")[0] in ("dpo", "pipelines")), module


@pytest.mark.parametrize("path", sources("pipelines"), ids=lambda p: p.stem)
def test_pipelines_import_no_training_code(path):
    for module, _ in imports(path):
        first, _, rest = module.partition(".")
        assert first not in ("torch", "transformers", "tests"), module
        if first == "dpo" and rest:
            assert rest.partition(".")[0] in PIPELINES_MAY_IMPORT, module


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import dpo", {"torch", "transformers", "kfp", "pyarrow", "hydra", "pydantic"}),
        ("import dpo.cli", {"torch", "transformers", "kfp", "pyarrow", "hydra", "pydantic"}),
        ("import dpo.data.stage, dpo.data.plan", {"torch", "transformers", "kfp"}),
        ("import dpo.plan.preflight, dpo.plan.command", {"torch", "transformers", "kfp"}),
        ("import dpo.evaluate.gate, dpo.publish.stage", {"torch", "transformers", "kfp"}),
        ("import dpo.nodes.run", {"torch", "transformers", "kfp"}),
        ("import pipelines.local, pipelines.request, pipelines.history", {"torch", "transformers"}),
    ],
)
def test_light_imports_stay_light(code, absent):
    shown = f"import sys; {code}; print(*sorted({absent!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
