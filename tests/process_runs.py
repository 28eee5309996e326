"""Runs that two processes make together, one after the other: a list of them in JSON is the only argument."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from accelerate import PartialState
from torch.distributed.tensor import DTensor

from branchtree import load_recipe, train
from branchtree.training.rundir import RunDirectory
from branchtree.training.session import make_accelerator, open_session, read_inputs


def main() -> None:
    """Make the runs, and write beside each what the processes found."""
    PartialState.destroy_process_group = lambda state, group=None: None  # the next run needs it
    for run in json.loads(sys.argv[1]):
        os.environ["ACCELERATE_USE_FSDP"] = "true" if run["sharded"] else "false"
        os.environ["FSDP_RESHARD_AFTER_FORWARD"] = str(run.get("reshard", True)).lower()
        train("quickstart", run["overrides"], output=Path(run["output"]), resume=run["resume"])
        if run["sharded"]:
            look(run)


def look(run: dict[str, object]) -> None:
    """Write how a session of this run lays out its weights on this process."""
    recipe = load_recipe("quickstart", run["overrides"])  # type: ignore[arg-type]
    output = Path(str(run["output"]))
    accelerator = make_accelerator(recipe, RunDirectory(output))
    session = open_session(read_inputs(recipe), RunDirectory(output), accelerator)
    parameters = dict(session.inputs.model.denoiser.named_parameters())
    facts = {
        "processes": accelerator.num_processes,
        "sharded": all(isinstance(value, DTensor) for value in parameters.values()),
        "numbers": sum(value.numel() for value in parameters.values()),
        "here": sum(value.to_local().numel() for value in parameters.values() if isinstance(value, DTensor)),
    }
    (output / f"facts_{accelerator.process_index}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
