"""Compile every kernel ahead of time, for GPUs that need not be here, and say what each configuration takes of one.

    python -m fastforget_kernels.compiling              print the table; fail where one does not build or spills
    python -m fastforget_kernels.compiling --table      and write it in README.md

Two forms of a configuration are compiled, as Triton compiles a launch for what it finds in the arguments:

    aligned   pointers, strides and sizes divisible by 16, as in every sweep over a head: its buffers are ours
    general   nothing known of any argument, strides of 64 bits: the most instructions that a launch may need, as for
              logits of a model whose vocabulary is odd. Compiled for one target only, for time

Triton's own cache makes all but the first run quick.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastforget_kernels import cast_weight, coupled_tile, gradient_tile, label_tile, paired_tile, state_rows
from fastforget_kernels.launching import UNALIGNED, UNSPECIALISED, Variant, interpreting

MODULES = (label_tile, paired_tile, coupled_tile, gradient_tile, state_rows, cast_weight)
TARGETS = {  # the arguments of GPUTarget
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHARED_LIMITS = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}  # of a program
FORMS = [
    (target, form) for target in TARGETS for form in ("aligned", "general") if form == "aligned" or target == "sm_90"
]
DIVISIBLE = {"first", "padded"}  # and every stride that is specialised

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- table: written by python -m fastforget_kernels.compiling --table -->", "<!-- end of table -->"


def all_variants() -> list[Variant]:
    """Every configuration that can be launched."""
    return [variant for module in MODULES for variant in module.variants()]


def heading(variant: Variant) -> str:
    """Kernel, block sizes and warps: what stands above a part of the table."""
    sizes = [f"{name} {value}" for name, value in variant.options.items() if name.isupper() and type(value) is int]
    return f"**`{variant.kernel.__name__}`**: {', '.join([*sizes, str(variant.options['num_warps'])])} warps"


def cells(variant: Variant) -> list[str]:
    """What tells one configuration of a kernel from another: dtypes, read first -> written; and the flags set."""
    types = variant.types()
    dtypes = [
        next(kind for kind in types.values() if kind.startswith("*")),
        *([types["out"]] if "out" in types else []),
    ]
    flags = [name for name, value in variant.options.items() if value is True]
    return [" → ".join(kind[1:] for kind in dtypes), ", ".join(flags) or "–"]


def source(variant: Variant, form: str, backend: str) -> ASTSource:
    """What Triton compiles, in one of the two forms."""
    types = variant.types()
    attributes: dict[tuple[int], list[list[Any]]] = {}
    if form == "aligned":
        for index, (name, kind) in enumerate(types.items()):
            specialised = name.endswith("_stride") and name not in UNSPECIALISED
            if name.endswith("_stride"):
                types[name] = "i32"  # what an int below 2^31 becomes
            if (kind.startswith("*") and name not in UNALIGNED) or specialised or name in DIVISIBLE:
                attributes[(index,)] = [["tt.divisibility", 16]]
            if kind.startswith("*") and backend == "hip":
                attributes.setdefault((index,), []).append(["tt.pointer_range", 32])  # tensors below 2 GB
    constants = {name: value for name, value in variant.options.items() if name in types}
    return ASTSource(fn=variant.kernel, signature=types, constexprs=constants, attrs=attributes)


def compile_one(index: int, target: str, form: str) -> tuple[str, str]:
    """(registers / spilled bytes / shared memory, what must not be or "") of `all_variants()[index]`."""
    variant, backend = all_variants()[index], TARGETS[target][0]
    launch = {"num_warps": variant.options["num_warps"]}
    try:
        kernel = triton.compile(source(variant, form, backend), target=GPUTarget(*TARGETS[target]), options=launch)
        registers, spilled = (resources_of_cubin if backend == "cuda" else resources_of_amdgcn)(kernel.asm)
    except Exception as error:  # of any kind: compilers have many
        return "does not build", f"{type(error).__name__}: {str(error)[-2000:]}"
    shared, problem = kernel.metadata.shared, ""
    if spilled and target == "sm_90":
        problem = f"spills {spilled} bytes"
    elif shared > SHARED_LIMITS[target]:
        problem = f"{shared} bytes of shared memory, of {SHARED_LIMITS[target]}"
    return f"{registers} / {spilled} / {shared}", problem


def resources_of_cubin(asm: Any) -> tuple[int, int]:
    """(registers, bytes of a thread's stack: kernels without arrays of their own have one only to spill)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return number(r"\bREG:(\d+)", usage), number(r"\bSTACK:(\d+)", usage) + number(r"\bLOCAL:(\d+)", usage)


def resources_of_amdgcn(asm: Any) -> tuple[int, int]:
    """(vector registers, bytes of spilled vector registers)."""
    code = asm["amdgcn"]
    return number(r"\.vgpr_count:\s*(\d+)", code), 4 * number(r"\.vgpr_spill_count:\s*(\d+)", code)


def number(pattern: str, text: str) -> int:
    """The number that a pattern finds."""
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern!r} in what the compiler left: {text[:200]!r}")
    return int(found.group(1))


def compile_all(stride: int = 1) -> tuple[str, list[str]]:
    """The table of every configuration on every target, compiled in processes of their own; and what must not be.

    With a stride of n it is of each n-th configuration.

    Raises:
        RuntimeError: where kernels are interpreted (TRITON_INTERPRET=1): there is nothing to compile.
    """
    if interpreting():
        raise RuntimeError("Triton interprets in this process (TRITON_INTERPRET=1), and then it cannot compile")
    variants = all_variants()
    jobs = [(index, *form) for index in range(0, len(variants), stride) for form in FORMS]
    workers = min(len(os.sched_getaffinity(0)), 8)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(compile_one, *zip(*jobs, strict=True)))
    titles = [target if form == "aligned" else f"{target}, {form}" for target, form in FORMS]
    titles = ["dtypes", "flags", *titles, "a row reads and writes"]
    lines, above = [f"Compiled by Triton {triton.__version__} on {datetime.date.today().isoformat()}."], ""
    for index, variant in enumerate(variants[::stride]):
        if heading(variant) != above:
            above = heading(variant)
            lines += ["", above, "", row(titles), row(["---"] * len(titles))]
        figures = [figure for figure, _ in results[index * len(FORMS) :][: len(FORMS)]]
        lines.append(row([*cells(variant), *figures, variant.traffic]))
    problems = [
        f"{heading(variants[index])}, {' | '.join(cells(variants[index]))} ({target}, {form}): {problem}"
        for (index, target, form), (_, problem) in zip(jobs, results, strict=True)
        if problem
    ]
    return "\n".join(lines), problems


def row(entries: Sequence[str]) -> str:
    """One row of a Markdown table."""
    return f"| {' | '.join(entries)} |"


def parts_of_readme() -> tuple[str, str, str]:
    """What stands before the table in README.md, the table, and what comes after it."""
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    written, after = rest.split(END)
    return before, written.strip(), after


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 where there are problems."""
    parser = argparse.ArgumentParser(prog="python -m fastforget_kernels.compiling", description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="write it in README.md, unless there are problems")
    parser.add_argument("--stride", type=int, default=1, help="only each n-th configuration; not with --table")
    chosen = parser.parse_args(arguments)
    if chosen.table and chosen.stride != 1:
        parser.error("--table needs every configuration")
    begin = time.perf_counter()
    table, problems = compile_all(chosen.stride)
    print(table, *problems, sep="\n")
    print(f"{time.perf_counter() - begin:.0f} s", file=sys.stderr)
    if chosen.table and not problems:
        before, _, after = parts_of_readme()
        README.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}", encoding="utf-8")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
