"""Which package may import which, what an import may load, and types of public functions."""

import ast
import re
import subprocess
import sys

import pytest

EVERYONE = {
    "budget",
    "class_names",
    "errors",
    "files",
    "libtpu",
    "malloc",
    "progress",
    "randomness",
    "ranges",
    "registry",
    "settings",
    "trees",
}
# package -> packages it may import, besides itself and the modules above, which all may import.
MAY_IMPORT = {
    "budget": set(),
    "class_names": set(),
    "errors": set(),
    "files": set(),
    "libtpu": {"errors"},
    "malloc": set(),
    "progress": set(),
    "randomness": set(),
    "ranges": set(),
    "registry": set(),
    "settings": set(),
    "trees": set(),
    "latents": set(),
    "models": set(),
    "distributed": set(),
    "execution": {"models", "distributed"},
    "diffusion": {"latents"},
    "data": {"latents", "distributed"},
    "training": {"latents", "models", "diffusion", "data", "distributed", "execution"},
    "generation": {"latents", "models", "diffusion", "data", "distributed", "execution", "training"},
    "evaluation": {"models", "distributed", "data"},
    "convert": {"latents", "models"},
    "parity": {"latents", "models", "diffusion", "distributed", "training", "generation", "evaluation", "convert"},
    "pod": {"latents", "models", "data", "distributed", "training", "generation", "evaluation"},
    "experiment": {
        "latents",
        "models",
        "diffusion",
        "data",
        "distributed",
        "training",
        "generation",
        "evaluation",
        "convert",
        "pod",
    },
    "cli": {
        "latents",
        "models",
        "diffusion",
        "data",
        "distributed",
        "training",
        "generation",
        "evaluation",
        "convert",
        "parity",
        "pod",
        "experiment",
    },
}
HEAVY = ("torch", "tensorflow", "matplotlib", "sklearn", "tensorflow_datasets", "clu.metric_writers")


def imported_packages(source: str) -> set[str]:
    """Return the packages of sfd_jax that a module's source imports, at any depth of the code."""
    packages = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "sfd_jax" and len(parts) > 1:
                packages.add(parts[1])
    return packages - {"__version__"}


def test_imported_packages_finds_every_form():
    source = "import sfd_jax.data.images\ndef f():\n  from sfd_jax import training\n  from sfd_jax.cli import x"
    assert imported_packages(source) == {"data", "training", "cli"}


def test_packages_import_only_what_they_may(root):
    faults, seen = [], set()
    for file in sorted((root / "sfd_jax").rglob("*.py")):
        relative = file.relative_to(root / "sfd_jax")
        package = relative.parts[0].removesuffix(".py")
        if package in ("__init__", "__main__"):
            continue
        seen.add(package)
        allowed = MAY_IMPORT[package] | EVERYONE | {package}
        for other in sorted(imported_packages(file.read_text()) - allowed):
            faults.append(f"{relative} imports {other}")
    assert not faults, faults
    assert seen == set(MAY_IMPORT)


@pytest.mark.parametrize("package", sorted(set(MAY_IMPORT) - {"cli"}))
def test_imports_load_nothing_heavy(package):
    code = (
        f"import sys, pkgutil, importlib; m = importlib.import_module('sfd_jax.{package}')\n"
        "for p in pkgutil.iter_modules(getattr(m, '__path__', [])):\n"
        f"    importlib.import_module('sfd_jax.{package}.' + p.name)\n"
        f"print([h for h in {HEAVY!r} if h in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_benchmarks_and_the_notebook_use_no_command_as_a_library(root):
    """Scripts may start commands by `cli.main`; for everything else they use `experiment`."""
    files = [file for kind in ("*.py", "*.ipynb") for file in (root / "scripts").rglob(kind)]
    used = {name for file in files for name in re.findall(r"sfd_jax\.cli[.\w]*", file.read_text())}
    assert len(files) > 10 and used <= {"sfd_jax.cli.main"}, used


# Names that query hardware. Only `latent_encoder` may use a mesh, for `jit_encoder`, which is not a network.
HARDWARE = {
    "default_backend",
    "devices",
    "local_devices",
    "device_count",
    "device_kind",
    "platform",
    "platform_dependent",
}
MESHES = {"Mesh", "AbstractMesh", "get_abstract_mesh", "get_mesh", "set_mesh", "shard_map"}


def test_networks_know_no_hardware(root):
    faults = []
    for file in sorted((root / "sfd_jax" / "models").rglob("*.py")):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        names |= {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
        forbidden = HARDWARE | (set() if file.name == "latent_encoder.py" else MESHES)
        faults += [f"{file.name} asks for {name}" for name in sorted(names & forbidden)]
    assert not faults, faults


def untyped(source: str) -> list[str]:
    """Return the parameters and returns of public functions and methods without a type: "line name parameter"."""
    faults, bodies = [], [("", ast.parse(source).body)]
    for prefix, body in bodies:
        for node in body:
            public = not node.name.startswith("_") if hasattr(node, "name") else False
            if isinstance(node, ast.ClassDef) and public:
                bodies.append((f"{node.name}.", node.body))
            elif isinstance(node, ast.FunctionDef) and (public or node.name in ("__init__", "__call__")):
                parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                wanted = {a.arg: a.annotation for a in parameters if a.arg not in ("self", "cls")}
                wanted |= {} if node.name == "__init__" else {"return": node.returns}
                faults += [f"{node.lineno} {prefix}{node.name} {name}" for name, type_ in wanted.items() if not type_]
    return faults


def test_untyped_finds_parameters_and_returns():
    source = (
        "class A:\n  def __init__(self, a, *, b: int): ...\n  def f(self): ...\ndef _g(a): ...\ndef h(c) -> int: ..."
    )
    assert untyped(source) == ["5 h c", "2 A.__init__ a", "3 A.f return"]


def test_public_functions_have_types(root):
    files = sorted((root / "sfd_jax").rglob("*.py"))
    faults = [f"{file.relative_to(root)}:{fault}" for file in files for fault in untyped(file.read_text())]
    assert not faults, faults
