"""The house rules, by ast: layers, sizes, forbidden modules and calls. Each rule is also shown to catch a planted violation."""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("common", "rollout_workers", "reward_servers", "learner", "deploy")
SIBLINGS = {"rollout_workers", "reward_servers", "learner"}
HEAVY = {"torch", "diffusers", "transformers", "peft", "ray"}
NO_IO = {"torch", "pyarrow", "fsspec", "ray", "os", "io", "pathlib", "socket", "subprocess", "time", "tempfile", "shutil"}
UNSAFE = {"pickle", "cloudpickle", "marshal", "dill", "shelve"}
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_POSITIONAL = 400, 60, 5
TEXT_SUFFIXES = {".py", ".md", ".toml", ".txt", ".json", ".jsonl", ".j2", ".html", ".css", ".js", ".yml", ".yaml", ".sh", ".cfg", ".csv"}
TEXT_NAMES = {"Makefile", "run", "LICENSE", "NOTICE", ".gitignore"}
NOT_OURS = {"runs", "build", "__pycache__", "node_modules"}  # git ignores them
UNFINISHED = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME)\b")
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:wo" + r"rk|ro" + r"ot)/")

Rule = Callable[[PurePosixPath, ast.Module], Iterator[str]]


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every import of the file, wherever it stands, as (line, module)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module


def calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    """Every call with its dotted name ("" where it has none)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func) if isinstance(node.func, ast.Name | ast.Attribute) else ""


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def layers(path: PurePosixPath, tree: ast.Module) -> Iterator[str]:
    """Imports go down; siblings do not meet."""
    package = path.parts[0]
    above = {"common": set(PACKAGES) - {"common"}} | {name: (SIBLINGS - {name}) | {"deploy"} for name in SIBLINGS}
    for line, module in imports(tree):
        if module.split(".")[0] in above.get(package, set()):
            yield f"{path}:{line}: {package} imports {module}"


def light_leaves(path: PurePosixPath, tree: ast.Module) -> Iterator[str]:
    """common/*.py import nothing heavy; the ledger does no I/O and looks at no clock."""
    is_leaf = len(path.parts) == 2 and path.parts[0] == "common"
    is_ledger = path.parts[:2] == ("common", "store") and path.stem.startswith("ledger")
    refused = HEAVY if is_leaf else NO_IO | HEAVY if is_ledger else set()
    for line, module in imports(tree):
        if module.split(".")[0] in refused:
            yield f"{path}:{line}: imports {module}, which this layer must not"


def ray_in_shells(path: PurePosixPath, tree: ast.Module) -> Iterator[str]:
    """Ray only in actor.py and deploy/."""
    if path.name == "actor.py" or path.parts[0] in ("deploy", "tests"):
        return
    for line, module in imports(tree):
        if module.split(".")[0] == "ray":
            yield f"{path}:{line}: imports ray outside actor.py and deploy/"


def sizes(path: PurePosixPath, tree: ast.Module) -> Iterator[str]:
    """Functions of at most 60 lines and 5 positional arguments besides self."""
    for node in functions(tree):
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if length > MAX_FUNCTION_LINES:
            yield f"{path}:{node.lineno}: {node.name} has {length} lines; {MAX_FUNCTION_LINES} at most"
        names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
        positional = len(names) - (bool(names) and names[0] in ("self", "cls"))
        if positional > MAX_POSITIONAL:
            yield f"{path}:{node.lineno}: {node.name} has {positional} positional arguments; {MAX_POSITIONAL} at most"


def no_pickle(path: PurePosixPath, tree: ast.Module) -> Iterator[str]:
    """Nothing that runs what it reads."""
    for line, module in imports(tree):
        if module.split(".")[0] in UNSAFE:
            yield f"{path}:{line}: imports {module}"
    for node, name in calls(tree):
        allows = any(word.arg == "allow_pickle" and not _is_false(word.value) for word in node.keywords)
        if name in ("torch.save", "torch.load") or allows:
            yield f"{path}:{node.lineno}: calls {name}, which pickles"


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def no_print(path: PurePosixPath, tree: ast.Module) -> Iterator[str]:
    """Messages go through common.logs; only deploy/ talks to a terminal."""
    if path.parts[0] not in ("deploy", "tests"):
        yield from (f"{path}:{node.lineno}: prints" for node, name in calls(tree) if name == "print")


def no_broad_except(path: PurePosixPath, tree: ast.Module) -> Iterator[str]:
    """No bare except, no Exception, no BaseException; in deploy/ and actor.py a supervisor may, if its last statement raises."""
    supervises = path.parts[0] == "deploy" or path.name == "actor.py"
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and _is_broad(node.type) and not (supervises and isinstance(node.body[-1], ast.Raise)):
            yield f"{path}:{node.lineno}: a broad except; name what is caught"


def _is_broad(caught: ast.expr | None) -> bool:
    named = caught.elts if isinstance(caught, ast.Tuple) else [caught]
    return any(item is None or (isinstance(item, ast.Name) and item.id in ("Exception", "BaseException")) for item in named)


def absolute_imports(path: PurePosixPath, tree: ast.Module) -> Iterator[str]:
    """Imports are absolute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield f"{path}:{node.lineno}: a relative import"


def no_environment(path: PurePosixPath, tree: ast.Module) -> Iterator[str]:
    """Only deploy/ reads the environment; components get config sections."""
    if path.parts[0] in ("deploy", "tests"):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv"):
            yield f"{path}:{node.lineno}: reads the environment"


RULES: tuple[Rule, ...] = (
    layers, light_leaves, ray_in_shells, sizes, no_pickle, no_print, no_broad_except, absolute_imports, no_environment,
)  # fmt: skip


def texts_problems(path: PurePosixPath, text: str) -> Iterator[str]:
    """Nothing unfinished, no path of somebody's machine."""
    for number, line in enumerate(text.splitlines(), 1):
        found = UNFINISHED.search(line) or MACHINE_PATH.search(line)
        if found:
            yield f"{path}:{number}: says {found[0]!r}"


def length_problems(path: PurePosixPath, text: str) -> Iterator[str]:
    """Files of at most 400 lines."""
    lines = text.count("\n")
    if lines > MAX_FILE_LINES:
        yield f"{path}: has {lines} lines; {MAX_FILE_LINES} at most"


def missing_readmes(root: Path) -> list[str]:
    """Packages without a README.md."""
    return [f"{name}/README.md is missing" for name in PACKAGES if not (root / name / "README.md").is_file()]


def package_files() -> list[Path]:
    """Every Python file of the packages."""
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def text_files(folder: Path) -> Iterator[Path]:
    """Every text file of the repository that git would not ignore."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            hidden = path.name.startswith(".") and path.name not in (".ci", ".github")
            if not hidden and path.name not in NOT_OURS and not path.name.endswith(".egg-info"):
                yield from text_files(path)
        elif path.suffix in TEXT_SUFFIXES or path.name in TEXT_NAMES:
            yield path


def relative(path: Path) -> PurePosixPath:
    """The path as the rules see it."""
    return PurePosixPath(path.relative_to(ROOT).as_posix())


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_package_file_keeps_the_rule(rule: Rule) -> None:
    found = [problem for path in package_files() for problem in rule(relative(path), _tree(path))]
    assert not found, "\n".join(found)


_trees: dict[Path, ast.Module] = {}


def _tree(path: Path) -> ast.Module:
    if path not in _trees:
        _trees[path] = ast.parse(path.read_text(encoding="utf-8"))
    return _trees[path]


def test_the_rules_see_the_packages() -> None:
    """An empty listing would pass every rule."""
    assert {relative(path).parts[0] for path in package_files()} == set(PACKAGES)
    assert len(package_files()) > 50


def test_tests_pickle_nothing_either() -> None:
    found = [problem for path in sorted((ROOT / "tests").rglob("*.py")) for problem in no_pickle(relative(path), _tree(path))]
    assert not found, "\n".join(found)


def test_no_package_file_is_too_long() -> None:
    found = [problem for path in package_files() for problem in length_problems(relative(path), path.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


def test_no_text_is_unfinished_or_names_a_path_of_a_machine() -> None:
    files = list(text_files(ROOT))
    assert ROOT / "pyproject.toml" in files
    found = [problem for path in files for problem in texts_problems(relative(path), path.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found[:50])


def test_every_package_has_a_readme() -> None:
    assert not missing_readmes(ROOT)


LONG_FUNCTION = "def long():\n" + "    x = 1\n" * 60
PLANTED: tuple[tuple[Rule, str, str], ...] = (
    (layers, "common/flow/a.py", "from learner.update import Updater"),
    (layers, "common/a.py", "def f():\n    import deploy.cli"),
    (layers, "learner/a.py", "import rollout_workers.worker"),
    (layers, "reward_servers/a.py", "from deploy import cli"),
    (light_leaves, "common/types.py", "import torch.nn"),
    (light_leaves, "common/logs.py", "from peft import LoraConfig"),
    (light_leaves, "common/store/ledger.py", "import pyarrow as pa"),
    (light_leaves, "common/store/ledger_rules.py", "import time"),
    (ray_in_shells, "learner/loop.py", "import ray"),
    (ray_in_shells, "common/store/coordinator.py", "from ray.util import state"),
    (sizes, "learner/a.py", LONG_FUNCTION),
    (sizes, "learner/a.py", "def f(a, b, c, d, e, f): ..."),
    (sizes, "learner/a.py", "class A:\n    def f(self, a, b, c, d, e, /, f): ..."),
    (no_pickle, "common/a.py", "import pickle"),
    (no_pickle, "common/a.py", "from cloudpickle import dumps"),
    (no_pickle, "deploy/a.py", "import torch\ntorch.save({}, 'x')"),
    (no_pickle, "learner/a.py", "import torch\nx = torch.load('x', weights_only=True)"),
    (no_pickle, "learner/a.py", "import numpy as np\nx = np.load('x', allow_pickle=True)"),
    (no_print, "learner/a.py", "print('x')"),
    (no_broad_except, "learner/a.py", "try:\n    f()\nexcept Exception:\n    raise"),
    (no_broad_except, "deploy/a.py", "try:\n    f()\nexcept Exception:\n    g()"),
    (no_broad_except, "learner/a.py", "try:\n    f()\nexcept (ValueError, BaseException):\n    g()"),
    (no_broad_except, "learner/a.py", "try:\n    f()\nexcept:\n    g()"),
    (absolute_imports, "learner/a.py", "from . import update"),
    (no_environment, "learner/a.py", "import os\nx = os.environ['A']"),
)
LAWFUL: tuple[tuple[Rule, str, str], ...] = (
    (layers, "learner/a.py", "from common.types import Prompt\nimport learner.update"),
    (layers, "deploy/a.py", "import learner.update, common.types, reward_servers.server"),
    (light_leaves, "common/flow/a.py", "import torch"),
    (light_leaves, "common/store/ledger.py", "from common.types import Drop"),
    (ray_in_shells, "learner/actor.py", "import ray"),
    (ray_in_shells, "deploy/ray_run.py", "import ray"),
    (sizes, "learner/a.py", "class A:\n    def f(self, a, b, c, d, e, *, g, h): ..."),
    (sizes, "learner/a.py", "def f():\n" + "    x = 1\n" * 59),
    (no_pickle, "learner/a.py", "import numpy as np\nx = np.load('x', allow_pickle=False)"),
    (no_print, "deploy/a.py", "print('x')"),
    (no_broad_except, "deploy/a.py", "try:\n    f()\nexcept Exception as e:\n    g()\n    raise RuntimeError('x') from e"),
    (no_broad_except, "learner/a.py", "try:\n    f()\nexcept (OSError, ValueError):\n    g()"),
    (no_environment, "deploy/a.py", "import os\nx = os.environ['A']"),
)


@pytest.mark.parametrize(("rule", "path", "source"), PLANTED)
def test_a_planted_violation_is_caught(rule: Rule, path: str, source: str) -> None:
    (problem,) = rule(PurePosixPath(path), ast.parse(source))
    assert problem.startswith(path)


@pytest.mark.parametrize(("rule", "path", "source"), LAWFUL)
def test_what_is_lawful_passes(rule: Rule, path: str, source: str) -> None:
    assert not list(rule(PurePosixPath(path), ast.parse(source)))


def test_planted_words_paths_and_long_files_are_caught() -> None:
    path = PurePosixPath("a.md")
    for planted in ("# TO" + "DO: later", "x = 1  # FIX" + "ME", "see /wo" + "rk/main", 'open("/ro' + 'ot/x")'):
        assert len(list(texts_problems(path, f"fine\n{planted}\n"))) == 1
    for fine in ("mastodons", "the framework/works", "https://example.org/root/x", "home/work/x"):
        assert not list(texts_problems(path, fine))
    assert not list(length_problems(path, "x\n" * 400))
    assert len(list(length_problems(path, "x\n" * 401))) == 1


def test_a_package_without_a_readme_is_caught(tmp_path: Path) -> None:
    for name in PACKAGES[1:]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text("text")
    assert missing_readmes(tmp_path) == ["common/README.md is missing"]
