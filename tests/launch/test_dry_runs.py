"""What the launch scripts would run, against the texts in expected/, and their mistakes.

PYTHONPATH=tests python -m launch.test_dry_runs writes the texts anew.
"""

import os
import shutil
import string
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
LAUNCH, EXPECTED = ROOT / "launch", Path(__file__).parent / "expected"
SCRIPTS = ("detached.sh", "gpu.sh", "slurm.sbatch", "tpu_vm.sh", "xpk.sh")
TRAIN = ["--", "--config=configs/imagenet.py:DiG-XL/2", "--workdir=runs/with space"]
TPU = ["--tpu=pod", "--zone=z"]
MACHINE = ["--type=v5litepod-16", "--version=v2-alpha-tpuv5-lite", "--spot"]
DRY_RUNS = {
    "detached_run": ["detached.sh", "run", *TRAIN],
    "detached_stop": ["detached.sh", "stop", "--name=b"],
    "gpu": ["gpu.sh", "run", "--gpus=4", *TRAIN],
    "gpu_list": ["gpu.sh", "run", "--gpus=5,", "--name=b", *TRAIN],
    "slurm": ["slurm.sbatch", "--nodes=2", "--gpus=8", "--time=24:00:00", "--partition=gpu", *TRAIN],
    "slurm_cpus": ["slurm.sbatch", "--nodes=1", "--processes=2", *TRAIN],
    "tpu_vm_create": ["tpu_vm.sh", "create", *TPU, "--project=p", *MACHINE],
    "tpu_vm_setup": ["tpu_vm.sh", "setup", *TPU],
    "tpu_vm_run": ["tpu_vm.sh", "run", *TPU, *TRAIN],
    "tpu_vm_status": ["tpu_vm.sh", "status", *TPU],
    "tpu_vm_logs": ["tpu_vm.sh", "logs", *TPU],
    "tpu_vm_stop": ["tpu_vm.sh", "stop", *TPU],
    "tpu_vm_delete": ["tpu_vm.sh", "delete", *TPU],
    "tpu_vm_babysit": ["tpu_vm.sh", "babysit", *TPU, *MACHINE, *TRAIN],
    "xpk": [
        "xpk.sh",
        "--cluster=c",
        "--workload=w",
        "--tpu_type=v5litepod-16",
        "--image=r/s:tpu",
        "--project=p",
        "--zone=z",
        "--slices=2",
        *TRAIN,
    ],
}


def launch(script: str, *flags: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "SLURM_JOB_ID")} | {"TMPDIR": "/tmp"}
    return subprocess.run([LAUNCH / script, *flags], capture_output=True, text=True, env=env)


def dry_run(name: str) -> str:
    script, *flags = DRY_RUNS[name]
    cut = flags.index("--") if "--" in flags else len(flags)
    result = launch(script, *flags[:cut], "--dry_run", *flags[cut:])
    assert result.returncode == 0 and not result.stderr, result
    return result.stdout.replace(str(ROOT), "ROOT")


@pytest.mark.parametrize("name", DRY_RUNS)
def test_dry_run(name):
    assert dry_run(name) == (EXPECTED / f"{name}.txt").read_text()


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script):
    result = launch(script, "--help")
    assert result.returncode == 0 and f"launch/{script}" in result.stdout and "--dry_run" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 130


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        ("tpu_vm.sh", [], "name a command"),
        ("tpu_vm.sh", ["start"], "unknown command start"),
        ("tpu_vm.sh", ["run", "--zone=z", *TRAIN], "--tpu is missing"),
        ("tpu_vm.sh", ["create", *TPU], "--type is missing"),
        ("tpu_vm.sh", ["create", "--tpu=pod", *MACHINE], "--zone is missing"),
        ("tpu_vm.sh", ["babysit", *TPU, *TRAIN], "--type is missing"),
        ("tpu_vm.sh", ["run", *TPU], "missing after --"),
        ("tpu_vm.sh", ["run", *TPU, "--config=c"], "unknown argument --config=c"),
        ("slurm.sbatch", ["--nodes=two", "--gpus=8", *TRAIN], "--nodes=two"),
        ("slurm.sbatch", ["--nodes=2", *TRAIN], "--gpus is missing"),
        ("slurm.sbatch", ["--nodes=2", "--gpus=8", "--processes=2", *TRAIN], "not both"),
        ("slurm.sbatch", ["--nodes=2", "--gpus=8"], "missing after --"),
        ("xpk.sh", ["--cluster=c", *TRAIN], "--workload is missing"),
        ("gpu.sh", ["run", *TRAIN], "--gpus="),
        ("gpu.sh", ["run", "--gpus=0", *TRAIN], "--gpus=0"),
        ("gpu.sh", ["run", "--gpus=2"], "missing after --"),
        ("detached.sh", ["run"], "missing after --"),
        ("detached.sh", ["stop", "--name=never"], "nothing runs"),
        ("detached.sh", ["logs", "--name=a/b"], "--name=a/b"),
    ],
)
def test_mistakes_are_one_line(script, flags, words):
    result = launch(script, *flags)
    assert result.returncode == 1 and result.stdout == ""
    assert words in result.stderr and len(result.stderr.splitlines()) == 1


def test_shellcheck():
    """Of the test extra; on other machines than CI's it may be missing."""
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is missing: pip install -e '.[test]'")
    result = subprocess.run(["shellcheck", *(LAUNCH / script for script in SCRIPTS)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.fixture
def jobset():
    text = (LAUNCH / "gke_jobset.yaml").read_text()
    values = dict.fromkeys(("NAME", "IMAGE", "ACCELERATOR", "TOPOLOGY", "CONFIG", "WORKDIR"), "given")
    # As in the comment of the file, which envsubst fills too.
    return yaml.safe_load(string.Template(text).substitute(values | {"SLICES": "2", "HOSTS": "4", "CHIPS": "4"}))


def test_jobset_ends_after_mistakes_alone(jobset):
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    (name,) = (container["name"] for container in job["template"]["spec"]["containers"])
    assert rule == {"action": "FailJob", "onExitCodes": {"containerName": name, "operator": "In", "values": [1]}}
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert job["backoffLimit"] == 0 and jobset["spec"]["failurePolicy"]["maxRestarts"] > 100


if __name__ == "__main__":
    for name in DRY_RUNS:
        (EXPECTED / f"{name}.txt").write_text(dry_run(name))
