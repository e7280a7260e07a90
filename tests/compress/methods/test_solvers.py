"""What round to nearest, GPTQ and AWQ answer the engine: statistics, targets, codes, and what solving costs."""

from __future__ import annotations

import torch

from compress.methods import awq, gptq, rtn
from compress.methods.descent import SYSTEM_BYTES
from compress.methods.gptq import COLUMN_SECONDS, GptqOptions, Moments, corrected
from compress.methods.grid import choose_grid
from compress.methods.protocol import ROWS, Options, SolvingCost, Statistics
from compress.widths.width import Widths

GROUPS, ROW = Widths(4, 16, True), Widths(8, -1, True)
WEIGHT = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
INPUTS = torch.randn(100, 32, generator=torch.Generator().manual_seed(1))
HESSIAN = INPUTS.T @ INPUTS / 100


def test_round_to_nearest_reads_and_costs_nothing() -> None:
    assert rtn.METHOD.statistics(Options()) == Statistics()
    assert rtn.METHOD.cost(4096, 64, GROUPS, Options()) == SolvingCost()
    solver = rtn.METHOD.solver(HESSIAN, Options())
    assert dict(solver.note) == {} and solver.target(WEIGHT, None) is WEIGHT
    for search in (False, True):
        wanted = choose_grid(WEIGHT, 4, 16, True, search=search, hessian=HESSIAN).nearest(WEIGHT)
        found = solver.codes(WEIGHT, GROUPS, search)
        assert torch.equal(found.codes, wanted.codes) and torch.equal(found.scales, wanted.scales)


def test_gptq_reads_the_float_stream_to_correct_by_it() -> None:
    assert gptq.METHOD.statistics(GptqOptions()) == Statistics(inputs=True, float_stream=True)
    assert gptq.METHOD.statistics(GptqOptions(correction=0)) == Statistics(inputs=True)
    solver = gptq.METHOD.solver(HESSIAN, GptqOptions(correction=0.25))
    cross = torch.randn(6, 100, generator=torch.Generator().manual_seed(2)) @ INPUTS / 100
    wanted = corrected(WEIGHT, Moments(HESSIAN, cross), solver.feedback, 0.25)
    assert torch.equal(solver.target(WEIGHT, cross), wanted) and not torch.equal(wanted, WEIGHT)
    assert solver.target(WEIGHT, None) is WEIGHT
    assert set(solver.note) == {"damping", "factorizations", "dead_inputs"} and solver.note["factorizations"] == 1


def test_gptq_sweeps_below_8_bits_alone() -> None:
    assert [GptqOptions(sweeps=3).sweeps_at(bits) for bits in (4, 7, 8)] == [3, 3, 0]


def test_what_gptq_costs() -> None:
    """Two losses and the errors moved on are 5 products of a row with the Hessian; a sweep is 4 more."""
    out, columns = 4 * ROWS + 1, 64
    found = gptq.METHOD.cost(out, columns, GROUPS, GptqOptions(sweeps=3))
    assert found == SolvingCost(
        operations=17 * out * 4096,
        factorization_operations=262144 / 3,
        loop_seconds=5 * 64 * 4 * COLUMN_SECONDS,
        system_bytes=3 * min(SYSTEM_BYTES, 4 * ROWS * 16),
    )
    assert gptq.METHOD.cost(out, columns, Widths(4, -1, True), GptqOptions(sweeps=3)).system_bytes == 12 * ROWS
    whole = gptq.METHOD.cost(out, columns, ROW, GptqOptions(sweeps=3))
    assert (whole.operations, whole.system_bytes) == (5 * out * 4096, 0)
    assert gptq.METHOD.cost(out, 2**15, GROUPS, GptqOptions()).system_bytes == 3 * SYSTEM_BYTES


def test_what_awq_asks_and_costs() -> None:
    assert awq.METHOD.statistics(Options()) == Statistics(inputs=True, float_block=True)
    found = awq.METHOD.cost(10, 64, GROUPS, Options())
    assert found == SolvingCost(operations=4 * 10 * 4096, factorization_operations=262144 / 3)


def test_the_search_of_exponents_begins_with_fifths() -> None:
    assert torch.allclose(torch.tensor(awq.EXPONENTS), torch.linspace(0, 1, 6))


def test_rows_that_the_search_looks_at_are_spread_over_all() -> None:
    weight = torch.arange(3.0 * awq.ROWS).unsqueeze(1).expand(-1, 8)
    assert awq._spread(weight)[:, 0].tolist() == [3.0 * row for row in range(awq.ROWS)]
    assert awq._spread(weight[: awq.ROWS]).shape == (awq.ROWS, 8)


def test_no_span_is_searched_at_8_bits() -> None:
    """So a linear that is clipped and one that is not are the same, and what is asked first stays."""
    tried: list[torch.Tensor] = []

    def judge(weights: list[torch.Tensor]) -> float:
        tried.append(weights[0].clone())
        return 0.0

    for bits, same in ((8, True), (4, False)):
        tried.clear()
        widths = Widths(bits, 16, True)
        assert awq.search_clips([WEIGHT], HESSIAN, torch.ones(32), [widths], judge) == [True]  # type: ignore[arg-type]
        assert torch.equal(*tried) == same
