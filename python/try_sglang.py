"""Try another SGLang: `./dev try-sglang VERSION` says which shims it still needs, and whether its engine tests pass.

In .dev/sglang-VERSION it makes a copy of the packages whose pin names that version, resolves and installs them, starts
SGLang there on the CPU and on a simulated Tesla P4, and prints each shim's state:

  needed, applied   the change is in place and still needed
  not needed        this SGLang or torch works without it: remove the shim
  broken            it cannot be applied, or is not in place after a start; the cause follows

Then it runs the plugin's engine tests (`--tests PATH…` chooses others, `--no-tests` none). `--markdown FILE` writes the
result as a page. Nothing outside the folder changes. Delete the folder when it is not needed: it holds 7 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import lock

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("gguf-acceptance", "pascaline", "sglang-pascal")
_OVERRIDES = "override-dependencies = [\n"
PIN = re.compile(r'"sglang==[^"]+"')
DEVICES = ("cpu", "cuda")
START_SECONDS = 900
"""Longest start of SGLang's modules: the first one without bytecode takes minutes."""
ENGINE_TESTS = ("tests/test_compat.py", "tests/engine")


class State(NamedTuple):
    """What became of one shim on one device."""

    name: str
    device: str
    state: str
    cause: str = ""


def main() -> int:
    """Build, start, test; return 0 if no shim is broken and the tests pass."""
    arguments = parse_arguments()
    folder = ROOT / ".dev" / f"sglang-{arguments.version}"
    python = Scratch(folder, arguments.version, arguments.uv, arguments.without).build()
    states = [state for device in DEVICES for state in shim_states(python, device)]
    print(as_markdown(states))
    tested = "" if arguments.no_tests else run_tests(python, folder, arguments.tests or ENGINE_TESTS)
    if tested:
        print(tested)
    if arguments.markdown:
        arguments.markdown.write_text(page(arguments.version, states, tested))
    return int(any(state.state == "broken" for state in states) or " failed" in tested or " error" in tested)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="./dev try-sglang", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("uv", help="the uv program (./dev fills it in)")
    parser.add_argument("version", type=version, help="of SGLang, for example 0.5.24")
    parser.add_argument(
        "--tests", nargs="+", metavar="PATH", help="tests in python/sglang-pascal; default: the engine's"
    )
    parser.add_argument("--without", action="append", default=[], metavar="NAME", help="do not install this package")
    parser.add_argument("--no-tests", action="store_true", help="only the table of shims")
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="write the result to a page")
    return parser.parse_args()


def version(text: str) -> str:
    """Check that a text is a version, since it becomes a folder's name."""
    if not re.fullmatch(r"\d+(\.\d+)+(\.?(post|rc|dev|a|b)\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a version, must be like 0.5.24")
    return text


class Scratch:
    """A copy of the packages with another pin, and an environment for it."""

    def __init__(self, folder: Path, wanted: str, uv: str, without: list[str]) -> None:
        """Name the folder; nothing is made yet. without: packages to leave out, though SGLang asks for them."""
        self.folder, self._version, self._uv, self._without = folder, wanted, uv, without
        self._environment = folder / "environment"

    def build(self) -> Path:
        """Make the environment and return its Python; one that is there is used again, with the sources of now."""
        self._copy_sources()
        python = self._environment / "bin" / "python"
        done = self.folder / "installed"
        if not done.is_file():
            requirements = self.folder / "requirements.txt"
            requirements.write_text(self._resolve())
            self._run("venv", "--quiet", "--clear", "--python", sys.executable, str(self._environment))
            self._run("pip", "install", "--python", str(python), "--no-deps", "-r", str(requirements))
            done.touch()
        paths = [argument for name in PACKAGES for argument in ("-e", str(self.folder / "python" / name))]
        self._run(*("pip", "install", "--quiet", "--python", str(python), "--no-deps", "--no-build-isolation", *paths))
        return python

    def _copy_sources(self) -> None:
        target = self.folder / "python"
        shutil.rmtree(target, ignore_errors=True)
        left_out = shutil.ignore_patterns("__pycache__", "*.egg-info", ".venv", ".*_cache")
        for name in PACKAGES:
            shutil.copytree(ROOT / "python" / name, target / name, ignore=left_out)
        for name in ("pyproject.toml", "conftest.py"):
            shutil.copy(ROOT / "python" / name, target)
        shutil.rmtree(self.folder / "tests", ignore_errors=True)
        shutil.copytree(ROOT / "tests" / "support", self.folder / "tests" / "support", ignore=left_out)
        project = target / "sglang-pascal" / "pyproject.toml"
        text, count = PIN.subn(f'"sglang=={self._version}"', project.read_text())
        if count != 1:
            raise SystemExit(f"try-sglang: {project} has {count} pins of SGLang, must be one")
        project.write_text(text)
        workspace = target / "pyproject.toml"
        never = "".join(f"  \"{name}; sys_platform == 'never'\",\n" for name in self._without)
        workspace.write_text(workspace.read_text().replace(_OVERRIDES, _OVERRIDES + never))

    def _resolve(self) -> str:
        """Return the requirements: the locked versions, except where this SGLang asks for others."""
        place, let_go = self.folder / "resolution", {"sglang"}
        while True:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            workspace = lock.Workspace(place, self._uv, source=self.folder / "python")
            kept = lock.locked_versions(let_go)
            try:
                workspace.lock(kept)
                break
            except lock.ResolutionError as error:
                names = {requirement.split("==")[0] for requirement in kept}
                blamed = names & set(re.findall(r"\b([\w.-]+)==", str(error)))
                if not blamed:
                    raise SystemExit(f"try-sglang: nothing resolves with sglang=={self._version}: {error}") from error
                let_go |= blamed
        requirements = "".join(workspace.export(*selection) for selection in lock.LOCKS.values())
        self._tell(let_go - {"sglang"}, requirements)
        return requirements

    def _tell(self, let_go: set[str], requirements: str) -> None:
        known = {requirement.split("==")[0] for requirement in lock.locked_versions(set())}
        further = sorted(set(lock.requirement_names(requirements)) - known)
        if let_go:
            print(f"try-sglang: other versions than locked: {', '.join(sorted(let_go))}", file=sys.stderr)
        if further:
            print(
                f"try-sglang: not locked so far: {', '.join(further)}; --without NAME leaves one out, as "
                "python/pyproject.toml does for what serving never imports",
                file=sys.stderr,
            )

    def _run(self, *arguments: str) -> None:
        environment = {**os.environ, "UV_PYTHON_DOWNLOADS": "never"}
        subprocess.run([self._uv, *arguments], env=environment, check=True)


def shim_states(python: Path, device: str) -> list[State]:
    """Start SGLang's modules in a process of their own and ask each shim."""
    script = ROOT / "tests" / "support" / "shim_states.py"
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("SGLANG_", "CUDA_"))}
    variables |= {"CUDA_VISIBLE_DEVICES": "", "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [python, script, device], env=variables, capture_output=True, text=True, timeout=START_SECONDS, check=False
    )
    try:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        cause = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return [State("(start of SGLang)", device, "broken", cause)]
    states = [State(each["name"], device, *judge(each)) for each in answer["shims"]]
    if answer["start_error"]:
        states.insert(0, State("(start of SGLang)", device, "broken", answer["start_error"]))
    return states


def judge(shim: dict[str, Any]) -> tuple[str, str]:
    """Return a shim's state and, if it is broken, why."""
    if shim["error"]:
        return "broken", shim["error"]
    if not shim["needed"]:
        return "not needed", ""
    return ("needed, applied", "") if shim["applied"] else ("broken", "it is not in place after the start")


def run_tests(python: Path, folder: Path, tests: tuple[str, ...] | list[str]) -> str:
    """Run tests of the plugin in the copy; return pytest's last lines."""
    paths = [str(folder / "python" / "sglang-pascal" / test) for test in tests]
    command = [python, "-m", "pytest", "-c", str(folder / "python" / "pyproject.toml"), "-q", *paths]
    wide = {**os.environ, "COLUMNS": "300"}  # pytest cuts the causes off at the terminal's width
    done = subprocess.run(command, cwd=folder / "python", env=wide, stdout=subprocess.PIPE, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    return "\n".join([*(line for line in lines if line.startswith(("FAILED", "ERROR"))), *lines[-1:]])


def as_markdown(states: list[State]) -> str:
    """Return the table: a row for each shim, a column for each device."""
    found = {(state.name, state.device): state for state in states}
    lines = [f"| shim | {' | '.join(DEVICES)} |", "|---" * (1 + len(DEVICES)) + "|"]
    for name in dict.fromkeys(state.name for state in states):
        cells = [found.get((name, device)) for device in DEVICES]
        texts = [
            "not used" if cell is None else cell.state + (f": {cell.cause.replace('|', ' ')}" if cell.cause else "")
            for cell in cells
        ]
        lines.append(f"| {name} | {' | '.join(texts)} |")
    return "\n".join(lines)


def page(wanted: str, states: list[State], tested: str) -> str:
    """Return the page that is kept."""
    result = f"\n```\n{tested}\n```\n" if tested else "\nNo test was run.\n"
    return (
        f"# SGLang {wanted}\n\nWritten by `./dev try-sglang {wanted}`; cuda is a simulated Tesla P4: SGLang's "
        f"modules are imported and no kernel is started.\n\n{as_markdown(states)}\n{result}"
    )


if __name__ == "__main__":
    sys.exit(main())
