"""Instructions under qemu: the plugin on a program whose count is known to the instruction; the gate."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from bluelm.errors import UnavailableError
from eval.history import History, KeptRun
from eval.speed.emulated import compare, figures, gate
from targets.emulator import count as qemu_count
from targets.emulator.count import Counts, run_counted
from tests.packages import requires

LOOPS = 100_000


def arm64_program(loops: int) -> bytes:
    """A static arm64 ELF, assembled here: mark 1, `loops` times two instructions, mark 2, exit(0).

    mark k: mov x0, #-(1000 + k); mov x8, #57 (close); svc #0   = 3 instructions
    """

    def mark(number: int) -> list[int]:
        inverted = 1000 + number - 1  # movn x0, #imm sets ~imm = -(imm + 1)
        return [0x92800000 | inverted << 5, 0xD2800000 | 57 << 5 | 8, 0xD4000001]

    code = [
        *mark(1),
        0xD2800000 | (loops & 0xFFFF) << 5 | 1,  # movz x1, #low
        0xF2A00000 | (loops >> 16) << 5 | 1,  # movk x1, #high, lsl #16
        0xF1000421,  # loop: subs x1, x1, #1
        0x54FFFFE1,  # b.ne loop
        *mark(2),
        0xD2800000,  # movz x0, #0
        0xD2800000 | 93 << 5 | 8,  # movz x8, #93 (exit)
        0xD4000001,  # svc #0
    ]
    body = b"".join(struct.pack("<I", word) for word in code)
    start, header = 0x400000, 64 + 56
    size = header + len(body)
    identity = b"\x7fELF\x02\x01\x01" + bytes(9)
    elf = identity + struct.pack("<HHIQQQIHHHHHH", 2, 183, 1, start + header, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, start, start, size, size, 0x1000)
    return elf + segment + body


@requires("qemu-user", "gcc", "libc6-dev")
@pytest.mark.parametrize("loops", [1, 1000, LOOPS])
def test_the_count_is_exact(tmp_path: Path, loops: int):
    program = tmp_path / "program"
    program.write_bytes(arm64_program(loops))
    program.chmod(0o755)
    marks = run_counted([str(program)], tmp_path)
    assert marks[1] == 3  # a block's instructions count when it begins; svc ends one
    assert marks[2] - marks[1] == 2 + 2 * loops + 3
    assert marks[0] - marks[2] == 3


@requires("qemu-user", "gcc", "libc6-dev")
def test_a_program_that_fails_gives_no_count(tmp_path: Path):
    with pytest.raises(UnavailableError, match="failed under qemu"):
        run_counted([str(tmp_path / "none")], tmp_path)


def test_no_qemu_and_no_compiler_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(qemu_count, "qemu_version", lambda: (7, 2, 0))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(UnavailableError, match="apt-get install gcc"):
        qemu_count.build_plugin(tmp_path)
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match="apt-get install qemu-user") as raised:
        qemu_count.qemu_version()
    assert raised.value.exit_code == 5


def counts(decode: float, tools: str = "qemu 7.2.22") -> Counts:
    return Counts(prefill=3e6, decode=decode, depth=128, tools=tools, relative_error=0)


def test_the_gate_compares_with_the_last_accepted_run(tmp_path):
    history = History(tmp_path / "h.sqlite")

    def run(decode: float, tools: str = "qemu 7.2.22") -> tuple[str, bool]:
        compared, passed = gate("demo", "arm64", counts(decode, tools), history)
        return str(compared[1]), passed

    said, passed = run(42e6)
    assert passed and "the first" in said
    assert run(42.1e6)[1]  # +0.24 %
    said, passed = run(42.6e6)  # +1.2 % over the last
    assert not passed and "+1.19%" in said and "0.50%" in said
    assert not run(42.6e6)[1]  # a failed run does not become the measure of the next
    assert run(30e6)[1]
    assert not run(42e6)[1]  # and what was gained is kept
    said, passed = run(50e6, "qemu 9.0.0")
    assert passed and "nothing to compare with" in said
    assert [r.accepted for r in history.runs()] == [True, True, False, False, True, False, True]


def test_both_counts_are_gated_and_say_what_they_are():
    accepted = KeptRun("x", "t", True, tuple(figures(counts(42e6))))
    worse = figures(Counts(3.1e6, 42e6, 128, "qemu 7.2.22", 0))
    assert [c.passed for c in compare(worse, accepted, 0.005)] == [False, True]
    for figure in worse:
        assert (figure.how, figure.unit, figure.subject) == ("emulated", "instructions/token", "cpu")
    assert "-50.00%" in str(compare(figures(counts(21e6)), accepted, 0.005)[1])
