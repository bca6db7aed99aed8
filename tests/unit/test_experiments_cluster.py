"""Jobs for a scheduler: the scripts are valid, and run by a stand-in for sbatch they do what the pool does."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from unisd_jax.errors import UserError
from unisd_jax.experiments import cluster, command
from unisd_jax.experiments.jobs import Job, is_finished
from unisd_jax.experiments.state import Manifest

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = REPOSITORY / "scripts" / "run_experiments.py"
KINDS = "cache", "train", "evaluate", "report"
# Runs every task of the array at once, as SLURM would later, and notes what it was given.
SBATCH = """#!{python}
import json, os, re, subprocess, sys
script = sys.argv[-1]
said = open("sbatch.log", "a")
said.write(json.dumps(sys.argv[1:]) + "\\n")
last = int(re.search(r"--array=0-(\\d+)", open(script).read())[1])
for task in range(last + 1):
    code = subprocess.call(["bash", script], env=os.environ | {{"SLURM_ARRAY_TASK_ID": str(task)}}, stdout=sys.stderr)
    said.write(f"task {{task}} of {{script}}: {{code}}\\n")
said.flush()
print(f"{{len(open('sbatch.log').readlines())}};here")
"""


@pytest.fixture
def jobs(tmp_path):
    """A cache for two trainings, an evaluation of each, a report; the second training fails until `now` is there."""

    def job(name, program="", needs=(), kind="train"):
        text = f"import pathlib, sys; out = pathlib.Path({str(tmp_path)!r}); {program or 'pass'}\n"
        text += f"(out / {name!r}).mkdir(exist_ok=True); (out / {name!r} / 'result.json').touch()\n"
        text += f"(out / 'order').open('a').write({name!r} + ' ')"
        outputs = (str(tmp_path / name / "result.json"),) if kind != "cache" else ()
        return Job(
            kind=kind, name=name, key=name, command=(sys.executable, "-c", text), needs=needs, outputs=outputs,
            folder=str(tmp_path / "jobs" / name), config="a: 1\n",
        )  # fmt: skip

    return [
        job("c0", kind="cache"),
        job("t0", needs=("c0",)),
        job("t1", "(out / 'now').exists() or sys.exit(1)", needs=("c0",)),
        job("e0", needs=("t0",), kind="evaluate"),
        job("e1", needs=("t1",), kind="evaluate"),
        job("report", needs=("e0", "e1"), kind="report"),
    ]


@pytest.fixture
def submit(tmp_path):
    """`submit(folder, *options)` runs submit.sh with the stand-in; returns what sbatch was given."""
    path = tmp_path / "bin" / "sbatch"
    path.parent.mkdir()
    path.write_text(SBATCH.format(python=sys.executable))
    path.chmod(path.stat().st_mode | stat.S_IEXEC)

    def run(folder, *options, **environment):
        environment |= {"PATH": f"{path.parent}:{os.environ['PATH']}"}
        done = subprocess.run(
            ["bash", str(folder / "submit.sh"), *options], capture_output=True, text=True, timeout=60,
            env=os.environ | environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        lines = (folder / "sbatch.log").read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("[")], lines

    return run


def test_the_scripts_are_valid_and_the_layers_follow_one_another(jobs, tmp_path):
    said = cluster.write_slurm(tmp_path / "c", jobs, PROGRAM)
    scripts = sorted(path.name for path in (tmp_path / "c").iterdir())
    assert scripts == [f"{place:02}-{kind}.sbatch" for place, kind in enumerate(KINDS)] + ["jobs.json", "submit.sh"]
    for name in scripts:
        if not name.endswith("json"):
            subprocess.run(["bash", "-n", str(tmp_path / "c" / name)], check=True)
    text = (tmp_path / "c" / "02-evaluate.sbatch").read_text()
    assert "#SBATCH --array=0-1" in text and '"$((SLURM_ARRAY_TASK_ID + 3))"' in text
    listed = json.loads((tmp_path / "c" / "jobs.json").read_text())["jobs"]
    assert [(job["index"], job["layer"], job["name"]) for job in listed][:4] == [
        (0, 0, "c0"),
        (1, 1, "t0"),
        (2, 1, "t1"),
        (3, 2, "e0"),
    ]
    assert "6 jobs in 4 arrays" in said[0] and (tmp_path / "jobs" / "t0" / "options.yaml").read_text() == "a: 1\n"


def test_submitted_jobs_run_and_each_layer_waits_for_the_one_before(jobs, submit, tmp_path):
    (tmp_path / "now").touch()
    cluster.write_slurm(tmp_path / "c", jobs, PROGRAM)
    given, lines = submit(tmp_path / "c", "--partition=gpu", "--comment=two words")
    assert given[0] == ["--parsable", "--partition=gpu", "--comment=two words", "00-cache.sbatch"]
    assert given[1][:3] == ["--parsable", "--dependency=afterok:2", "--kill-on-invalid-dep=yes"]
    assert given[3][1] == "--dependency=afterany:8", "a report is made of what there is"
    assert (tmp_path / "order").read_text().split() == ["c0", "t0", "t1", "e0", "e1", "report"]
    assert all(is_finished(job) for job in jobs) and all(line.endswith(": 0") for line in lines if "task" in line)
    assert {record["state"] for record in Manifest(tmp_path).read().values()} == {"finished"}


def test_a_job_refuses_to_run_before_what_it_needs_and_the_rest_can_be_submitted_again(jobs, submit, tmp_path, capsys):
    cluster.write_slurm(tmp_path / "c", jobs, PROGRAM)
    given, lines = submit(tmp_path / "c", DEPENDENCY="afterany")
    assert given[1][1] == "--dependency=afterany:2"
    assert [line[-1] for line in lines if line.startswith("task")] == ["0", "0", "1", "0", "2", "0"]
    assert command.main(["run-job", str(tmp_path / "c" / "jobs.json"), "4"], PROGRAM) == 2
    assert "e1 needs t1, which is not finished" in capsys.readouterr().err
    assert not is_finished(jobs[-1]), "a report without e1 is made again"
    with pytest.raises(UserError, match="holds other jobs"):
        cluster.write_slurm(tmp_path / "c", jobs, PROGRAM)
    (tmp_path / "now").touch()
    cluster.write_slurm(tmp_path / "again", jobs, PROGRAM)
    submit(tmp_path / "again")
    assert (tmp_path / "order").read_text().split() == ["c0", "t0", "e0", "report", "t1", "e1", "report"]
    assert cluster.write_slurm(tmp_path / "third", jobs, PROGRAM) == ["all jobs are finished; nothing was written"]


def test_a_run_that_is_made_again_makes_the_report_out_of_date(jobs, submit, tmp_path):
    (tmp_path / "now").touch()
    cluster.write_slurm(tmp_path / "c", jobs, PROGRAM)
    submit(tmp_path / "c")
    (tmp_path / "e1" / "result.json").unlink()
    cluster.write_slurm(tmp_path / "again", jobs, PROGRAM)
    listed = json.loads((tmp_path / "again" / "jobs.json").read_text())["jobs"]
    assert [job["name"] for job in listed] == ["e1", "report"]
    assert command.main(["run-job", str(tmp_path / "again" / "jobs.json"), "0"], PROGRAM) == 0
    assert is_finished(jobs[-2]) and not is_finished(jobs[-1])


def test_folders_may_have_spaces_and_percent_signs(jobs, tmp_path, monkeypatch):
    folder = tmp_path / "my 50% runs"
    folder.mkdir()
    monkeypatch.chdir(folder)
    cluster.write_slurm(Path("c"), jobs, PROGRAM)
    options = [line for line in (folder / "c" / "00-cache.sbatch").read_text().splitlines() if "#SBATCH" in line]
    assert f"#SBATCH --chdir='{folder}'" in options
    assert f"#SBATCH --output='{tmp_path}/my 50%% runs/c/slurm-%A_%a.log'" in options


def test_a_large_layer_takes_several_arrays(jobs, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "LARGEST_ARRAY", 1)
    cluster.write_slurm(tmp_path / "c", jobs, PROGRAM)
    text = (tmp_path / "c" / "submit.sh").read_text()
    layers = text.partition("\nsubmit ")[2].split('after="$ids" ids=""')
    assert [layer.count(".sbatch") for layer in layers] == [1, 2, 2, 1]


@pytest.mark.parametrize(
    ("content", "index", "message"),
    [
        ("{}", "0", "is not a list of jobs"),
        ("[", "0", "is not a list of jobs"),
        (None, "9", "expected 0 to 5"),
        (None, "x", "INDEX is 'x'"),
    ],
)
def test_a_wrong_list_or_number_is_one_line(jobs, tmp_path, capsys, content, index, message):
    cluster.write_slurm(tmp_path / "c", jobs, PROGRAM)
    listed = tmp_path / "c" / "jobs.json"
    if content is not None:
        listed.write_text(content)
    assert command.main(["run-job", str(listed), index], PROGRAM) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1
