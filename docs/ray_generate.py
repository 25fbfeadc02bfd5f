"""Runs generate_instruction.py as shards on a Ray cluster, and joins them.

    ray job submit --working-dir . -- python docs/ray_generate.py 8 --output_dir /shared/out \
        --num_instructions_to_generate 52000 --max_cost_usd 20

The first word is the number of shards; all others are flags of generate_instruction.py. --output_dir is a folder that
every machine sees. Without a cluster Ray starts one on this machine. A shard whose machine is lost is started again
and goes on from its journal.
"""

import subprocess
import sys
from pathlib import Path

import ray

SCRIPT = "generate_instruction.py"  # in the job's working directory


@ray.remote(num_cpus=1, max_retries=3)
def run_shard(shard: str, flags: list[str]) -> int:
    return subprocess.run([sys.executable, SCRIPT, "--shard", shard, *flags]).returncode


def main() -> int:
    count, flags = int(sys.argv[1]), sys.argv[2:]
    output = Path(flags[flags.index("--output_dir") + 1])
    ray.init()
    statuses = ray.get([run_shard.remote(f"{index}/{count}", flags) for index in range(count)])
    join = [sys.executable, SCRIPT, "rebuild", "--output_dir", str(output), "--shards", str(output / "shard_*")]
    return max(statuses) or subprocess.run(join).returncode


if __name__ == "__main__":
    sys.exit(main())
