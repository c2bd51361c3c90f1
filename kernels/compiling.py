"""Compile every kernel ahead of time, for GPUs that need not be here, and say what each configuration takes of one.

    python -m fastforget_kernels.compiling                    fail where a kernel does not build, spills or is too large
    python -m fastforget_kernels.compiling --json FILE        and write the figures
    python -m fastforget_kernels.compiling --table            and write the table in README.md

Two forms of a configuration are compiled, as Triton compiles a launch for what it finds in the arguments:

    aligned   pointers, strides and sizes divisible by 16, as in every sweep over a head: its buffers are ours
    general   nothing known of any argument, strides of 64 bits: the most instructions that a launch may need, as for
              logits of a model whose vocabulary is odd. Compiled for one target only, for time

Triton's own cache makes all but the first run quick.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastforget_kernels import cast_weight, coupled_tile, gradient_tile, label_tile, paired_tile, state_rows
from fastforget_kernels.launching import UNALIGNED, UNSPECIALISED, Variant, interpreting

TARGETS = {  # the arguments of GPUTarget
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHARED_LIMITS = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}  # of a program
FORMS = {"sm_80": ("aligned",), "sm_90": ("aligned", "general"), "sm_100": ("aligned",), "gfx942": ("aligned",)}
DIVISIBLE = {"first", "padded"}  # and every stride that is specialised
MODULES = (label_tile, paired_tile, coupled_tile, gradient_tile, state_rows, cast_weight)

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- table: written by python -m fastforget_kernels.compiling --table -->", "<!-- end of table -->"


@dataclass
class Compiled:
    """What one configuration takes on one target; `error` where it does not build."""

    name: str
    target: str
    form: str
    registers: int = 0  # of a thread
    spill_stores: int = 0  # bytes of a thread
    spill_loads: int = 0
    shared: int = 0  # bytes of a program
    binary: str = ""
    seconds: float = 0.0
    error: str = ""


def all_variants() -> list[Variant]:
    """Every configuration that any launcher can choose, those of one kernel and its sizes together."""
    found = [variant for module in MODULES for variant in module.variants()]
    headings = list(dict.fromkeys(map(heading, found)))
    return sorted(found, key=lambda variant: headings.index(heading(variant)))


def describe(variant: Variant) -> str:
    """A configuration's name: kernel, dtypes (what it reads first -> what it writes), flags that are set, and sizes."""
    return f"{variant.kernel.__name__} | {dtypes(variant)} | {options(variant)}"


def dtypes(variant: Variant) -> str:
    """The dtypes that tell one configuration from another."""
    types = [kind[1:] for kind in variant.types().values() if kind.startswith("*")]
    written = variant.types().get("out")
    return types[0] if written is None else f"{types[0]} → {written[1:]}"


def options(variant: Variant) -> str:
    """Flags that are set, and the kind."""
    flags = [name for name, value in variant.constants.items() if value is True]
    if "KIND" in variant.constants:
        flags.insert(0, coupled_tile.KINDS[variant.constants["KIND"]])
    return ", ".join(flags) or "–"


def heading(variant: Variant) -> str:
    """Kernel, block sizes and warps: what stands above a part of the table."""
    numbers = {name: value for name, value in variant.constants.items() if type(value) is int and name != "KIND"}
    sizes = ", ".join([*(f"{name} {value}" for name, value in numbers.items()), f"{variant.num_warps} warps"])
    return f"**`{variant.kernel.__name__}`**: {sizes}"


def source(variant: Variant, form: str, backend: str) -> ASTSource:
    """What Triton compiles, in one of the two forms."""
    types, constants = variant.types(), dict(variant.constants)
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
    return ASTSource(fn=variant.kernel, signature=types, constexprs=constants, attrs=attributes)


def compile_one(index: int, target: str, form: str) -> Compiled:
    """Compile `all_variants()[index]`."""
    variant = all_variants()[index]
    found = Compiled(describe(variant), target, form)
    launch = {"num_warps": variant.num_warps}
    begin = time.perf_counter()
    try:
        backend = TARGETS[target][0]
        kernel = triton.compile(source(variant, form, backend), target=GPUTarget(*TARGETS[target]), options=launch)
        found.binary = list(kernel.asm)[-1]
        found.shared = kernel.metadata.shared
        measure = resources_of_cubin if backend == "cuda" else resources_of_amdgcn
        found.registers, found.spill_stores, found.spill_loads = measure(kernel.asm)
    except Exception as error:  # of any kind: compilers have many
        found.error = f"{type(error).__name__}: {str(error)[-2000:]}"
    found.seconds = time.perf_counter() - begin
    return found


def resources_of_cubin(asm: Any) -> tuple[int, int, int]:
    """(registers, bytes of spill stores, of spill loads), as ptxas counts them: each instruction once."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(asm["cubin"])
        usage = cuobjdump("--dump-resource-usage", str(cubin))
        registers, stack, local = (int(number(rf"\b{word}:(\d+)", usage)) for word in ("REG", "STACK", "LOCAL"))
        if stack == 0 and local == 0:
            return registers, 0, 0
        code = cuobjdump("--dump-sass", str(cubin))
    stores, loads = (sum(map(access_bytes, re.findall(rf"\b{name}([.\w]*) ", code))) for name in ("STL", "LDL"))
    return registers, stores, loads


def access_bytes(suffix: str) -> int:
    """The width of an STL or LDL instruction: 4 unless its suffix says otherwise."""
    return {"8": 1, "16": 2, "64": 8, "128": 16}.get(number(r"[US]?(8|16|64|128)\b", suffix, "32"), 4)


def cuobjdump(*arguments: str) -> str:
    """The output of the cuobjdump that Triton brings."""
    command = [triton.knobs.nvidia.cuobjdump.path, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def resources_of_amdgcn(asm: Any) -> tuple[int, int, int]:
    """(vector registers, bytes of spilled vector registers, the same)."""
    code = asm["amdgcn"]
    spilled = 4 * int(number(r"\.vgpr_spill_count:\s*(\d+)", code))
    return int(number(r"\.vgpr_count:\s*(\d+)", code)), spilled, spilled


def number(pattern: str, text: str, otherwise: str | None = None) -> str:
    """The digits that a pattern finds."""
    found = re.search(pattern, text)
    if found is None and otherwise is None:
        raise ValueError(f"no {pattern!r} in what the compiler left: {text[:200]!r}")
    return str(otherwise) if found is None else found.group(1)


def compile_all(targets: Iterable[str] = TARGETS, workers: int | None = None) -> list[Compiled]:
    """Compile every configuration, in processes of their own; in the order of `all_variants`, by target and form.

    Raises:
        RuntimeError: where kernels are interpreted (TRITON_INTERPRET=1): there is nothing to compile.
    """
    if interpreting():
        raise RuntimeError("Triton interprets in this process (TRITON_INTERPRET=1), and then it cannot compile")
    jobs = [
        (index, target, form) for index in range(len(all_variants())) for target in targets for form in FORMS[target]
    ]
    workers = workers or min(len(os.sched_getaffinity(0)), 8)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(compile_one, *zip(*jobs, strict=True)))


def problems(results: Iterable[Compiled]) -> list[str]:
    """What must not be: kernels that do not build, spill on sm_90, or need more shared memory than there is."""
    found = []
    for result in results:
        name = f"{result.name} ({result.target}, {result.form})"
        if result.error:
            found.append(f"{name}: {result.error}")
        elif result.target == "sm_90" and (result.spill_stores or result.spill_loads):
            found.append(f"{name}: spills {result.spill_stores} bytes, reads {result.spill_loads}")
        elif result.shared > SHARED_LIMITS[result.target]:
            found.append(f"{name}: {result.shared} bytes of shared memory, of {SHARED_LIMITS[result.target]}")
    return found


def table(variants: Sequence[Variant], results: Iterable[Compiled]) -> str:
    """The table in README.md, one part a kernel (and its sizes)."""
    by_name = {(result.name, result.target, result.form): result for result in results}
    columns = [(target, form) for target in TARGETS for form in FORMS[target]]
    lines = [f"Compiled by Triton {triton.__version__} on {datetime.date.today().isoformat()}."]
    above = ""
    for variant in variants:
        if heading(variant) != above:
            above = heading(variant)
            titles = [target if form == "aligned" else f"{target}, {form}" for target, form in columns]
            cells = ["dtypes", "flags", *titles, "a row reads and writes"]
            lines += ["", above, "", row(cells), row(["---"] * len(cells))]
        figures = [by_name[describe(variant), target, form] for target, form in columns]
        lines.append(row([dtypes(variant), options(variant), *map(figure, figures), variant.traffic]))
    return "\n".join(lines)


def figure(result: Compiled) -> str:
    """registers / spilled bytes / shared memory."""
    return f"{result.registers} / {result.spill_stores} / {result.shared}" if not result.error else "does not build"


def row(cells: Iterable[str]) -> str:
    """One row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def written_table() -> str:
    """What stands between the markers in README.md."""
    return README.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip()


def write_table(text: str) -> None:
    """Put a table between the markers in README.md."""
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    README.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


def main(arguments: Collection[str] | None = None) -> int:
    """The command line; 1 where there are problems."""
    parser = argparse.ArgumentParser(prog="python -m fastforget_kernels.compiling", description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="TARGET")
    parser.add_argument("--workers", type=int, help="processes (as many as there are processors)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--table", action="store_true", help="write the table in README.md (all targets)")
    chosen = parser.parse_args(arguments)
    if chosen.table and set(chosen.targets) != set(TARGETS):
        parser.error("the table needs every target")
    begin = time.perf_counter()
    variants = all_variants()
    results = compile_all(chosen.targets, chosen.workers)
    if chosen.json:
        figures = {"triton": triton.__version__, "variants": len(variants), "results": results}
        chosen.json.write_text(json.dumps(figures, default=dataclasses.asdict, indent=1))
    if chosen.table:
        write_table(table(variants, results))
    found = problems(results)
    spilling = [result for result in results if result.spill_stores]
    print(f"{len(variants)} configurations, {len(results)} binaries, {time.perf_counter() - begin:.0f} s")
    for result in [*spilling, *sorted(results, key=lambda result: -result.seconds)[:3]]:
        print(f"  {result.target} {result.form}: {result.name}: {figure(result)}, {result.seconds:.1f} s")
    print(*found, sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
