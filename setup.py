# SPDX-License-Identifier: Apache-2.0
"""Build of the two native libraries with one ninja graph.

``kvcompact_kernels/_C.so``
    every op schema and the CPU kernels. Needs a C++17 compiler and the headers of the installed torch.
``kvcompact_kernels/_C_cuda.so``
    the CUDA kernels. Built where nvcc is found and torch has CUDA, or where ``KVCOMPACT_CUDA=1`` asks for it: nvcc alone is
    needed, no GPU and no torch with CUDA. Loaded only where torch has CUDA.

Both use only LibTorch's stable ABI (2.10) and no Python API, so one ``py3-none`` wheel serves every Python and every
torch >= 2.10. Kernel sources are found by name, so a new op needs no change here:

``csrc/<op>/cpu.cpp``          argument checks, threads, registration; compiled once, may use torch's stable headers
``csrc/<op>/cpu_kernel.cpp``   the kernel; compiled once per instruction set, plain C headers only (see csrc/common/isa.h)
``csrc/<op>/*.cu``             the CUDA side: host code and, included, the kernels (``.cuh``)

Environment: ``CXX``, ``MAX_JOBS``, ``CUDA_HOME``, ``KVCOMPACT_CUDA=0|1`` (default: see above),
``KVCOMPACT_CUDA_ARCHS="80;90a"``, ``KVCOMPACT_BUILD_AMX_EMULATION=1`` (adds the ``amx_emulated`` variant, for tests).
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
PACKAGE = "kvcompact_kernels"
TORCH_TARGET_VERSION = "0x020A000000000000"  # 2.10: no symbol that came later is used
DEFAULT_CUDA_ARCHS = "80;90a"

AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
AVX512_FLAGS = AVX2_FLAGS + ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
AVX512BF16_FLAGS = AVX512_FLAGS + ["-mavx512bf16"]
AMX_FLAGS = AVX512BF16_FLAGS + ["-mamx-tile", "-mamx-bf16"]
# The order is the order of preference that csrc/common/isa.h knows, worst first.
ISA_FLAGS = {
    "base": [],
    "avx2": AVX2_FLAGS,
    "avx512": AVX512_FLAGS,
    "avx512bf16": AVX512BF16_FLAGS,
    "amx": AMX_FLAGS,
    "amx_emulated": ["-DKVC_EMULATE_AMX=1"],
}
# A line that must compile, with its flags, for the variant to be built.
ISA_PROBES = {
    "avx2": "__m256 f(__m256 a) { return _mm256_fmadd_ps(a, a, a); }",
    "avx512": "__m512 f(__m512 a) { return _mm512_fmadd_ps(a, a, a); }",
    "avx512bf16": "__m512 f(__m512 a, __m512bh b) { return _mm512_dpbf16_ps(a, b, b); }",
    "amx": "void f() { _tile_dpbf16ps(0, 1, 2); }",
}

CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wall", "-Wextra"]
# No -ffast-math: infinities and NaN keep their meaning (a masked score is -inf).
KERNEL_FLAGS = [
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fno-exceptions",
    "-fno-rtti",
    "-Wno-psabi",
]


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


def torch_directory() -> Path:
    """Folder of the installed torch, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "kvcompact-kernels builds against the torch of this environment and found none. "
            "Install torch>=2.10 first, then: pip install --no-build-isolation ."
        )
    return Path(spec.origin).parent


def torch_has_cuda() -> bool:
    """Whether the installed torch, if there is one, was built with CUDA."""
    spec = importlib.util.find_spec("torch")
    return spec is not None and Path(spec.origin).parent.joinpath("lib", "libtorch_cuda.so").exists()


def usable_isas() -> list[str]:
    """Instruction sets that this compiler can build; what it does not know is left out, with a line that says so."""
    isas = ["base"]
    with tempfile.TemporaryDirectory() as folder:
        for isa, probe in ISA_PROBES.items():
            source = Path(folder) / f"{isa}.cpp"
            source.write_text(f"#include <immintrin.h>\n{probe}\n")
            command = [*compiler(), *ISA_FLAGS[isa], "-std=c++17", "-c", str(source), "-o", f"{source}.o"]
            if subprocess.run(command, check=False, capture_output=True).returncode == 0:
                isas.append(isa)
            else:
                print(f"kvcompact: {compiler()[0]} cannot build the {isa} variant; it is left out")
    if os.environ.get("KVCOMPACT_BUILD_AMX_EMULATION") == "1":
        isas.append("amx_emulated")
    return isas


@dataclass(frozen=True)
class Cuda:
    nvcc: str
    library_directory: str
    architectures: list[str]

    @property
    def code(self) -> list[str]:
        """What the library holds: machine code (``sm_*``), and the PTX of one architecture (``compute_*``)."""
        portable = [arch for arch in self.architectures if arch.isdigit()]
        # PTX of the newest portable architecture, for GPUs that are newer than this list: their driver compiles it.
        return [f"sm_{arch}" for arch in self.architectures] + [f"compute_{arch}" for arch in portable[-1:]]

    @property
    def code_flags(self) -> list[str]:
        return [f"-gencode=arch=compute_{code.split('_')[1]},code={code}" for code in self.code]


def nvcc_candidates() -> list[str]:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [f"{home}/bin/nvcc"] if home else [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return [path for path in candidates if path]


def find_nvcc() -> str | None:
    """The CUDA compiler of this machine, or None."""
    return next((path for path in nvcc_candidates() if os.path.exists(path)), None)


def find_cuda(sources: list[Path]) -> Cuda | None:
    """The CUDA toolkit to build ``sources`` with, or None when CUDA is off, of no use or not found, or nothing is to build."""
    wanted = os.environ.get("KVCOMPACT_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"KVCOMPACT_CUDA must be 0 or 1, got {wanted!r}")
    if wanted == "0" or not sources or (wanted == "auto" and not torch_has_cuda()):
        return None
    nvcc = find_nvcc()
    if nvcc is None:
        if wanted == "1":
            raise SystemExit(f"KVCOMPACT_CUDA=1, but nvcc is at none of {nvcc_candidates()}")
        return None
    # nvcc may be a wrapper script: ask it where the toolkit lies.
    plan = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], check=False, capture_output=True, text=True).stderr
    tops = [line.split("TOP=", 1)[1].strip() for line in plan.splitlines() if "TOP=" in line]
    top = os.path.realpath(tops[0] if tops else os.path.join(os.path.dirname(nvcc), ".."))
    folders = [f"{top}/lib64", f"{top}/lib", f"{top}/targets/x86_64-linux/lib"]
    library_directory = next((f for f in folders if os.path.exists(f"{f}/libcudart_static.a")), None)
    if library_directory is None:
        raise SystemExit(f"libcudart_static.a is in none of {folders}")
    archs = os.environ.get("KVCOMPACT_CUDA_ARCHS", DEFAULT_CUDA_ARCHS).replace(",", ";").split(";")
    return Cuda(nvcc, library_directory, [arch.strip() for arch in archs if arch.strip()])


class NinjaGraph:
    """Text of a build.ninja; flags are quoted for the shell, paths for ninja."""

    def __init__(self) -> None:
        self.lines = ["ninja_required_version = 1.5"]

    def rule(self, name: str, command: str, depfile: bool = False) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        if depfile:
            self.lines += ["  deps = gcc", "  depfile = $out.d"]

    def build(self, output: Path, rule: str, inputs: list[Path], flags: list[str] = ()) -> Path:
        paths = " ".join(self._path(path) for path in inputs)
        self.lines.append(f"build {self._path(output)}: {rule} {paths}")
        if flags:
            self.lines.append(f"  flags = {self.flags(flags)}")
        return output

    @staticmethod
    def flags(flags: list[str]) -> str:
        return " ".join(shlex.quote(flag) for flag in flags).replace("$", "$$")

    @staticmethod
    def _path(path: Path) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaBuild(build_ext):
    """``build_ext`` that writes one ninja graph and runs it; with --inplace the libraries land in the package."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extensions(self) -> None:
        build_directory = Path(self.build_temp).resolve()
        build_directory.mkdir(parents=True, exist_ok=True)
        with open(build_directory / "lock", "w") as lock:  # two builds at once share the object files
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._build(build_directory)

    def copy_extensions_to_source(self) -> None:
        source = self.get_finalized_command("build_py")
        for extension in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(extension.name))
            place = Path(source.get_package_dir(PACKAGE), built.name)
            shutil.copy2(built, f"{place}.new")
            os.replace(f"{place}.new", place)  # never written in place: other processes may have it loaded

    def _build(self, directory: Path) -> None:
        torch = torch_directory()
        isas = usable_isas()
        cuda_sources = sorted(ROOT.glob("csrc/*/*.cu"))
        cuda = find_cuda(cuda_sources)
        print(f"kvcompact: CPU variants {' '.join(isas)}; CUDA {cuda.nvcc if cuda else 'off'}")

        exports = directory / "exports.map"
        exports.write_text("{ local: *; };\n")
        link = [f"-Wl,--version-script={exports}", "-Wl,--exclude-libs,ALL", "-Wl,-z,defs", "-Wl,--no-as-needed"]
        link += [f"-L{torch}/lib", "-ltorch", "-ltorch_cpu", "-Wl,--as-needed"]
        include = ["-isystem", f"{torch}/include", f"-I{ROOT}/csrc"]  # apart: nvcc knows no -isystem<folder>
        torch_flags = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", *include]

        graph = NinjaGraph()
        cxx = NinjaGraph.flags(compiler())
        common = NinjaGraph.flags([*CXX_FLAGS, f"-ffile-prefix-map={ROOT}/="])  # error messages name no build folder
        graph.rule("cxx", f"{cxx} -MMD -MF $out.d {common} $flags -c $in -o $out", depfile=True)
        # Linked beside its place and moved there: a process that has the old library loaded keeps it.
        graph.rule("link", f"{cxx} -shared $in -o $out.new $flags {NinjaGraph.flags(link)} && mv -f $out.new $out")

        targets = [self._target("_C")]
        objects = self._cpu_objects(graph, directory, isas, torch_flags)
        graph.build(targets[0], "link", objects)

        cuda_target = self._target("_C_cuda")
        if cuda:
            self._cuda_rule(graph, cuda, torch_flags)
            objects = [graph.build(self._object(directory, source), "nvcc", [source]) for source in cuda_sources]
            libraries = [f"-L{cuda.library_directory}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
            targets.append(graph.build(cuda_target, "link", objects, libraries))
        else:
            cuda_target.unlink(missing_ok=True)  # one left by an earlier build with CUDA would travel in the wheel

        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
        (directory / "build.ninja").write_text("\n".join(graph.lines) + "\n")
        self._run_ninja(directory, targets)

    def _target(self, library: str) -> Path:
        return Path(self.get_ext_fullpath(f"{PACKAGE}.{library}")).resolve()

    @staticmethod
    def _object(directory: Path, source: Path, suffix: str = "") -> Path:
        return directory / (str(source.relative_to(ROOT)).replace("/", "_") + suffix + ".o")

    def _cpu_objects(self, graph: NinjaGraph, directory: Path, isas: list[str], torch_flags: list[str]) -> list[Path]:
        for_each_isa = " ".join(f"X({isa}, __VA_ARGS__)" for isa in isas)
        glue_flags = [*torch_flags, f"-DKVC_FOR_EACH_ISA(X, ...)={for_each_isa}"]
        glue = [ROOT / "csrc/ops.cpp", *sorted(ROOT.glob("csrc/common/*.cpp")), *sorted(ROOT.glob("csrc/*/cpu.cpp"))]
        objects = [graph.build(self._object(directory, source), "cxx", [source], glue_flags) for source in glue]
        for source in sorted(ROOT.glob("csrc/*/cpu_kernel.cpp")):
            for isa in isas:
                flags = [*KERNEL_FLAGS, *ISA_FLAGS[isa], f"-DKVC_ISA={isa}", f"-DKVC_ISA_{isa}=1", f"-I{ROOT}/csrc"]
                objects.append(graph.build(self._object(directory, source, f".{isa}"), "cxx", [source], flags))
        return objects

    @staticmethod
    def _cuda_rule(graph: NinjaGraph, cuda: Cuda, torch_flags: list[str]) -> None:
        host = "-fPIC,-fvisibility=hidden,-Wall,-Wextra"
        if not set(str(ROOT)) & set(" ,"):  # nvcc hands flags on unquoted
            host += f",-ffile-prefix-map={ROOT}/="
        flags = ["-std=c++17", "-O3", "-Xcompiler", host, "--threads", "2", *cuda.code_flags]
        flags.append(f"-DKVC_CUDA_CODE={'+'.join(cuda.code)}")  # nvcc takes a comma for the end of a macro
        command = NinjaGraph.flags([cuda.nvcc, *flags, *torch_flags])
        graph.rule("nvcc", f"{command} -MD -MF $out.d -c $in -o $out", depfile=True)

    @staticmethod
    def _run_ninja(directory: Path, targets: list[Path]) -> None:
        try:
            import ninja

            program = os.path.join(ninja.BIN_DIR, "ninja")
        except ImportError:
            program = shutil.which("ninja")
            if program is None:
                raise SystemExit("ninja is needed to build: pip install ninja") from None
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        subprocess.check_call([program, "-C", str(directory), *jobs, *map(str, targets)])


class AnyPythonWheel(bdist_wheel):
    """No Python API is used, so the wheel is tagged py3-none-<platform>."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def extensions() -> list[Extension]:
    names = ["_C"] + (["_C_cuda"] if find_cuda(sorted(ROOT.glob("csrc/*/*.cu"))) else [])
    return [Extension(f"{PACKAGE}.{name}", []) for name in names]


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": NinjaBuild, "bdist_wheel": AnyPythonWheel})
