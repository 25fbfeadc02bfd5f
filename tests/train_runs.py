"""Runs train.py's train() in forked processes, so that a test pays for torch's import once and not per process.

`launch` sets the variables that torchrun sets; tests that are about torchrun itself run it for real.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from alpaca.common.ports import free_port


class Run:
    """An ended run: `status` of the first process that failed (0: none did), `output` of all, by `rank`."""

    def __init__(self, statuses, outputs):
        self.statuses, self.outputs = statuses, outputs
        self.status = next((status for status in statuses if status), 0)
        self.output = "\n".join(outputs)

    def ok(self):
        assert self.status == 0, f"exit statuses {self.statuses}\n{self.output[-8000:]}"
        return self


def start(argv, folder: Path, processes: int = 1, environment=None) -> list[int]:
    """Forks `processes` runs of train.py with the words `argv`; their output goes to `folder`/RANK.txt."""
    # Once, before the fork.
    import train

    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    pids = []
    for rank in range(processes):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        status = 1
        try:
            out = os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            if processes > 1:
                places = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes)
                os.environ.update({name: str(value) for name, value in places.items()})
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            os.environ.update(environment or {})
            sys.argv = ["train.py", *map(str, argv)]
            status = train.main()
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status or 0)
    return pids


def wait(pids, folder: Path, timeout: float = 240) -> Run:
    """Waits for all; where one fails the others, who would wait for it for ever, are ended as torchrun ends them."""
    statuses, deadline = {}, time.monotonic() + timeout
    while len(statuses) < len(pids):
        for pid in pids:
            if pid not in statuses:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    statuses[pid] = os.waitstatus_to_exitcode(status)
        if any(statuses.values()):
            deadline = min(deadline, time.monotonic() + 10)
        if time.monotonic() > deadline:
            for pid in set(pids) - set(statuses):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return Run([statuses[pid] for pid in pids], [(folder / f"{r}.txt").read_text() for r in range(len(pids))])


def losses(output_dir: Path) -> list[float]:
    """The training loss of each step, from train_log.jsonl."""
    lines = [json.loads(line) for line in (Path(output_dir) / "train_log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def launch(argv, folder: Path, processes: int = 1, environment=None, timeout: float = 240) -> Run:
    return wait(start(argv, folder, processes, environment), folder, timeout)
