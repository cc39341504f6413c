"""A minimal root folder: this machine's Python, its standard library and the shared libraries they need, nothing else.

Bubblewrap binds it read-only, `cabochon sandbox image --from-host` makes a docker image of it. It is copied once per
interpreter into a cache that every local user may read, because a sandboxed process runs as a user who may not look
into the home folder the interpreter was installed in.
"""

from __future__ import annotations

import compileall
import contextlib
import hashlib
import importlib.util
import os
import pathlib
import py_compile
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile

from cabochon.errors import UserError

PYTHON = "/usr/bin/python3"
"""Where the interpreter is inside; docker images from elsewhere find theirs on the PATH."""
MOUNT_POINTS = ("proc", "dev", "tmp", "agent")
_LEFT_OUT = {"test", "tests", "idlelib", "tkinter", "turtledemo", "ensurepip", "lib2to3", "site-packages",
    "dist-packages",
             "pydoc_data", "lib-tk"}  # fmt: skip


def cache_folder() -> pathlib.Path:
    """For root a folder of the system, else the user's cache."""
    if os.geteuid() == 0:
        return pathlib.Path("/var/cache/cabochon")
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "cabochon"


def libraries(binaries: list[pathlib.Path]) -> set[pathlib.Path]:
    """The shared libraries `binaries` load, by the path they are looked for, from ldd."""
    found: set[pathlib.Path] = set()
    out = subprocess.run(["ldd", *map(str, binaries)], capture_output=True, text=True, check=False).stdout
    for match in re.finditer(r"(?:=>\s*|^\s+)(/[^\s:]+)\s+\(0x", out, re.MULTILINE):
        found.add(pathlib.Path(match[1]))
    return found


def _skip(folder: str, names: list[str]) -> list[str]:
    return [
        n for n in names if n in _LEFT_OUT or n.startswith("config-") or n.endswith((".a", ".opt-1.pyc", ".opt-2.pyc"))
    ]


def build(target: pathlib.Path, packages: tuple[str, ...] = ()) -> None:
    """Fills the empty folder `target`. `packages`: importable names of this environment to bring along.

    Raises UserError where a package cannot be found.
    """
    prefix = target / "usr"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    stdlib = prefix / "lib" / version
    executable = pathlib.Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    (prefix / "bin").mkdir(parents=True)
    shutil.copy2(executable, prefix / "bin" / "python3")
    shutil.copytree(sysconfig.get_path("stdlib"), stdlib, ignore=_skip, symlinks=False, ignore_dangling_symlinks=True)
    platstdlib = pathlib.Path(sysconfig.get_path("platstdlib", vars={"platbase": sys.base_exec_prefix}))
    if not (stdlib / "lib-dynload").exists():
        shutil.copytree(platstdlib / "lib-dynload", stdlib / "lib-dynload")
    site = stdlib / "site-packages"
    site.mkdir()
    for name in packages:
        _bring(name, site)
    needed = libraries([executable, *stdlib.rglob("*.so")])
    # libc opens this one when a thread ends, and nothing says so: without it that ends the program
    needed |= {unwinder for lib in needed if (unwinder := lib.with_name("libgcc_s.so.1")).exists()}
    for library in sorted(lib for lib in needed if not lib.is_relative_to(target)):
        usual = library.parts[1] in ("lib", "lib64", "usr")
        # elsewhere means beside an interpreter in somebody's home; /usr/lib is searched too, and says nothing of the
        # home
        place = target / library.relative_to("/") if usual else prefix / "lib" / library.name
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            shutil.copy2(library.resolve(), place)
    for name in MOUNT_POINTS:
        (target / name).mkdir()
    (target / "etc").mkdir()
    (target / "etc/passwd").write_text("nobody:x:65534:65534:nobody:/tmp:/none\n")
    (target / "etc/group").write_text("nogroup:x:65534:\n")
    (target / "etc/hosts").write_text("127.0.0.1 localhost\n")
    compileall.compile_dir(str(stdlib), quiet=2, maxlevels=10)
    for path in [target, *target.rglob("*")]:
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or os.access(path, os.X_OK) else 0o644)
    (target / "tmp").chmod(0o1777)  # an engine gives its tmpfs the mode of what it covers


def _bring(name: str, site: pathlib.Path) -> None:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None:
        raise UserError(f"sandbox packages: {name!r} is not installed in {sys.prefix}: install it or leave it out")
    origin = pathlib.Path(spec.origin)
    if spec.submodule_search_locations:
        shutil.copytree(origin.parent, site / name, ignore=shutil.ignore_patterns("tests", "test"), dirs_exist_ok=True)
        if (own := origin.parent.with_name(f"{name}.libs")).exists():  # shared libraries that a wheel brings
            shutil.copytree(own, site / own.name, dirs_exist_ok=True)
    else:
        shutil.copy2(origin, site / origin.name)


def _fill_once(folder: pathlib.Path, fill: object) -> pathlib.Path:
    """`folder`, made by `fill(path)` in a neighbour and renamed, so it is whole or absent, whoever races."""
    if folder.exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = pathlib.Path(tempfile.mkdtemp(prefix=".draft-", dir=folder.parent))
    except OSError as e:
        raise UserError(
            f"{folder.parent}: cannot be written ({e.strerror}): set XDG_CACHE_HOME to a folder of yours"
        ) from e
    try:
        fill(draft)  # type: ignore[operator]
        draft.chmod(0o755)
        with contextlib.suppress(OSError):  # somebody else was first
            draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def cached(packages: tuple[str, ...] = ()) -> pathlib.Path:
    """The root folder of this interpreter with `packages`, built at the first call on a machine (about 2 s)."""
    executable = pathlib.Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    stat = executable.stat()
    source = f"{sorted(packages)} {sys.prefix if packages else ''}"
    key = f"6 {executable} {stat.st_mtime_ns} {stat.st_size} {sys.version} {source}"
    folder = cache_folder() / f"root-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    return _fill_once(folder, lambda draft: build(draft, packages))


def agent_files() -> dict[str, bytes]:
    """The modules that run inside, by path; parent packages are empty files."""
    here = pathlib.Path(__file__).parent
    files = {
        "cabochon/__init__.py": b"",
        "cabochon/verifiers/__init__.py": b"",
        "cabochon/verifiers/sandbox/__init__.py": b"",
    }
    for name in ("wire", "inside", "inside_tests", "inside_guard", "inside_remote", "inside_pytest"):
        files[f"cabochon/verifiers/sandbox/{name}.py"] = (here / f"{name}.py").read_bytes()
    return files


def agent_key() -> str:
    """Names the modules that run inside, as compiled by this interpreter."""
    return hashlib.sha256(repr((sys.version, sorted(agent_files().items()))).encode()).hexdigest()[:16]


def agent() -> pathlib.Path:
    """A folder with the modules that run inside, compiled, and an empty file that names them."""
    files = agent_files()
    key = agent_key()

    def fill(draft: pathlib.Path) -> None:
        for name, data in files.items():
            path = draft / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        (draft / key).touch()
        compileall.compile_dir(str(draft), quiet=2, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
        for path in draft.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)

    return _fill_once(cache_folder() / f"agent-{key}", fill)


def agent_script() -> str:
    """The same modules as one `python -c` argument, for images that know nothing of us; an image that has these
    very ones uses its own, compiled."""
    files = {
        n.removesuffix(".py").removesuffix("/__init__").replace("/", "."): d.decode() for n, d in agent_files().items()
    }
    return f"""import sys,os
F={files!r}
class L:
    def find_spec(s,n,p=None,t=None):
        if n in F: return sys.modules['_frozen_importlib'].ModuleSpec(n,s,is_package=n.count('.')<3)
    def create_module(s,p): return None
    def exec_module(s,m): exec(compile(F[m.__name__],m.__name__,'exec'),m.__dict__)
if os.path.exists('/agent/{agent_key()}'): sys.path.insert(0,'/agent')
else: sys.meta_path.insert(0,L())
from cabochon.verifiers.sandbox.inside import main
"""
