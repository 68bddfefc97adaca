"""``moe-scale <tool>``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from moe_scale.telemetry.quiet import quiet

TAKE_A_RECIPE = ("compare", "bench-checkpoint", "doctor", "launch", "plan", "prune", "sweep")
"""Tools that hand what they do not know to the recipe that they are given."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tool that the command line names."""
    quiet()
    from moe_scale.telemetry.terminal import leaving_with_the_reader
    from moe_scale.tools import (
        bench,
        bench_checkpoint,
        compare,
        doctor,
        experts,
        export,
        generate,
        import_hf,
        launch,
        plan,
        prune,
        report,
        reshard,
        serve,
        sweep,
        translate,
        upcycle,
    )
    from moe_scale.train.recipe import exit_codes

    modules: dict[str, Any] = {
        "bench": bench,
        "bench-checkpoint": bench_checkpoint,
        "compare": compare,
        "doctor": doctor,
        "experts": experts,
        "export": export,
        "generate": generate,
        "import": import_hf,
        "launch": launch,
        "plan": plan,
        "prune": prune,
        "report": report,
        "reshard": reshard,
        "serve": serve,
        "sweep": sweep,
        "translate": translate,
        "upcycle": upcycle,
    }
    parser = argparse.ArgumentParser(prog="moe-scale", description="Tools around training mixture-of-experts models.")
    tools = parser.add_subparsers(dest="tool", required=True, metavar="TOOL")
    for name, module in modules.items():
        summary = (module.__doc__ or "").strip().splitlines()[0].partition(": ")[2]
        tool = tools.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        module.add_arguments(tool)
    arguments, rest = parser.parse_known_args(argv)
    with exit_codes(), leaving_with_the_reader():
        if arguments.tool in TAKE_A_RECIPE or vars(arguments).get("calibrate"):
            modules[arguments.tool].run(arguments, rest)
        elif rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        else:
            modules[arguments.tool].run(arguments)


if __name__ == "__main__":
    main()
