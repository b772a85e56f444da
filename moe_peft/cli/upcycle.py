"""`moe-peft upcycle`: several experts that start from one trained LoRA."""

from __future__ import annotations

from ..files import check_free
from ..tools.upcycle import upcycle
from .from_loras import load_base, parser_of, router_config, write


def run(argv: list[str]) -> int:
    """Write a routed adapter whose experts start from one LoRA.

    Args:
        argv: The words after the verb: a LoRA and flags.

    Raises:
        ValueError: The LoRA is none, or does not fit the base model or the flags; nothing has been written.
    """
    parser = parser_of("upcycle", "Make several experts of one LoRA, to train them further. The router is new.")
    parser.add_argument("lora", help="folder of a LoRA, or its name on the Hub")
    parser.add_argument("--num_experts", type=int, required=True, help="experts to make of it")
    parser.add_argument("--rho", type=float, default=0.0, help="share of the rows drawn again; default: 0")
    parser.add_argument("--split", action="store_true", help="give each expert a part of the rank")
    parser.add_argument("--seed", type=int, default=0, help="of the rows that are drawn")
    given = parser.parse_args(argv)
    check_free(given.output)
    base, config = load_base(given, given.lora), router_config(given, given.num_experts)
    settings = {"rho": given.rho, "split": given.split, "seed": given.seed}
    write(upcycle(base, given.lora, given.num_experts, config, **settings), given.output)
    return 0
