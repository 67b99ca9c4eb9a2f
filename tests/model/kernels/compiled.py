"""Compiles the output head's kernels for GPUs, without one, and prints what became of each as a JSON line.

`test_compiled.py` runs this in a process of its own, since the interpreter's environment would spoil it. Each form is compiled as a
launch specialises it: pointers and row strides that are multiples of 16, and the number of real ids as it is.
"""

from __future__ import annotations

import glob
import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_salt.model.kernels import triton_passes as head

ARCHITECTURES = (80, 90, 100)
POINTERS = {"label_column": "*i64", "sums": "*fp32", "at_label": "*fp32", "shift": "*fp32", "teacher_largest": "*fp32",
            "teacher_factor": "*fp32", "threshold": "*fp32", "count": "*fp32"}  # fmt: skip
NOT_ALIGNED = ("num_columns", "num_rows", "inverse_temperature")


def forms() -> list[tuple[object, str, str, dict[str, object]]]:
    """(kernel, type of the student's logits, of the teacher's, its constants) of every form that the head launches."""
    rows = [
        (head.row_sums_kernel, student, "*fp32", {"HAS_TEACHER": teacher, "TEMPERED": tempered, "WITH_GAP": False})
        for student in ("*bf16", "*fp32") for teacher, tempered in ((True, True), (True, False), (False, False))
    ]  # fmt: skip
    rows += [(head.row_sums_kernel, student, "*fp32", {"HAS_TEACHER": True, "TEMPERED": tempered, "WITH_GAP": True})
             for student in ("*bf16", "*fp32") for tempered in (True, False)]  # fmt: skip
    rows.append((head.row_sums_kernel, "*fp32", "*fp32", {"HAS_TEACHER": False, "TEMPERED": False, "WITH_GAP": True}))
    rows += [(head.into_gradient_kernel, student, "*fp32", {"HAS_TEACHER": teacher})
             for student in ("*bf16", "*fp32") for teacher in (True, False)]  # fmt: skip
    return [*rows, (head.count_above_kernel, "*fp32", "*fp32", {})]


def signature(kernel: object, student: str, teacher: str, constants: dict[str, object]) -> dict[str, str]:
    """The type of each argument, by name."""
    types = {"student": student, "logits": student, "teacher": teacher, "inverse_temperature": "fp32"} | POINTERS
    return {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}  # type: ignore[attr-defined]


def assemblers() -> list[str]:
    """Triton's own ptxas programs, the newest first."""
    return sorted(glob.glob(str(Path(triton.__file__).parent / "backends/nvidia/bin/ptxas*")), reverse=True)


def assemble(ptx: str) -> str:
    """What ptxas -v says of it; the last program's words where none takes it."""
    target = re.search(r"\.target (sm_\w+)", ptx)
    assert target
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        for program in assemblers():
            done = subprocess.run(
                [program, "-v", "-arch", target[1], file.name, "-o", "/dev/null"], capture_output=True, text=True
            )
            if done.returncode == 0:
                break
    return done.stderr


def offsets(ttir: str) -> str:
    """The lines that multiply by something that comes from a stride."""
    strides = re.findall(r"(%\w+) = arith\.extsi %\w*stride\w* ", ttir) + re.findall(r"(%\w*stride): i32", ttir)
    lines = [line for line in ttir.splitlines() if "arith.muli" in line]
    return "\n".join(
        line for line in lines if any(re.search(rf"{re.escape(name)}\b", line.partition("=")[2]) for name in strides)
    )


def main() -> None:
    for architecture in ARCHITECTURES:
        for kernel, student, teacher, constants in forms():
            constants = constants | {"BLOCK": head.BLOCK}
            types = signature(kernel, student, teacher, constants)
            aligned = {(number,): [["tt.divisibility", 16]] for number, (name, kind) in enumerate(types.items())
                       if kind != "constexpr" and name not in NOT_ALIGNED}  # fmt: skip
            source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
            options = {"num_warps": head.WARPS, "enable_fp_fusion": False}
            code = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
            told = assemble(code.asm["ptx"])
            print(json.dumps({
                "kernel": kernel.__name__, "architecture": architecture, "student": student, "constants": constants,
                "registers": [int(number) for number in re.findall(r"Used (\d+) registers", told)],
                "spilled": [int(number) for number in re.findall(r"(\d+) bytes spill stores", told)],
                "wide_loads": len(re.findall(r"ld\.global\S*\.v4", code.asm["ptx"])),
                "wide_stores": len(re.findall(r"st\.global\S*\.v4", code.asm["ptx"])),
                "multiplies_and_adds": len(re.findall(r"\bfma\.rn\.f32", code.asm["ptx"])),
                "row_offsets": re.findall(r"arith\.muli %\w+, %\w+ : (i32|i64) loc", offsets(code.asm["ttir"])),
            }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
