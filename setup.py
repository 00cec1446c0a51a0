"""Packages, and the native extension of `csrc/`; everything declarative is in pyproject.toml.

`triton_kernels/` is installed as `moe_unlearn.triton_kernels`: a top-level package of that name would
shadow triton-lang's own, whose presence other libraries probe for. The pytest plugin, which pytest imports
in every run, is installed outside of the package, whose import takes seconds.

The extension is two libraries beside the package, `_C_cpu` and `_C_cuda`, on libtorch's stable ABI: one
binary for every torch >= 2.10. It is optional. What was built, or why not, goes to `_C_build.txt`, which
`moe-unlearn env` shows. The environment variable MOE_UNLEARN_BUILD chooses:

    (unset)  cpu where a C++ compiler is there; cuda too where torch has CUDA and nvcc is there
    0        nothing
    cpu      cpu, and failing is an error
    cuda     cpu and cuda, and failing is an error
"""

import os
import shutil
from glob import glob
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext

CHOICE = os.environ.get("MOE_UNLEARN_BUILD", "")
HEADERS = sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True))
SOURCES = {
    "cpu": ["csrc/registration.cpp", *sorted(glob("csrc/cpu/*.cpp"))],
    "cuda": sorted(glob("csrc/cuda/*.cu")),
}
# An op's bits must not depend on which products a compiler contracts: a fused multiply-add is written out.
# The other two flags let loops with sqrt and with choices vectorise; they change no value.
CXX = "-std=c++20 -O3 -g0 -fvisibility=hidden -Wall -Wextra -Werror".split()
CXX += "-ffp-contract=off -fno-math-errno -fno-trapping-math".split()
NVCC = "-std=c++20 -O3 --fmad=false -Werror all-warnings -Xcompiler=-Wall,-Wextra,-Werror,-fvisibility=hidden".split()


def why_not() -> dict[str, str]:
    """For each library the reason not to try it, "" if there is none."""
    if CHOICE not in ("", "0", "cpu", "cuda"):
        raise SystemExit(f"MOE_UNLEARN_BUILD must be 0, cpu or cuda; got {CHOICE!r}")
    if CHOICE == "0":
        return dict.fromkeys(SOURCES, "MOE_UNLEARN_BUILD=0")
    try:
        from torch import version
        from torch.utils import cpp_extension
    except ImportError:
        why = "no torch at build time; `pip install --no-build-isolation .` after torch builds it"
        return dict.fromkeys(SOURCES, why)
    cuda = "" if cpp_extension.CUDA_HOME else "no nvcc"
    if CHOICE != "cuda":
        cuda = "this torch has no CUDA" if version.cuda is None else "MOE_UNLEARN_BUILD=cpu" if CHOICE else cuda
    compiler = cpp_extension.get_cxx_compiler().split()[0]
    return {"cpu": "" if shutil.which(compiler) else "no C++ compiler", "cuda": cuda}


def require() -> None:
    """A library asked for by name must be there."""
    for name in {"cpu": ["cpu"], "cuda": ["cpu", "cuda"]}.get(CHOICE, []):
        if reasons[name].startswith("not"):
            raise SystemExit(f"MOE_UNLEARN_BUILD={CHOICE}: {name} {reasons[name]}")


def extension(name: str):
    from torch.utils.cpp_extension import CppExtension, CUDAExtension, include_paths

    includes = [part for path in include_paths() for part in ("-isystem", path)]
    common = {"depends": HEADERS, "include_dirs": [os.path.abspath("csrc")], "py_limited_api": True}
    make, macros, flags = CppExtension, [("TORCH_TARGET_VERSION", "0x020a000000000000")], [*CXX, *includes]  # 2.10
    if name == "cuda":
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0+PTX;9.0a")  # without the a, Hopper's kernels are not there
        macros, make, flags = [*macros, ("USE_CUDA", None)], CUDAExtension, {"cxx": flags, "nvcc": [*NVCC, *includes]}
    return make(f"moe_unlearn._C_{name}", SOURCES[name], define_macros=macros, extra_compile_args=flags, **common)


def command(base):
    class Build(base):
        """Build each library by itself; one that fails is left out, with one line saying so."""

        def run(self):
            asked, built, inplace = self.extensions, [], self.inplace
            for ext in asked:
                self.extensions, self.inplace = [ext], inplace
                name = ext.name.rpartition("_")[2]
                try:
                    super().run()
                    built.append(ext)
                    reasons[name] = "built"
                except (Exception, SystemExit) as error:
                    reasons[name] = f"not built: {str(error).strip().splitlines()[0] if str(error) else error!r}"
            self.extensions = built
            package = Path("" if inplace else self.build_lib, "moe_unlearn")
            package.mkdir(parents=True, exist_ok=True)
            lines = [f"{name}: {reasons[name]}" for name in SOURCES]
            Path(package, "_C_build.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
            if asked:
                print("\n".join(f"moe-unlearn: native library {line}" for line in lines))
                require()

    return Build


reasons = {name: f"not built: {why}" if why else "" for name, why in why_not().items()}
names = [name for name in SOURCES if not reasons[name]]
require()
base = build_ext
if names:
    from torch.utils.cpp_extension import BuildExtension as base
else:
    print(f"moe-unlearn: native library {reasons['cpu']}")
places = {"moe_unlearn.triton_kernels": "triton_kernels", "pytest_moe_unlearn": "moe_unlearn/regress/pytest_plugin"}
setup(
    packages=[*find_packages(include=["moe_unlearn*"], exclude=["moe_unlearn.regress.pytest_plugin"]), *places],
    package_dir=places,
    ext_modules=[extension(name) for name in names],
    cmdclass={"build_ext": command(base)},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if names else {},
)
