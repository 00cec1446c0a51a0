"""Build the packages and the native extension of `csrc/`; everything declarative is in pyproject.toml.

`triton_kernels/` is installed as `moe_unlearn.triton_kernels`, since libraries probe for triton-lang's package
of that name. The pytest plugin, which every run of pytest imports, stands outside of the slow package.

The optional extension is two libraries beside the package, `_C_cpu` and `_C_cuda`, on libtorch's stable ABI: one
binary for every torch >= 2.10. `_C_build.txt` says what was built, or why not. MOE_UNLEARN_BUILD chooses:

    (unset)    cpu where a C++ compiler is there; cuda too where torch has CUDA and nvcc is there; with 0 nothing
    cpu, cuda  cpu, or cpu and cuda, and a failure is an error
"""

import os
import shutil
import subprocess
from glob import glob
from pathlib import Path

from setuptools import find_packages, setup

CHOICE = os.environ.get("MOE_UNLEARN_BUILD", "")
HEADERS = sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True))
SOURCES = {"cpu": ["csrc/registration.cpp", *sorted(glob("csrc/cpu/*.cpp"))], "cuda": sorted(glob("csrc/cuda/*.cu"))}
# An op's bits must not depend on which products a compiler contracts, so a fused multiply-add is written out.
# The other two flags let loops with sqrt and with choices vectorise; they change no value.
CXX = "-std=c++20 -O3 -g0 -fvisibility=hidden -Wall -Wextra -Werror".split()
CXX += "-ffp-contract=off -fno-math-errno -fno-trapping-math".split()
NVCC = "-std=c++20 -O3 --fmad=false -Werror all-warnings -Xcompiler=-Wall,-Wextra,-Werror,-fvisibility=hidden".split()


def cuda_home() -> str:
    """Return the folder of CUDA's headers and libraries, or "": nvcc's own path may be that of a script elsewhere."""
    given = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    said = "" if given else subprocess.getoutput("nvcc --dryrun -x cu -E /dev/null")
    places = [given] if given else [said.partition(" TOP=")[2].partition("\n")[0], "/usr/local/cuda"]
    return next((os.path.abspath(p) for p in places if Path(p, "include", "cuda_runtime.h").exists()), "")


def why_not() -> dict[str, str]:
    """Return for each library the reason not to try it, or "" if there is none."""
    if CHOICE not in ("", "0", "cpu", "cuda"):
        raise SystemExit(f"MOE_UNLEARN_BUILD must be 0, cpu or cuda; got {CHOICE!r}")
    if CHOICE == "0":
        return dict.fromkeys(SOURCES, "MOE_UNLEARN_BUILD=0")
    os.environ["CUDA_HOME"] = home = cuda_home()  # cpp_extension reads it when it is imported
    try:
        from torch import version
        from torch.utils import cpp_extension
    except ImportError:
        return dict.fromkeys(SOURCES, "no torch at build time; with it `pip install --no-build-isolation .` builds")
    cuda = "" if home else "no include/cuda_runtime.h where CUDA_HOME or nvcc points"
    cuda = "this torch has no CUDA" if version.cuda is None else "MOE_UNLEARN_BUILD=cpu" if CHOICE == "cpu" else cuda
    compiler = cpp_extension.get_cxx_compiler().split()[0]
    return {"cpu": "" if shutil.which(compiler) else "no C++ compiler", "cuda": cuda}


def require() -> None:
    """Raise SystemExit unless every library asked for by name could be built."""
    for name in {"cpu": ["cpu"], "cuda": ["cpu", "cuda"]}.get(CHOICE, []):
        if reasons[name].startswith("not"):
            raise SystemExit(f"MOE_UNLEARN_BUILD={CHOICE}: {name} {reasons[name]}")


def tell(package: Path) -> None:
    """Write into the package's folder, and print, what was built, or why not."""
    lines = [f"{name}: {reasons[name]}\n" for name in SOURCES]
    package.mkdir(parents=True, exist_ok=True)
    Path(package, "_C_build.txt").write_text("".join(lines), encoding="utf-8")
    print(*(f"moe-unlearn: native library {line}" for line in lines), sep="", end="")


def extension(name: str):
    from torch.utils.cpp_extension import CppExtension, CUDAExtension, include_paths

    includes = [part for path in include_paths() for part in ("-isystem", path)]
    common = {"depends": HEADERS, "include_dirs": [os.path.abspath("csrc")], "py_limited_api": True}
    make, macros, flags = CppExtension, [("TORCH_TARGET_VERSION", "0x020a000000000000")], [*CXX, *includes]  # 2.10
    if name == "cuda":
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0+PTX;9.0a")  # without the a, Hopper's kernels are missing
        macros, make, flags = [*macros, ("USE_CUDA", None)], CUDAExtension, {"cxx": flags, "nvcc": [*NVCC, *includes]}
    return make(f"moe_unlearn._C_{name}", SOURCES[name], define_macros=macros, extra_compile_args=flags, **common)


def command(base):
    class Build(base):
        """Builds each library by itself; one that fails is left out, with one line saying so."""

        def run(self):
            built, asked, inplace, compiler = [], self.extensions, self.inplace, self.compiler
            for ext in asked:
                self.extensions, self.inplace, self.compiler = [ext], inplace, compiler  # run() replaces them
                name = ext.name.rpartition("_")[2]
                try:
                    super().run()
                    built.append(ext)
                    reasons[name] = "built"
                except (Exception, SystemExit) as error:
                    reasons[name] = f"not built: {str(error).strip().splitlines()[0] if str(error) else error!r}"
            self.extensions = built
            tell(Path("" if inplace else self.build_lib, "moe_unlearn"))
            require()

    return Build


reasons = {name: f"not built: {why}" if why else "" for name, why in why_not().items()}
names = [name for name in SOURCES if not reasons[name]]
require()
if names:
    from torch.utils.cpp_extension import BuildExtension
else:  # no command of a build comes by
    tell(Path("moe_unlearn"))
places = {"moe_unlearn.triton_kernels": "triton_kernels", "pytest_moe_unlearn": "moe_unlearn/regress/pytest_plugin"}
setup(
    packages=[*find_packages(include=["moe_unlearn*"], exclude=["moe_unlearn.regress.pytest_plugin"]), *places],
    package_dir=places,
    ext_modules=[extension(name) for name in names],
    cmdclass={"build_ext": command(BuildExtension)} if names else {},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if names else {},
)
