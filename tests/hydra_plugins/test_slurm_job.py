"""What a cell's job on SLURM says of processes that could not say it themselves."""

import pytest

from hydra_plugins.hass_lightning_launcher._slurm_job import srun_says


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["srun: error: n2: task 1: Killed", "error: [Errno 104]", "srun: error: n1: task 0: Killed"],
         "rank 1 on n2 has died (Killed)"),
        (["srun: error: n2: tasks 8-15: Segmentation fault"], "rank 8 on n2 has died (Segmentation fault)"),
        (["error: no target", "srun: error: n2: task 1: Exited with exit code 1", "srun: error: n1: task 0: Killed"],
         None),
        (["srun: error: Task launch for StepId=2.0 failed on node n2: Communication connection failure",
          "srun: error: Application launch failed: Communication connection failure"],
         "node failed: n2 did not start the processes (Communication connection failure)"),
        (["slurmstepd: error: Detected 1 oom-kill event(s) in StepId=2.0.", "srun: error: n1: task 0: Out Of Memory"],
         "out of memory: exceeded hydra.launcher.memory or the limit of the cluster"),
        (["step 1 of 30"], None),
    ],
)  # fmt: skip
def test_what_srun_says_of_processes_that_it_ended(lines, said):
    assert srun_says("\n".join(lines)) == said
