"""Random programs of operations, run and made as short as they can be while they break the same law."""

from __future__ import annotations

import random
import shutil
import traceback
import warnings
from collections.abc import Mapping
from typing import NamedTuple

from .doors import DOORS
from .laws import BrokenLawError
from .life import Life
from .operations import OPERATIONS
from .worlds import WORLDS

Step = tuple[str, int]


class Program(NamedTuple):
    """Operations by name, each with the number that its choices are drawn from."""

    world: str
    door: str
    steps: tuple[Step, ...]


class Failure(NamedTuple):
    """A law that a program breaks.

    Attributes:
        law: The law, or the type and the place of an exception that none allows.
        text: The program that was run, line by line, and what happened.
    """

    law: str
    text: str


def draw_program(seed: int, operations: Mapping | None = None) -> Program:
    """The program of a seed."""
    rng = random.Random(seed)
    operations = operations or OPERATIONS
    names, weights = list(operations), [weight for weight, _ in operations.values()]
    chosen = ["add", *rng.choices(names, weights, k=rng.randint(2, 8))]
    door = rng.choice(("peft", "peft", *DOORS))
    return Program(rng.choice(list(WORLDS)), door, tuple((name, rng.randrange(10**6)) for name in chosen))


def run(program: Program, operations: Mapping | None = None) -> Failure | None:
    """Run a program, with the laws checked after each operation."""
    life = Life(program.world, program.door)
    operations = operations or OPERATIONS
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, seed in program.steps:
                operations[name][1](life, random.Random(seed))
                life.check(random.Random(seed + 1))
    except BrokenLawError as error:
        return Failure(error.law, _text(program, life, str(error)))
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        law = f"only clear errors: {type(error).__name__} in {place.filename.rsplit('/', 1)[-1]}:{place.name}"
        return Failure(law, _text(program, life, "".join(traceback.format_exception(error)[-6:])))
    finally:
        shutil.rmtree(life.folder, ignore_errors=True)
    return None


def shrink(program: Program, failure: Failure, operations: Mapping | None = None) -> tuple[Program, Failure]:
    """Leave out operations for as long as the same law breaks."""
    shorter = True
    while shorter:
        shorter = False
        for place in reversed(range(len(program.steps))):
            candidate = program._replace(steps=program.steps[:place] + program.steps[place + 1 :])
            found = run(candidate, operations)
            if found is not None and found.law == failure.law:
                program, failure, shorter = candidate, found, True
    return program, failure


def _text(program: Program, life: Life, what: str) -> str:
    lines = [f"model: {program.world}, through {program.door}", *life.log, f"-> {what}", f"{program!r}"]
    return "\n".join(line for line in lines if line)
