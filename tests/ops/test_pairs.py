"""As few choices as can be make a number of pairs."""

from __future__ import annotations

from moe_peft.ops import divisor_below_root


def test_no_other_pair_of_divisors_has_a_smaller_sum():
    for number in range(1, 200):
        first = divisor_below_root(number)
        sums = [n + number // n for n in range(1, number + 1) if number % n == 0]
        assert number % first == 0 and first + number // first == min(sums) and first * first <= number
