"""Mistakes planted in kernels: the emulation or a sanitizer finds each, and finds none in kernels that are right."""

from __future__ import annotations

import re

import pytest

from tests.emulation.compile import OVERRUN, RACE, build, compiled, run

ORDERS = (0, 1, 3)

RAISED = {
    "misaligned_global": r"misaligned address 0x[0-9a-f]+ of a vector of 16 bytes",
    "misaligned_shared": r"misaligned address 0x[0-9a-f]+ of a vector of 16 bytes",
    "divergent_barriers": r"divergent barriers: __syncthreads at planted.cu:\d+, while others wait at planted.cu:\d+",
    "barrier_after_return": r"__syncthreads at planted.cu:\d+ waits, but 1 threads of block \(0, 0, 0\) have returned",
    "mask_names_returned_lane": "the mask 0xFFFFFFFF of __ballot_sync at .* names lane 6 of warp 2, which has returned",
    "lane_outside_its_mask": "__syncwarp at .*: the calling lane is not in its mask, thread",
    "lanes_in_different_calls": "lanes of one warp meet in different calls: __shfl_xor_sync at .*, others in",
    "shuffle_from_outside_mask": "a shuffle of lane 0 reads lane 16, which is not in the mask",
    "deadlock": r"deadlock in block \(0, 0, 0\), every thread waits: 0-15 in __syncwarp at planted.cu:\d+; "
    r"16-127 in __syncthreads at planted.cu:\d+;",
    "too_much_static_shared": "SHARED variables of 49168 bytes, more than 49152",
    "trapped": r"__trap\(\) at planted.cu:\d+, thread \(3, 0, 0\) of block \(0, 0, 0\)",
    "empty_grid": r"launch: the grid is empty: grid \(0, 1, 1\), block \(32, 1, 1\), 0 bytes of shared memory",
    "grid_too_large": r"within \(2147483647, 65535, 65535\): grid \(1, 70000, 1\)",
    "block_too_large": r"1 to 1024 threads, .*: grid \(4, 1, 1\), block \(1056, 1, 1\)",
    "too_much_dynamic_shared": "at most 232448 bytes of shared memory: .* 300000 bytes of shared memory",
}
"""What the launch of each raises, in every order and every build."""

WRONG = {
    "read_before_write": ORDERS,
    "write_before_read": ORDERS,
    "uninitialised_shared": ORDERS,
    "sum_memory_reused": (1, 3),  # in order, nothing shows
    "copy_not_waited_for": ORDERS,
    "copy_waited_for_too_little": ORDERS,
    "copy_not_shared": ORDERS,
    "blocks_in_order": (1, 3),
}
"""Orders of threads in which the result is wrong, without any sanitizer."""

RACES = {
    "read_before_write": "reverse_kernel",
    "write_before_read": "reverse_kernel",
    "sum_memory_reused": "block_sum",
    "missing_syncwarp": "neighbour_kernel",  # a shuffle hides it from every order
    "copy_not_shared": "copy_kernel",
    "blocks_in_order": "block_kernel",
    "blocks_add_to_one_sum": "block_kernel",  # right in every order, since blocks run one after another
}
"""Function whose race ThreadSanitizer reports, in every order."""

OVERRUNS = {
    "global_read_past_end": "reverse_kernel",
    "global_write_past_end": "reverse_kernel",
    "dynamic_shared_past_end": "reverse_kernel",
    "static_shared_past_end": "variance_kernel",
    "copy_read_past_end": "copy_kernel",
}
"""Function whose overrun AddressSanitizer reports."""

BUILDS = pytest.mark.parametrize("sanitize", [None, *build.SANITIZERS], ids=lambda name: name or "plain")


@BUILDS
def test_kernels_that_are_right_stay_so_in_every_order(sanitize: str | None) -> None:
    program = compiled("planted.cu", sanitize=sanitize)
    for order in (*ORDERS, 4, 7):
        code, output = run(program, "none", order)
        assert (code, output) == (0, "right\nconflicts 0\nafterwards right\n"), output


@pytest.mark.slow
def test_fibers_by_ucontext_do_the_same() -> None:
    """As on a processor other than x86-64."""
    program = compiled("planted.cu", flags=("-DEMU_UCONTEXT",))
    for order in ORDERS:
        assert run(program, "none", order) == (0, "right\nconflicts 0\nafterwards right\n")
    assert run(program, "deadlock", 0)[1].endswith("afterwards right\n")


@pytest.mark.parametrize("mistake", RAISED)
def test_a_mistake_that_the_launch_reports(mistake: str) -> None:
    for sanitize, order in [*((None, order) for order in ORDERS), ("address", 0), ("thread", 3)]:
        code, output = run(compiled("planted.cu", sanitize=sanitize), mistake, order)
        assert code == 0, output
        assert re.search(RAISED[mistake], output), output
        assert output.endswith("afterwards right\n"), output  # an error leaves nothing behind


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_that_makes_the_result_wrong(mistake: str) -> None:
    program = compiled("planted.cu")
    for order in ORDERS:
        expected = "wrong" if order in WRONG[mistake] else "right"
        assert run(program, mistake, order) == (0, f"{expected}\nconflicts 0\nafterwards right\n"), order


@pytest.mark.parametrize("mistake", RACES)
def test_a_mistake_that_is_a_race(mistake: str) -> None:
    program = compiled("planted.cu", sanitize="thread")
    for order in ORDERS:
        code, output = run(program, mistake, order)
        assert code == RACE, output
        assert "ThreadSanitizer: data race" in output
        assert re.search(rf" {RACES[mistake]}[(<]", output), output


@pytest.mark.parametrize("mistake", OVERRUNS)
def test_a_mistake_that_leaves_its_memory(mistake: str) -> None:
    code, output = run(compiled("planted.cu", sanitize="address"), mistake, 0)
    assert code == OVERRUN, output
    assert "AddressSanitizer: heap-buffer-overflow" in output
    assert f"in {OVERRUNS[mistake]}" in output, output


def test_a_pointer_that_is_not_aligned_for_its_type() -> None:
    code, output = run(compiled("planted.cu", sanitize="address"), "misaligned_pointer", 0)
    assert code == OVERRUN, output
    assert "misaligned address" in output
    assert "in vector_kernel" in output


def test_bank_conflicts_of_ldmatrix_are_counted() -> None:
    program = compiled("planted.cu")
    # 8 chunks, 4 tiles each, of 8 rows that begin at the same bank: 7 phases more than one
    assert run(program, "unswizzled_tile", 0) == (0, f"right\nconflicts {8 * 4 * 7}\nafterwards right\n")
