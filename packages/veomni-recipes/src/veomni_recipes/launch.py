"""Start a recipe on every device of this machine through torchrun, and pass on the one sentence of a failure."""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
_LAUNCHED, _STOPPED = "VEOMNI_LAUNCHED_AT", "VEOMNI_STOPPED_FILE"
_IMPORTED = time.time()
USER_ERROR = 2  # the exit code of a run that ended because of something the user can put right


def launch(script: str, arguments: Sequence[str]) -> int:
    """Run `script` (a module or a file) by torchrun on this machine's processes; returns its exit code.

    SIGTERM and SIGUSR1 are passed on; a run that has saved itself upon them ends with 0.
    Honours NPROC_PER_NODE (default: one for each GPU, else one), NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    given = os.environ.get("NPROC_PER_NODE") or "1"
    if not given.isdigit() or int(given) < 1:
        print(f"NPROC_PER_NODE={given}: how many processes to start must be a number from 1 up", file=sys.stderr)
        return USER_ERROR
    count = processes()
    os.environ[_LAUNCHED] = str(time.time())
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    # the agent's own report of a dead process says nothing that the rank's sentence does not say better
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    program = [script] if script.endswith(".py") else ["-m", script]
    # torchrun passes SIGTERM on to the ranks; a scheduler's other signal means the same
    signal.signal(signal.SIGUSR1, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))
    stopped = Path(tempfile.mkdtemp()) / "stopped"
    os.environ[_STOPPED] = str(stopped)
    try:
        run(parse_args([*_rendezvous(), "--nproc-per-node", str(count), *program, *arguments]))
    except ChildFailedError as failed:
        # the rank that wrote why is the cause, whatever the others met when it went
        rank, failure = min(
            failed.failures.items(), key=lambda x: (not Path(x[1].error_file).is_file(), x[1].timestamp)
        )
        if failure.exitcode == USER_ERROR:
            print(failure.message, file=sys.stderr)
        else:
            what = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
            print(f"rank {rank} ended with {what}; its output is above", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except (KeyboardInterrupt, SignalException):
        return 0 if stopped.exists() else 130
    finally:
        shutil.rmtree(stopped.parent, ignore_errors=True)
    return 0


def note_stop() -> None:
    """Tell the launcher that the run was told to stop, and has saved all that it needs to go on."""
    if (file := os.environ.get(_STOPPED)) is not None:
        Path(file).touch()


def _rendezvous() -> list[str]:
    nodes = os.environ.get("NNODES", "1")
    if nodes == "1":
        return ["--standalone"]
    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), os.environ.get("MASTER_PORT", "29500")
    node = os.environ.get("NODE_RANK", "0")
    return ["--nnodes", nodes, "--node-rank", node, "--master-addr", address, "--master-port", port]


def processes() -> int:
    """How many ranks this machine gets: NPROC_PER_NODE, or one for each accelerator, or one."""
    import torch

    if given := os.environ.get("NPROC_PER_NODE"):
        return int(given)
    return max(1, torch.accelerator.device_count() if torch.accelerator.is_available() else 1)


def seconds_since_launch() -> float:
    """Since `launch` began, with all imports; in a script started otherwise, since this module was imported."""
    return time.time() - float(os.environ.get(_LAUNCHED, _IMPORTED))


def _end_with_launcher() -> None:
    """End this rank soon after its launcher is gone: torchrun starts ranks in sessions of their own, which a SIGKILL
    of the launcher's does not reach, and a rank that goes on would write into the folder of the run that follows.
    """
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _leave_together() -> None:
    """Leave the process group when all ranks are done: gloo aborts a rank whose peers have gone before."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def ends_with_one_sentence(*expected: type[Exception]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a recipe's main: the expected errors end the process with exit code 2 and their message alone.

    Under torchrun the message goes to the launcher, which says it once for all ranks. A rank that fails because
    another one went for such a reason (a collective that lost its peer) ends quietly too.
    """

    def decorate(main: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(main)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
            error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
            if error_file is not None:
                _end_with_launcher()
            try:
                result = main(*args, **kwargs)
            except KeyboardInterrupt:
                sys.exit(130)
            except expected as error:
                if error_file is None:
                    print(error, file=sys.stderr, flush=True)
                else:
                    reply = {"message": str(error), "timestamp": int(time.time())}
                    Path(error_file).write_text(json.dumps(reply), encoding="utf-8")
                sys.exit(USER_ERROR)
            except Exception:
                if error_file is not None and any(Path(error_file).parent.parent.glob("*/error.json")):
                    sys.exit(USER_ERROR)
                raise
            if error_file is not None:
                _leave_together()
            return result

        return wrapped

    return decorate
