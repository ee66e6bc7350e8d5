# SPDX-License-Identifier: Apache-2.0
"""The build: what is compiled, what the library asks of the world, and the wheel."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from kvcompact_kernels.backends.cpu import library
from kvcompact_kernels.version import __version__

ROOT = Path(__file__).resolve().parents[1]
KERNELS = sorted(path.parent.name for path in ROOT.glob("csrc/*/cpu_kernel.cpp"))
OTHER_PYTHONS = ("3.13", "3.12", "3.10", "3.14", "3.11")

pytestmark = [
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree"),
    pytest.mark.skipif(shutil.which("nm") is None or shutil.which("c++") is None, reason="needs a compiler and nm"),
]


@pytest.fixture(scope="module")
def setup_module_():
    spec = importlib.util.spec_from_file_location("kvcompact_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run(command, **options):
    """Runs a command and returns its output; on failure the test fails with all that it said."""
    result = subprocess.run([str(c) for c in command], check=False, capture_output=True, text=True, **options)
    assert result.returncode == 0, f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout


def symbols(path, *options):
    """``(name, type)`` of nm's lines."""
    lines = [line.split() for line in run(["nm", *options, path]).splitlines() if line and not line.endswith(":")]
    return [(fields[-1], fields[-2]) for fields in lines if len(fields) >= 2]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the tree in which a wheel was built, with the emulated AMX variant."""
    folder = tmp_path_factory.mktemp("build") / "source"
    unwanted = shutil.ignore_patterns("*.so", "__pycache__", ".git", ".venv", "build", "dist", "models", "*.egg-info")
    shutil.copytree(ROOT, folder, ignore=unwanted)
    (folder / "README.md").touch()
    environment = {**os.environ, "KVCOMPACT_BUILD_AMX_EMULATION": "1", "KVCOMPACT_CUDA": "0"}
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--no-index"]
    run([*command, "-w", folder / "dist", folder], env=environment)
    return folder


@pytest.fixture(scope="module")
def wheel(source):
    return next(source.glob("dist/*.whl"))


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.mark.slow
def test_sources_use_no_macro_that_came_after_the_oldest_torch():
    """The target version hides newer functions of torch's headers, but not all newer macros."""
    since_2_10 = {"STD_TORCH_CHECK", "STABLE_TORCH_LIBRARY", "STABLE_TORCH_LIBRARY_IMPL", "TORCH_BOX"}
    code = "".join(re.sub("//.*", "", path.read_text()) for path in ROOT.glob("csrc/**/*.*"))
    assert set(re.findall(r"\b[A-Z_]*TORCH[A-Z_]*\b", code)) <= since_2_10


def test_kernel_objects_export_only_their_entry_points(source):
    """A weak or global helper compiled with AVX-512 could be the copy that the linker keeps for every machine."""
    seen = set()
    for kernel in KERNELS:
        for path in sorted(source.glob(f"build/temp*/csrc_{kernel}_cpu_kernel.cpp.*.o")):
            isa = path.name.split(".")[-2]
            seen.add((kernel, isa))
            for name, kind in symbols(path, "--defined-only", "--extern-only"):
                assert kind == "T" and name.startswith("kvc_") and name.endswith(f"_{isa}"), (path.name, name, kind)
            for name, kind in symbols(path, "--undefined-only"):
                assert re.fullmatch(r"_GLOBAL_OFFSET_TABLE_|__tls_get_addr|[a-z0-9]+", name), (path.name, name)
    assert {(kernel, isa) for kernel in KERNELS for isa in ("base", "amx_emulated")} <= seen


@pytest.mark.slow
def test_the_library_needs_only_the_stable_abi_and_exports_nothing(source, unpacked):
    assert_stable_abi(unpacked / "kvcompact_kernels/_C.so", source)


def assert_stable_abi(path, source):
    needed = [name.split("@")[0] for name, _ in symbols(path, "-D", "--undefined-only")]
    shims = [name for name in needed if name.startswith(("aoti_torch_", "torch_"))]
    assert shims
    for name in set(needed) - set(shims):
        standard = name.startswith(
            ("_ZNS", "_ZNKS", "_ZS", "_ZTVN10__cxxabiv1", "_Zn", "_Zd", "_ZTIS", "_ZTVS", "_ZTTNSt", "_ZTVNSt")
        )
        assert standard or not name.startswith("_Z"), name
        assert not re.search(r"c10|torch|^Py|^_Py|aten", name), name
    assert symbols(path, "-D", "--defined-only") == []
    assert str(source).encode() not in path.read_bytes()


@pytest.fixture(scope="module")
def cuda_wheel(source, setup_module_):
    """A wheel with the CUDA kernels, built beside whatever torch this is."""
    if setup_module_.find_nvcc() is None:
        pytest.skip("needs nvcc")
    environment = {**os.environ, "KVCOMPACT_CUDA": "1"}
    said = run([sys.executable, "setup.py", "build_ext"], cwd=source, env=environment)
    assert "CUDA off" not in said and "warning" not in said.lower(), said
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--no-index"]
    run([*command, "-w", source / "dist_cuda", source], env=environment)
    return next(source.glob("dist_cuda/*.whl"))


@pytest.mark.slow
def test_the_cuda_library_travels_in_the_wheel_and_loads_beside_any_torch(cuda_wheel, source, tmp_path):
    zipfile.ZipFile(cuda_wheel).extractall(tmp_path)
    path = tmp_path / "kvcompact_kernels/_C_cuda.so"
    assert_stable_abi(path, source)
    needed = re.findall(r"NEEDED +(\S+)", run(["objdump", "-p", path]))
    assert not [name for name in needed if "cuda" in name], needed  # neither the runtime nor torch's part for CUDA
    code = """
import torch
from kvcompact_kernels.backends.cpu import library
from kvcompact_kernels.backends.cuda import library as cuda
library.load()
torch.ops.load_library(str(cuda.LIBRARY_PATH))
print(torch._C._dispatch_has_kernel_for_dispatch_key("kvcompact::compact_attention_decode", "CUDA"))
print(torch.ops.kvcompact.compact_attention_decode_code())
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    said = run([sys.executable, "-c", code], cwd=tmp_path, env=environment).split()
    assert said == ["True", "sm_80+sm_90a+compute_80"]


@pytest.mark.slow
def test_the_cuda_library_holds_machine_code_of_every_architecture(cuda_wheel, setup_module_, tmp_path):
    triton = importlib.util.find_spec("triton")
    tool = triton and Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
    if not tool or not tool.exists():
        pytest.skip("needs Triton's cuobjdump")
    zipfile.ZipFile(cuda_wheel).extractall(tmp_path)
    path = tmp_path / "kvcompact_kernels/_C_cuda.so"
    found = set(re.findall(r"sm_(\w+)\.cubin", run([tool, "--list-elf", path])))
    assert found == set(setup_module_.DEFAULT_CUDA_ARCHS.split(";"))
    assert "sm_80" in run([tool, "--list-ptx", path])  # for GPUs that came later


@pytest.mark.slow
def test_emulated_amx_passes_the_kernel_tests(unpacked):
    """The tile code paths of every op, on a machine that has no tiles: the ops' own tests against the emulation."""
    tests = sorted(ROOT.glob("python_tests/backends/test_cpu_*.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "amx_emulated", *tests]
    environment = {**os.environ, "PYTHONPATH": str(unpacked), "PYTHONDONTWRITEBYTECODE": "1"}
    output = run(command, cwd=unpacked, env=environment)
    assert int(re.search(r"(\d+) passed", output).group(1)) > 50


def test_variants_that_the_compiler_cannot_build_are_left_out(setup_module_, tmp_path, monkeypatch, capsys):
    old = tmp_path / "old compiler"
    old.write_text('#!/bin/sh\ncase "$*" in *avx512*) echo "unknown option" >&2; exit 1;; esac\nexec c++ "$@"\n')
    old.chmod(0o755)
    monkeypatch.setenv("CXX", f"'{old}'")
    monkeypatch.delenv("KVCOMPACT_BUILD_AMX_EMULATION", raising=False)
    assert set(setup_module_.usable_isas()) <= {"base", "avx2"}
    assert "cannot build the avx512 variant" in capsys.readouterr().out


def test_cuda_is_built_where_it_is_asked_for_or_of_use(setup_module_, tmp_path, monkeypatch):
    source = [tmp_path / "kernel.cu"]
    monkeypatch.setenv("KVCOMPACT_CUDA", "0")
    assert setup_module_.find_cuda(source) is None
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("KVCOMPACT_CUDA", "1")
    assert setup_module_.find_cuda([]) is None
    with pytest.raises(SystemExit, match="KVCOMPACT_CUDA=1, but nvcc"):
        setup_module_.find_cuda(source)
    monkeypatch.setenv("KVCOMPACT_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be 0 or 1, got 'yes'"):
        setup_module_.find_cuda(source)
    monkeypatch.delenv("KVCOMPACT_CUDA")
    assert setup_module_.find_cuda(source) is None
    # Found, but unasked of no use beside a torch without CUDA.
    nvcc = tmp_path / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\necho '#$ TOP={tmp_path}' >&2\n")
    nvcc.chmod(0o755)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/libcudart_static.a").touch()
    monkeypatch.setattr(setup_module_, "torch_has_cuda", lambda: False)
    assert setup_module_.find_cuda(source) is None
    monkeypatch.setattr(setup_module_, "torch_has_cuda", lambda: True)
    wanted = setup_module_.Cuda(str(nvcc), f"{tmp_path}/lib", ["80", "90a"])
    assert setup_module_.find_cuda(source) == wanted
    monkeypatch.setattr(setup_module_, "torch_has_cuda", lambda: False)
    monkeypatch.setenv("KVCOMPACT_CUDA", "1")
    assert setup_module_.find_cuda(source) == wanted
    assert wanted.code == ["sm_80", "sm_90a", "compute_80"]
    assert wanted.code_flags[1:] == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_80,code=compute_80",
    ]
    assert setup_module_.Cuda("nvcc", "lib", ["90a"]).code == ["sm_90a"]


def test_isa_environment_variable():
    usable, reason = library.available()
    if not usable:
        pytest.skip(reason)
    code = """
import os
from kvcompact_kernels.backends.cpu import library
try:
    library.isa()
except RuntimeError as error:
    print(error)
os.environ["KVCOMPACT_CPU_ISA"] = "base"
print(library.isa())
"""
    environment = {**os.environ, "KVCOMPACT_CPU_ISA": "sse9", "PYTHONPATH": str(ROOT)}
    message, isa = run([sys.executable, "-c", code], env=environment).strip().splitlines()
    assert "KVCOMPACT_CPU_ISA must be one of base, avx2" in message and "'sse9'" in message
    assert isa == "base"


def test_a_missing_library_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "LIBRARY_PATH", tmp_path / "_C.so")
    assert library.available.__wrapped__() == (
        False,
        f"{tmp_path / '_C.so'} does not exist: build it with `python setup.py build_ext --inplace`",
    )
    (tmp_path / "_C.so").write_text("not a library")
    usable, reason = library.available.__wrapped__()
    assert not usable and "does not load with torch" in reason


@pytest.mark.slow
def test_wheel_serves_any_python_and_is_small(wheel):
    machine = os.uname().machine
    assert re.fullmatch(rf"kvcompact_kernels-{re.escape(__version__)}-py3-none-\w*linux\w*_{machine}\.whl", wheel.name)
    assert wheel.stat().st_size < 10 * 2**20
    names = zipfile.ZipFile(wheel).namelist()
    assert "kvcompact_kernels/_C.so" in names
    assert all(name.startswith(("kvcompact_kernels/", "kvcompact_kernels-")) for name in names)
    assert not [name for name in names if name.endswith((".cpp", ".h", ".cu", ".o"))]
    shipped = {str(path.relative_to(ROOT)) for path in ROOT.glob("kvcompact_kernels/**/*.json")}
    assert shipped <= set(names)


@pytest.mark.slow
def test_wheel_runs_in_a_fresh_environment(wheel, tmp_path):
    """Same Python; torch comes from this environment by a path file, the package only from the wheel."""
    python = install(sys.executable, wheel, tmp_path)
    site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    (site / "torch_from_outside.pth").write_text(str(Path(torch.__file__).parents[1]))
    code = (
        "import torch, kvcompact_kernels as k; from kvcompact_kernels.ops import compact_attention as f;"
        "q = torch.randn(1, 4, 1, 8); kv = torch.randn(1, 2, 5, 8);"
        "print(f(q, kv, kv, backend='cpu').shape, k.__file__)"
    )
    shape, origin = run([python, "-c", code], cwd=tmp_path, env=clean_environment()).rsplit(" ", 1)
    assert shape == "torch.Size([1, 4, 1, 8])" and origin.startswith(str(tmp_path))


@pytest.mark.slow
def test_wheel_installs_and_loads_on_another_python(wheel, tmp_path):
    """Another Python version has no torch here, but libtorch does not belong to a Python: the library must load beside it."""
    other = find_other_python()
    if other is None:
        pytest.skip(f"no other Python of {', '.join(OTHER_PYTHONS)} on this machine")
    python = install(other, wheel, tmp_path)
    code = (
        "import ctypes, pathlib, kvcompact_kernels as k;"
        "ctypes.CDLL(str(pathlib.Path(k.__file__).parent / '_C.so'));"
        "print(k.__version__)"
    )
    libraries = str(Path(torch.__file__).parent / "lib")
    environment = {**clean_environment(), "LD_LIBRARY_PATH": libraries}
    assert run([python, "-c", code], cwd=tmp_path, env=environment).strip() == __version__


def install(python, wheel, folder):
    run([python, "-m", "venv", folder / "venv"])
    created = folder / "venv/bin/python"
    run([created, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel])
    return created


def clean_environment():
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def find_other_python():
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    for version in OTHER_PYTHONS:
        if version == here:
            continue
        pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
        for candidate in [shutil.which(f"python{version}"), *pyenv]:
            if candidate and works(candidate):
                return str(candidate)
    return None


def works(python):
    check = "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))"
    return subprocess.run([str(python), "-c", check], check=False, capture_output=True).returncode == 0
