"""The command and the environment of a stage's processes: one way to start them, with one process and with many."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pipeline.cluster import Cluster, core_count, gpu_count
from pipeline.stage import Stage, stage_processes


def command(stage: Stage, folder: Path, cluster: Cluster) -> list[str]:
    """The argv that runs a stage in its folder on this machine. The port is torchrun's own choice, so no two clash."""
    work = ["-m", stage.module, "--step", str(folder)]
    if stage.processes == "one":
        return [sys.executable, *work]
    count = stage_processes(stage, cluster)
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", *work]


def environment(stage: Stage, cluster: Cluster) -> dict[str, str]:
    """The parent's environment with threads that fit the cores: oversubscription costs a factor of fifty."""
    count = stage_processes(stage, cluster)
    threads = cluster.threads if cluster.threads != "auto" else max(1, core_count() // count)
    settings = {
        # DeepSpeed looks for ninja there, also where the virtual environment is not active
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "PYTHONHASHSEED": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTHONWARNINGS": "ignore::FutureWarning,ignore::DeprecationWarning",  # of the libraries, to each other
    }
    if not gpu_count():
        # compiling costs a CPU a minute and a C++ compiler for what eager mode does in milliseconds
        settings |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}
    return {**os.environ, **settings}
