"""The project keeps its own promises: the README runs, imports point down, versions are pinned, no machine is named."""

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from lightning_quantdebug import QuantDebug, cli
from lightning_quantdebug.report import StepName, Verdict
from lightning_quantdebug.settings import make_settings
from lightning_quantdebug.target import PRESETS

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="Python 3.10 has no reader for TOML of its own")

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def blocks(*languages: str) -> list[str]:
    """The README's blocks in these languages."""
    return [text for language, text in BLOCKS if language in languages]


def test_every_block_has_a_language_that_is_tested() -> None:
    assert {language for language, _ in BLOCKS} == {"console", "python", "yaml", "mermaid"}


@pytest.mark.parametrize("source", blocks("python"), ids=lambda source: source.splitlines()[-1])
def test_the_readmes_python_runs(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    exec(compile(source, "README.md", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("line", [line for text in blocks("console") for line in text.splitlines()])
def test_the_readmes_commands_exist(line: str) -> None:
    words = line.split()
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", MAKEFILE, re.MULTILINE)
    elif words[0] == "python":
        assert words[1:3] == ["-m", "lightning_quantdebug"]
        with pytest.raises(SystemExit) as ended:
            cli.main([words[3], "--help"])
        assert ended.value.code == 0
    else:
        assert words == ["pip", "install", "-c", "constraints.txt", "."]


@pytest.mark.parametrize("text", [*blocks("yaml"), (ROOT / "examples/lightning_cli.yaml").read_text(encoding="utf-8")])
def test_the_yaml_names_settings_that_exist(text: str) -> None:
    (entry,) = yaml.safe_load(text)["trainer"]["callbacks"]
    assert entry["class_path"] == "lightning_quantdebug.QuantDebug"
    settings = make_settings(**entry["init_args"])
    assert settings.target.weights.bit_width == 4
    assert str(settings.tolerance) == "1%"


def test_the_readmes_settings_have_the_defaults_that_the_code_has() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (`[^|]*`) \|", README, re.MULTILINE))
    parameters = inspect.signature(QuantDebug).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    assert {name: eval(value.strip("`")) for name, value in rows.items()} == {name: defaults[name] for name in rows}
    assert len(rows) > 10
    assert {*rows, "monitor"} == set(defaults)


def test_the_readme_names_every_preset() -> None:
    for name in PRESETS:
        assert f"`{name}`" in README


def test_the_flow_chart_has_every_step() -> None:
    (chart,) = blocks("mermaid")
    steps = {step.value for step in StepName}
    words = set(re.findall(r"\b[a-z0-9_]+\b", chart))
    assert steps <= words
    assert {Verdict.ACCEPTED.value, Verdict.NOT_ACCEPTED.value, Verdict.BROKEN_PIPELINE.value} <= words


def lint_imports(directory: Path) -> subprocess.CompletedProcess[str]:
    """Check the import contracts of the package in ``directory``."""
    program = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(directory), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


def test_imports_point_down_the_floors() -> None:
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout
    assert "3 kept, 0 broken" in result.stdout


@pytest.mark.parametrize(
    ("module", "statement", "contract"),
    [
        ("report", "from lightning_quantdebug import console", "Imports point down the floors"),
        ("encoding", "import pytorch_lightning", "Only the modules that face the Trainer import Lightning"),
        ("settings", "import torch", "The words need the standard library alone"),
    ],
)
def test_an_import_that_points_up_is_seen(module: str, statement: str, contract: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "lightning_quantdebug", tmp_path / "lightning_quantdebug")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "lightning_quantdebug" / f"{module}.py").open("a", encoding="utf-8") as file:
        file.write(f"\n{statement}\n")
    result = lint_imports(tmp_path)
    assert result.returncode == 1
    assert f"{contract} BROKEN" in result.stdout


def canonical(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_requirement_is_pinned_to_a_version_that_it_allows() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {canonical(pin.name): next(iter(pin.specifier)) for pin in pins}
    assert len(versions) == len(pins)
    assert all(version.operator == "==" for version in versions.values())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *extras["dev"], *extras["examples"]]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(versions[canonical(requirement.name)].version), text
    assert versions["torch"].version == "2.13.0"


def test_compromised_releases_of_lightning_are_never_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts = project["dependencies"] + project["optional-dependencies"]["dev"]
    requirements = [Requirement(text) for text in texts if canonical(Requirement(text).name).endswith("lightning")]
    assert sorted(requirement.name for requirement in requirements) == ["lightning", "pytorch-lightning"]
    for requirement in requirements:
        assert not any(requirement.specifier.contains(version) for version in ("2.3.9", "2.6.2", "2.6.3", "2.8.0"))
        assert all(requirement.specifier.contains(version) for version in ("2.4.0", "2.6.1", "2.6.6", "2.7.0"))


def test_make_sets_up_before_it_runs(tmp_path: Path) -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    # The tests themselves run under make; its variables would speak to this make too.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    for target in ("demo", "test", "lint"):
        command = ["make", "-n", target, f"VENV={tmp_path}/venv"]
        plan = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
        assert plan.index("-m venv") < plan.index('pip install -q -c constraints.txt -e ".[dev,examples]"')
        assert plan.splitlines()[-1].startswith((f"{tmp_path}/venv/", "OMP_NUM_THREADS=1 "))


def test_ci_runs_the_readmes_test_command_last() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = [line for line in script.read_text(encoding="utf-8").splitlines() if line.startswith("make ")]
    assert [command.split()[1] for command in commands] == ["lint", "demo", "test"]
    assert "set -euo pipefail" in script.read_text(encoding="utf-8")


def project_files() -> list[Path]:
    """Every text file that belongs to the project."""
    folders = ("lightning_quantdebug", "examples", "tests", "benchmarks", ".ci")
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*"))]
    found += [ROOT / name for name in ("README.md", "Makefile", "pyproject.toml", "constraints.txt", ".gitignore")]
    return [path for path in found if path.is_file() and "__pycache__" not in path.parts]


def test_no_file_names_a_machine() -> None:
    # Written in parts, so that this file does not find itself.
    paths = "|".join(("work", "root", "home", "opt", "tmp", "Users"))
    machine = re.compile(rf"(?<![\w.$\}}])/(?:{paths})/\w|\.\./sha" r"red\b")
    named = {
        f"{path.relative_to(ROOT)}:{number}"
        for path in project_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if machine.search(line)
    }
    assert named == set()


def test_every_module_is_typed_and_says_what_it_is_for() -> None:
    assert (ROOT / "lightning_quantdebug" / "py.typed").exists()
    for path in sorted((ROOT / "lightning_quantdebug").glob("*.py")):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path.name
