"""The command `softmask`: the scripts of train/ in any folder.

softmask pretrain | finetune | evaluate | report | env [arguments of the command]
"""

from __future__ import annotations

import importlib
import os
import sys

COMMANDS = {
    "pretrain": ("softmask.training.pretrain", "pre-train SoftMask++, ALBEF, SyCoCa or CoCa"),
    "finetune": ("softmask.finetuning.finetune", "train a task after pre-training"),
    "evaluate": ("softmask.evaluation.evaluate", "retrieval, grounding, captions of a checkpoint"),
    "report": ("softmask.report.build", "a page about a run"),
    "env": ("softmask.env", "installed packages, and the backend of each op"),
}

SPINS = "1000"
"""How often a thread of GNU OpenMP looks for work before it sleeps. OpenMP's default is milliseconds, in which waiting
threads keep a core from the processes that they wait for; docs/performance.md has the measurements."""


def run(command: str, arguments: list[str] | None = None) -> int:
    """Run a command with the settings that torch reads when it is imported. Returns its exit status."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS
    return importlib.import_module(COMMANDS[command][0]).main(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    if not given or given[0] not in COMMANDS:
        print("usage: softmask COMMAND [arguments]; softmask COMMAND --help", file=sys.stderr)
        for name, (_, description) in COMMANDS.items():
            print(f"  {name:9s} {description}", file=sys.stderr)
        return 0 if given and given[0] in ("-h", "--help") else 2
    command, *rest = given
    sys.argv = [f"softmask {command}", *rest]
    return run(command, rest)


if __name__ == "__main__":
    sys.exit(main())
