"""Checks the machine code of the kernels in a built libktjax_core.a.

Usage: check_objects.py path/to/libktjax_core.a

* Object files with ISA flags define no weak symbol: the linker may keep one copy of a
  weak function for the whole program, and a copy with AVX-512 in it ends the process on
  a CPU without.
* The inner loops of the AMX kernels have at least 0.6 tile products per tile load, and
  those with four products, where wide panels spend their time, at most 6 instructions
  per product that are not about tiles. Left out: single tiles, which have two operands
  to load for a product, loops that fetch more than one cache line per depth pair, as
  they do for few rows, where memory is the limit, and loops over operands that nobody
  has read before: these fetch every line to L1 ahead of its tile, which on a Xeon with
  AMX saves more than the instructions cost (docs/performance.md).
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ISA_NAMES = ("avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx_bf16")
ISA_OBJECTS = [f"{name}.cc.o" for name in ISA_NAMES]
PRODUCTS = {"tdpbf16ps", "tdpbsud"}
PRODUCTS_PER_LOAD = 0.6
OTHERS_PER_PRODUCT = 6
PREFETCHES_OF_ONE_LINE = 16  # in a step of 32 depths


def run(*command: str, cwd: Path | None = None) -> str:
    """The standard output of a command that must succeed."""
    return subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=cwd
    ).stdout


def weak_symbols(path: Path) -> list[str]:
    """The weak and unique symbols that an object file defines."""
    symbols = run("nm", "-C", "--defined-only", str(path)).splitlines()
    return [line for line in symbols if re.match(r"[0-9a-f]* [WVu] ", line)]


def loops(path: Path) -> list[tuple[str, list[str]]]:
    """Each innermost loop with tile products: its function and its instructions."""
    found = []
    function = ""
    lines: list[tuple[int, str]] = []
    for line in run("objdump", "-dC", "--no-show-raw-insn", str(path)).splitlines():
        header = re.match(r"[0-9a-f]+ <(.*)>:$", line)
        if header:
            function, lines = header.group(1), []
            continue
        match = re.match(r"\s*([0-9a-f]+):\s+(\w+)\s*([0-9a-f]*)", line)
        if not match:
            continue
        address, name, target = match.groups()
        lines.append((int(address, 16), name))
        if name.startswith("j") and target and int(target, 16) < int(address, 16):
            body = [name for at, name in lines if at >= int(target, 16)]
            if PRODUCTS.intersection(body):
                found.append((function, body))
                lines = []  # an outer loop counts for itself
    return found


def check_loop(function: str, body: list[str]) -> list[str]:
    """What is wrong with an inner loop."""
    products = sum(body.count(name) for name in PRODUCTS)
    loads = body.count("tileloadd")
    others = len(body) - products - loads
    faults = []
    if products > 1 and products < PRODUCTS_PER_LOAD * loads:
        faults.append(f"{function}: {products} products for {loads} tile loads")
    one_line = body.count("prefetcht1") <= PREFETCHES_OF_ONE_LINE
    steady = one_line and "prefetcht0" not in body
    if products == 4 and steady and others > OTHERS_PER_PRODUCT * products:
        faults.append(f"{function}: {others} others for {products} products")
    return faults


def main() -> int:
    """Prints what is wrong, or the number of loops; 0 when nothing is."""
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    archive = Path(sys.argv[1]).resolve()
    faults = []
    with tempfile.TemporaryDirectory() as folder:
        run("ar", "x", str(archive), *ISA_OBJECTS, cwd=Path(folder))
        for name in ISA_OBJECTS:
            for symbol in weak_symbols(Path(folder, name)):
                faults.append(f"{name}: weak symbol {symbol}")
        inner = loops(Path(folder, "amx_bf16.cc.o"))
        for function, body in inner:
            faults += check_loop(function, body)
    for name in PRODUCTS:
        if not any(name in body for _, body in inner):
            faults.append(f"amx_bf16.cc.o: no loop with {name}")
    for fault in faults:
        print(fault)
    print(f"{len(ISA_OBJECTS)} objects, {len(inner)} tile loops, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
