"""Trains a contextual document embedding model on batch shards.

torchrun --nproc-per-node 2 trainer/main.py --shards DIR --output DIR
torchrun -m hardbatch.trainer.main ...  (installed)
python trainer/main.py ...              (one process)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

if __name__ == "__main__" and not __package__:
    # When this file is run as a script, sys.path begins with trainer/. The root of this checkout
    # replaces it, so that `hardbatch` is the package beside this file, not an installed copy.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from hardbatch.pipeline.errors import HardbatchError
from hardbatch.trainer.config import parse_flags


def main(arguments: Sequence[str]) -> int:
    """Runs a training.

    Args:
        arguments: The flags; see `hardbatch.trainer.config`.

    Returns:
        0, an exit code of `hardbatch.pipeline.errors`, or 128 + the signal that ended the training.
    """
    # Threads that wait for each other sleep, as OpenMP reads here when torch is imported. Beside another
    # process on two cores, a training on the CPU took six times as long while they spun.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        config = parse_flags(arguments)
        from hardbatch.trainer.ranks import join_ranks

        with join_ranks(config.device, timeout_s=config.timeout_s) as ranks, ExitStack() as held:
            from hardbatch.trainer.checkpoint import find_checkpoint
            from hardbatch.trainer.loop import train
            from hardbatch.trainer.training import lock_output, start_training

            # The main rank looks for a checkpoint, and all of them load it.
            found: tuple[Path | None, list[str]] = (None, [])
            with ranks.errors_raised_together():
                if ranks.is_main:
                    held.enter_context(lock_output(config.output))
                    found = find_checkpoint(config.output, config.resume)
            checkpoint, notices = ranks.from_main(found)

            with ranks.errors_raised_together():
                training = start_training(config, ranks, checkpoint, notices)
            ranks.require_equal(training.facts(), "--output and --shards must be folders that all of them share")
            ranks.share_weights(training.encoder)
            training.chunk_tokens = ranks.min(training.chunk_tokens)  # free memory may differ between GPUs

            return train(training)
    except HardbatchError as error:
        if os.environ.get("RANK", "0") == "0":  # set by torchrun
            print(f"trainer: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
