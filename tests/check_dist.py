"""Build the source archive and the wheel, look at what is in them, and use the wheel without the extras.

Usage: python -m tests.check_dist

The wheel goes into a new environment that sees of the running one what the wheel requires, and what that
requires: neither the extras nor anything of the book and the tests. Nothing is downloaded.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Collection, Iterable, Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
# At the top of the source archive: folders whole, and files.
SOURCE = {
    *("book", "chapters", "data", "invlib", "tests", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md"),
    *("LICENSE", "Makefile", "PKG-INFO", "README.md", "_config.yml", "pyproject.toml", "requirements.txt"),
    *(".gitignore", ".pre-commit-config.yaml"),
}
# What the extras bring; torch may require triton, and runs without it.
EXTRAS = (
    *("matplotlib", "ipywidgets", "torchvision", "triton", "distributed"),
    *("dp_accounting", "efficientnet_lite_pytorch"),
)
PROBE = """
import importlib.util, sys
from torch import nn
import invlib as iv

there = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is not None]
assert not there, f"{there} can be imported; expected an environment without them"
assert iv.__file__.startswith(sys.prefix), f"{iv.__file__} is not the wheel's"
images, labels = iv.data.samples("photos32", indices=[1])
model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
seen = iv.observe(model, images, labels, iv.FedSGD(), normalization=iv.CIFAR10)
exact = iv.evaluate(iv.best(steps=2)(model, seen), images, labels)
assert exact.mean_psnr > 60, exact
shipped = iv.models.available()
assert "cifar10" in shipped["ResNet20"], shipped
for name, sets in shipped.items():
    for weights in sets:
        iv.models.build(name, weights=weights)
model = iv.models.build("LeNetZhu", weights="cifar10")
seen = iv.observe(model, images, labels, iv.FedSGD(), normalization=iv.CIFAR10)
found = iv.inverting_gradients(steps=2)(model, seen)
print(f"the wheel alone: {exact.mean_psnr:.0f} dB in closed form, a search that ends with {found.status}")
"""


def main() -> int:
    """Build, look and try; return the exit status: 0, or 1 where something is missing or too much."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder)
        _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, str(ROOT))
        (source,), (wheel,) = made.glob("*.tar.gz"), made.glob("*.whl")
        with tarfile.open(source) as archive:
            # Each name begins with the folder invlib-VERSION.
            in_source = [member.name.partition("/")[2] for member in archive if member.isfile()]
        with zipfile.ZipFile(wheel) as archive:
            in_wheel = archive.namelist()
            info = next(name for name in in_wheel if name.endswith(".dist-info/METADATA"))
            required = metadata.PathDistribution(zipfile.Path(wheel, info.rpartition("/")[0] + "/")).requires
        faults = [*source_faults(in_source), *wheel_faults(in_wheel, expected_in_wheel(ROOT))]
        for fault in faults:
            print(fault)
        if faults:
            return 1
        sizes = ", ".join(f"{path.name} {path.stat().st_size / 1e6:.1f} MB" for path in (source, wheel))
        print(f"{sizes}: {len(in_source)} and {len(in_wheel)} files, as expected", flush=True)
        python = environment(made / "environment", required or [], wheel)
        print(_run(str(python), "-I", "-c", PROBE, *EXTRAS, folder=made), end="")
        _run(str(python), "-I", "-m", "invlib", "--help", folder=made)
        print(_run(str(python.with_name("invlib")), "--version", folder=made), end="")
    return 0


def source_faults(names: Collection[str]) -> Iterator[str]:
    """Yield what is wrong with the files of a source archive."""
    tops = {name.split("/")[0] for name in names}
    yield from (f"source archive: {name} is missing" for name in sorted(SOURCE - tops))
    yield from (f"source archive: {name} does not belong there" for name in sorted(tops - SOURCE))
    yield from (f"source archive: {name} was made by a program" for name in names if _made(name))


def wheel_faults(names: Collection[str], expected: set[str]) -> Iterator[str]:
    """Yield what is wrong with the files of a wheel, other than those that say which version it is."""
    there = {name for name in names if ".dist-info/" not in name}
    about = {name.split(".dist-info/")[1] for name in names if ".dist-info/" in name}
    expected_about = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}
    yield from (f"wheel: {name} is missing" for name in sorted((expected - there) | (expected_about - about)))
    yield from (f"wheel: {name} does not belong there" for name in sorted(there - expected))


def expected_in_wheel(root: Path) -> set[str]:
    """Return the files of the library, and of its data without the script that made them."""
    library = [path.relative_to(root) for path in (root / "invlib").rglob("*") if path.is_file()]
    files = [path.relative_to(root / "data") for path in (root / "data").rglob("*") if path.is_file()]
    kept = [path.as_posix() for path in library]
    kept += [f"invlib/_data/{path.as_posix()}" for path in files if path.suffix != ".py"]
    return {name for name in kept if not _made(name)}


def environment(folder: Path, required: Iterable[str], wheel: Path) -> Path:
    """Make an environment with a wheel and links to what it requires, and return its Python."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    for distribution in closure(required):
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution.locate_file(top))))
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    _run(*pip, "install", "--quiet", "--no-index", "--no-deps", str(wheel))
    return python


def closure(required: Iterable[str]) -> list[metadata.Distribution]:
    """Return the installed distributions that some requirements need, without those of extras."""
    found: dict[str, metadata.Distribution] = {}
    waiting = [Requirement(line) for line in required]
    while waiting:
        requirement = waiting.pop()
        name = requirement.name.lower().replace("_", "-")
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if wanted and name not in found and name not in EXTRAS:
            found[name] = metadata.distribution(requirement.name)
            waiting += [Requirement(line) for line in found[name].requires or []]
    return list(found.values())


def _made(name: str) -> bool:
    return name.endswith(".pyc") or any(part in ("__pycache__", "_build") for part in name.split("/"))


def _run(*words: str, folder: Path = ROOT) -> str:
    plain = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(words, cwd=folder, env=plain, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words[:3])} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    raise SystemExit(main())
